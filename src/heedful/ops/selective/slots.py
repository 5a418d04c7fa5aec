"""One decoding step of selective attention: a single query, and votes that wait in a cache."""

import torch
from torch import Tensor

from heedful.ops.checks import check_choice
from heedful.ops.eviction.selectors import most_voted_slot
from heedful.ops.native.library import check_native, preferred
from heedful.ops.precision import drop_denormals, no_autocast, to_autocast_dtype, wide_dtype
from heedful.ops.selective.native.slots import attend_slots_native, plain_tensors, run_slots
from heedful.ops.selective.triton.slots import attend_slots_triton


def attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor,
    positions: Tensor,
    newest: Tensor,
    scale: float,
    impl: str = "auto",
    grace: int = 1,
    first: int = 1,
    select: tuple[Tensor, Tensor] | None = None,
    subtract: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend with the newest token, add its votes to `soft_mask`, in place, and say which slot is needed least.

    The same numbers as `selective_attention` gives for its last query, in any order of the keys. No gradients.

    Args:
        q: (B, H, 1, D).
        k: (B, G, C, D), every slot in use; slot 0 holds the first real token, which is never voted on.
        v: (B, G, C, E).
        soft_mask: (B, C), the votes against each slot so far; float32, float64 for float64 q.
        positions: (B, C) int64 position of the token in each slot; 0 in slot 0 alone, no slot empty.
        newest: (B, 1) int64, the slot of the query's own token.
        scale: multiplies the logits.
        impl: "triton" (one launch), "native" (one call of the C++ operator, on the CPU), "products" (two of them),
            or "auto": on the CPU "native" where it can be had, but for float64; else "products", since no GPU run
            in results/ compares the two.
        grace: the newest tokens that never go, the next one included.
        first: the first tokens that never go.
        select: queries (B, 1, 1, D') and keys (B, 1, C, D') of a selection head; None: head 0.
        subtract: whether the votes are subtracted from the logits; else they only say who goes.

    Returns:
        out (B, H, 1, E) in the dtype of v, and as `least_needed_slot` the slot the next token may take, (B, 1).

    Raises:
        ValueError: for an unknown `impl`, or if it is "triton" or "native" and that cannot run these tensors.
    """
    check_choice("impl", impl, ("auto", "native", "products", "triton"))
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = to_autocast_dtype(q, k, v)  # type: ignore[assignment]
        if select is not None:
            select = to_autocast_dtype(*select)  # type: ignore[assignment]
        with no_autocast(q.device):
            return attend_slots(
                q, k, v, soft_mask, positions, newest, scale, impl, grace, first, select, subtract
            )
    if impl == "triton":
        if select is not None or not subtract:
            raise ValueError(
                "impl='triton' takes the votes of head 0 and subtracts them, got a selection head of its own or "
                "subtract=False; use impl='auto'"
            )
        out, voted, next_slot = attend_slots_triton(
            q, k, v, soft_mask, positions, newest, scale, grace, first
        )
        soft_mask.copy_(voted)
        return out, next_slot
    if impl == "native" or (impl == "auto" and preferred(q.device.type, q.dtype)):
        check_native(q)
        step = attend_slots_native if torch.is_grad_enabled() or not plain_tensors(q, k, v) else run_slots
        select_q, select_k = select or (None, None)
        return step(q, k, v, soft_mask, positions, newest, scale, grace, first, select_q, select_k, subtract)
    out, votes = _two_products(q, k, v, soft_mask if subtract else None, scale)
    if select is not None:
        select_q, select_k = (x[:, 0].to(votes.dtype) for x in select)
        votes = ((select_q * scale) @ select_k.mT)[:, 0].relu()
    votes.scatter_(1, newest, 0.0)
    soft_mask[:, 1:].add_(votes[:, 1:])
    following = positions.gather(1, newest) + 1
    return out, most_voted_slot(soft_mask, positions, following, grace, first)


def _two_products(
    q: Tensor, k: Tensor, v: Tensor, soft_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`softmax(L - F) v` of one query, (B, H, 1, E), and relu of the logits of head 0, (B, C); None: F = 0."""
    batch, heads, _, size = q.shape
    groups, dtype = k.shape[1], wide_dtype(q)
    grouped = q.to(dtype).reshape(batch * groups, heads // groups, size)
    keys, values = k.to(dtype).flatten(0, 1), v.to(dtype).flatten(0, 1)
    flat = torch.baddbmm(grouped.new_empty(()), grouped, keys.mT, beta=0, alpha=scale)
    logits = flat.view(batch, heads, k.shape[2])
    votes = logits[:, 0].relu()
    if soft_mask is not None:
        logits.sub_(soft_mask[:, None])
    weights = drop_denormals(logits.softmax(-1))
    out = torch.bmm(weights.view(flat.shape), values)
    return out.view(batch, heads, 1, v.shape[-1]).to(v.dtype), votes
