"""The public selective attention operations: documentation, checks, and the choice of implementation."""

from typing import Protocol

import torch
from torch import Tensor

from heedful.ops.checks import (
    check_device,
    check_divides,
    check_float,
    check_no_tangent,
    check_same,
    check_shape,
    check_tensor,
    did_you_mean,
    show,
    transformed,
)
from heedful.ops.masks import rank_in_segment, visible_keys, voted_keys
from heedful.ops.native.library import preferred as native_is_preferred
from heedful.ops.precision import no_autocast, to_autocast_dtype
from heedful.ops.selective.auto_rule import choose
from heedful.ops.selective.blocked import selective_blocked
from heedful.ops.selective.count_blocked import blocked_count
from heedful.ops.selective.native.selective import selective_native
from heedful.ops.selective.one_query import selective_one_query
from heedful.ops.selective.reference import selective_reference
from heedful.ops.selective.sdpa import selective_sdpa
from heedful.ops.selective.triton import selective_triton
from heedful.ops.selective.triton.available import trusted


class DenseImplementation(Protocol):
    """What an implementation with (T, S) masks takes: checked tensors, ready masks, and the selection heads."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        select: tuple[Tensor, Tensor, float] | None,
        soft_mask: Tensor | None,
        visible: Tensor,
        voted: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]: ...


DENSE: dict[str, DenseImplementation] = {"reference": selective_reference, "sdpa": selective_sdpa}
BLOCKED = {"blocked": selective_blocked, "native": selective_native, "triton": selective_triton}
IMPLEMENTATIONS = (*DENSE, *BLOCKED)


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    select_q: Tensor | None = None,
    select_k: Tensor | None = None,
    soft_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    padding_is_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Causal attention in which tokens vote on which earlier tokens are no longer needed.

    With raw logits `L^h[i,j] = q^h_i . k^h_j * scale`, and head 0 as the selection head:

        S[i,j] = relu(L^0[i,j]), but 0 on the first real token and on the query itself
        F[i,j] = sum_{u<i} S[u,j]
        out^h  = softmax_j(L^h[i,j] - F[i,j]) v^h_j

    Gradients of all heads flow through F into the selection head. S, F and the softmax are computed in
    float32 (float64 when q is float64), also under autocast. Calls chain: a whole sequence gives the same
    numbers as its pieces, when each call gets all keys so far and the `soft_mask` of the call before.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D) with S >= T and H % G == 0; the last T keys belong to the queries.
        v: (B, G, S, E).
        select_q: (B, R, T, D'), the queries of R selection heads; default head 0, `q[:, :1]`.
            Attention heads h with the same `h * R // H` share a mask.
        select_k: (B, R, S, D'), their keys; default `k[:, :1]`. Give both or neither.
        soft_mask: (B, R, S - T) votes already cast on the earlier keys; default none.
        key_mask: (B, S) bool, False = padding: it is never attended to, never votes, and the protected
            first token is the first *real* one. Outputs at padded queries are 0.
        segment_ids: (B, S) integers; attention and votes stay inside a segment, and each segment
            protects its own first real token.
        scale: multiplies the logits, of the selection heads too; default 1 / sqrt(last axis).
        impl: "reference" (the formula, all logits in memory), "sdpa" (F as a bias of PyTorch's fused
            attention), "blocked" (blocks of queries, memory grows with T; keys that are certain to weigh less than
            1e-13 of a row are left out; no double backward), "native" (the same in C++, for the CPU;
            compiled on first use, see `heedful.ops.selective.native`), "triton" (kernels for
            NVIDIA GPUs: float16, bfloat16 and float32, head sizes up to 128), or "auto": on the CPU "native"
            where it can be had, but for float64; on CUDA "triton" where such dtypes and head sizes agreed with
            the formula on such a GPU (`triton/available.py`); else chosen by a rule (`ops/selective/auto_rule.py`).
        padding_is_finite: q, k and v hold numbers where key_mask is False, as behind a layer that zeroes its
            padding; otherwise they are copied without what is there, since 0 times NaN is NaN.

    Returns:
        out: (B, H, T, E) in the dtype of v.
        soft_mask: (B, R, S), F after the last query, float32 (float64 when q is float64).

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device or `impl`, or an `impl` that cannot run these tensors.

    Source: Leviathan, Kalman, Matias, "Selective Attention Improves Transformer", arXiv 2410.02703.
    """
    _check_impl(impl)
    q, k, v, select_q, select_k = to_autocast_dtype(q, k, v, select_q, select_k)  # type: ignore
    check_float("q", check_tensor("q", q, "(B, H, T, D)"))
    check_tensor("k", k, "(B, G, S, D)")
    check_tensor("v", v, "(B, G, S, E)")
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    batch, heads, length, size = q.shape
    groups, n_keys = k.shape[1], k.shape[2]
    check_shape("k", k, (batch, groups, n_keys, size), "(B, G, S, D)")
    check_shape("v", v, (batch, groups, n_keys, v.shape[-1]), "(B, G, S, E)")
    check_divides("the number of query heads H", heads, "the number of key heads G", groups)
    if not size or not v.shape[-1]:
        raise ValueError(
            f"heads need at least one feature, got D = {size} of q and k, E = {v.shape[-1]} of v; check the sizes"
        )
    selectors = 1
    select = None
    if select_q is not None or select_k is not None:
        select_q, select_k = _check_select(select_q, select_k, q, n_keys)
        selectors = select_q.shape[1]
        select = (select_q, select_k, select_q.shape[-1] ** -0.5 if scale is None else scale)
    _check_masks(q, batch, selectors, length, n_keys, soft_mask, key_mask, segment_ids)
    scale = size**-0.5 if scale is None else scale
    if (
        impl == "auto"
        and not torch.compiler.is_compiling()
        and transformed(q, k, v, select_q, select_k, soft_mask)
    ):
        impl = "sdpa"  # plain operations
    one = impl == "auto" and length == 1
    if impl == "auto" and not one and native_is_preferred(q.device.type, q.dtype):
        impl = "native"
    if impl == "auto" and not one:
        impl = choose(q.device.type, length, n_keys, trusted(q, v, select_q))
    if key_mask is not None and not padding_is_finite:
        q, k, v, select = _without_padding(q, k, v, select, key_mask)
    with no_autocast(q.device):
        if impl in BLOCKED:
            check_no_tangent(f"impl={impl!r}", q, k, v, select_q, select_k, soft_mask)
            return BLOCKED[impl](q, k, v, select, soft_mask, key_mask, segment_ids, scale)
        if one and key_mask is None and segment_ids is None:
            return selective_one_query(q, k, v, select, soft_mask, None, None, scale)
        visible = visible_keys(length, n_keys, key_mask, segment_ids, q.device)
        voted = voted_keys(visible, rank_in_segment(n_keys, key_mask, segment_ids, q.device))
        attend = selective_one_query if one else DENSE[impl]
        return attend(q, k, v, select, soft_mask, visible, voted, scale)


def attend_visible(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor | None,
    visible: Tensor,
    voted: Tensor,
    scale: float,
    impl: str = "auto",
    select: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_attention` over keys in any order and with ready masks.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D).
        v: (B, G, S, E).
        soft_mask: (B, R, N) votes on the first N <= S keys; the others start at 0.
        visible: (B, T, S) bool, the keys each query attends to.
        voted: (B, T, S) bool, the keys each query may vote on.
        scale: multiplies the logits.
        impl: "reference", "sdpa", or "auto", which is "sdpa".
        select: queries (B, R, T, D') and keys (B, R, S, D') of R selection heads; None: head 0.

    Returns:
        out (B, H, T, E) and soft_mask (B, R, S).

    Raises:
        ValueError: for an `impl` that takes no ready masks.
    """
    _check_impl(impl)
    impl = "sdpa" if impl == "auto" else impl
    if impl not in DENSE:
        raise ValueError(
            f"impl={impl!r} takes whole sequences only, got keys with ready masks (a cache that evicts); use "
            f"impl='auto', 'sdpa' or 'reference'"
        )
    q, k, v = to_autocast_dtype(q, k, v)  # type: ignore[assignment]
    own = None
    if select is not None:
        select_q, select_k = to_autocast_dtype(*select)
        assert select_q is not None and select_k is not None
        own = select_q, select_k, scale
    with no_autocast(q.device):
        return DENSE[impl](q, k, v, own, soft_mask, visible, voted, scale)


def unmasked_count(
    select_q: Tensor,
    select_k: Tensor,
    *,
    tau: float = 1.0,
    soft_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """How many tokens each query still holds, softly: `M_i = sum_{k<=i} 1 - min(F[i,k], tau) / tau`.

    Differentiable, the quantity in the memory loss (arXiv 2410.02703, section 5): a token counts 1 while
    nobody voted it away and 0 once its F reaches tau.

    Args:
        select_q: (B, R, T, D), the queries of the selection heads, e.g. `q[:, :1]`.
        select_k: (B, R, S, D), their keys; the last T belong to the queries.
        tau: the F at which a token counts as gone, > 0.
        soft_mask: (B, R, S - T) votes already cast on the earlier keys; default none.
        key_mask: (B, S) bool, False = padding, which neither counts nor votes.
        segment_ids: (B, S) integers; only tokens of the query's own segment count.
        scale: multiplies the logits; default 1 / sqrt(D).

    Returns:
        (B, R, T) float32 (float64 for float64 input); 0 at padded queries.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape or device, or tau <= 0.
    """
    if not tau > 0:
        raise ValueError(f"tau must be greater than 0, got {tau}")
    select_q, select_k = to_autocast_dtype(select_q, select_k)  # type: ignore[assignment]
    check_float("select_q", check_tensor("select_q", select_q, "(B, R, T, D)"))
    check_tensor("select_k", select_k, "(B, R, S, D)")
    n_keys = select_k.shape[2]
    _check_select(select_q, select_k, select_q, n_keys)
    batch, selectors, length, size = select_q.shape
    _check_masks(select_q, batch, selectors, length, n_keys, soft_mask, key_mask, segment_ids)
    scale = size**-0.5 if scale is None else scale
    check_no_tangent("unmasked_count", select_q, select_k, soft_mask)
    if key_mask is not None:
        select_q = select_q.masked_fill(~key_mask[:, None, n_keys - length :, None], 0.0)
        select_k = select_k.masked_fill(~key_mask[:, None, :, None], 0.0)
    with no_autocast(select_q.device):
        return blocked_count(select_q, select_k, soft_mask, key_mask, segment_ids, tau, scale)


def _without_padding(
    q: Tensor, k: Tensor, v: Tensor, select: tuple[Tensor, Tensor, float] | None, key_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, float] | None]:
    """Zeros where padding is: a weight of 0 times NaN would be NaN, in the gradients too."""
    padded = ~key_mask[:, None, :, None]
    mine = padded[:, :, k.shape[2] - q.shape[2] :]
    if select is not None:
        select = select[0].masked_fill(mine, 0.0), select[1].masked_fill(padded, 0.0), select[2]
    return q.masked_fill(mine, 0.0), k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0), select


def _check_impl(impl: str) -> None:
    """Raise unless there is such an implementation."""
    known = ["auto", *IMPLEMENTATIONS]
    if impl not in known:
        hint = did_you_mean(impl, known)
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}; {hint}".rstrip("; "))


def _check_select(
    select_q: Tensor | None, select_k: Tensor | None, q: Tensor, n_keys: int
) -> tuple[Tensor, Tensor]:
    if select_q is None or select_k is None:
        missing = "select_q" if select_q is None else "select_k"
        raise ValueError(f"select_q and select_k go together, but {missing} is None; give both")
    check_tensor("select_q", select_q, "(B, R, T, D')")
    check_tensor("select_k", select_k, "(B, R, S, D')")
    check_same("select_q", select_q, "q", q)
    check_same("select_k", select_k, "q", q)
    batch, _, length, _ = q.shape
    selectors, size = select_q.shape[1], select_q.shape[-1]
    if selectors < 1:
        raise ValueError(f"select_q must hold at least one selection head, got {show(select_q)}")
    check_shape("select_q", select_q, (batch, selectors, length, size), "(B, R, T, D')")
    check_shape("select_k", select_k, (batch, selectors, n_keys, size), "(B, R, S, D')")
    return select_q, select_k


def _check_masks(
    q: Tensor,
    batch: int,
    selectors: int,
    length: int,
    n_keys: int,
    soft_mask: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    if n_keys < length:
        raise ValueError(
            f"there must be at least as many keys as queries (the last T keys belong to the queries), "
            f"got S = {n_keys} keys and T = {length} queries; pass the keys of all tokens so far"
        )
    if soft_mask is not None:
        check_float("soft_mask", check_tensor("soft_mask", soft_mask, "(B, R, S-T)"))
        check_shape("soft_mask", soft_mask, (batch, selectors, n_keys - length), "(B, R, S-T)")
        check_device("soft_mask", soft_mask, "q", q)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, "(B, S)")
        if key_mask.dtype != torch.bool:
            raise TypeError(
                f"key_mask must be bool (True = real token), got {show(key_mask)}; use key_mask.bool()"
            )
        check_shape("key_mask", key_mask, (batch, n_keys), "(B, S)")
        check_device("key_mask", key_mask, "q", q)
    if segment_ids is not None:
        check_tensor("segment_ids", segment_ids, "(B, S)")
        if segment_ids.is_floating_point() or segment_ids.dtype == torch.bool:
            raise TypeError(f"segment_ids must be integers, got {show(segment_ids)}")
        check_shape("segment_ids", segment_ids, (batch, n_keys), "(B, S)")
        check_device("segment_ids", segment_ids, "q", q)
