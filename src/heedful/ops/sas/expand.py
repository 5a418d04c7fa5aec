"""The expansion of SAS, heads then features, in one call.

`reference` is `simulate_heads` and `simulate_features`, one after the other: autograd keeps every intermediate
result. `unfolded` is the same with the first as a matrix product, for GPUs. `blocked` goes through the tokens in
pieces that stay in a core's cache, keeps the input alone, and makes the rest again in the backward pass, piece by
piece. `native` does so token by token in C++. These two are one registered operator with a fake kernel, so that it
compiles; differentiating its backward pass raises.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.ops.checks import check_choice, check_no_tangent
from heedful.ops.native.library import check_native, preferred
from heedful.ops.precision import no_autocast, to_autocast_dtype, wide_dtype
from heedful.ops.sas.native import run_expand, run_expand_backward
from heedful.ops.sas.pieces import Layers, pieces
from heedful.ops.sas.placing import NOWHERE, Placement, place
from heedful.ops.sas.steps import check_feature_weights, check_head_weights, simulate_features, simulate_heads
from heedful.ops.sas.unfolded import simulate_heads_unfolded

IMPLEMENTATIONS = ("auto", "reference", "unfolded", "blocked", "native")


class Features(NamedTuple):
    """The weights of `simulate_features`."""

    weight1: Tensor
    """(D̂, D)."""
    bias1: Tensor | None
    """(D̂,)."""
    weight2: Tensor
    """(D̂, D̂)."""
    bias2: Tensor | None
    """(D̂,)."""


def expand(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    features: Features | None = None,
    placement: Placement = NOWHERE,
    *,
    impl: str = "auto",
) -> Tensor:
    """Simulate more heads, and wider ones where `features` are given, then norm and rotate these.

    Zheng et al., arXiv 2507.07694: for queries and keys `simulate_features(simulate_heads(x, ...), ...)`, for
    values `simulate_heads(x, ...)`. QK-norm and rotary positions are not in the paper; they act on D̂.

    Args:
        x: (B, H, T, D).
        weight1: (Ĥ, H, W) with W odd.
        bias1: (Ĥ,) or None.
        weight2: (Ĥ, Ĥ, W).
        bias2: (Ĥ,) or None.
        features: the weights of the second step; None leaves the features alone, as for values.
        placement: the norm and the rotation of queries and keys; neither by default.
        impl: "reference" calls the two steps, "unfolded" the first one as a matrix product, "blocked" keeps the
            input alone and makes the rest again in the backward pass, "native" does so in C++ on the CPU, in
            float32 or float64; "auto" is unfolded away from the CPU, native on it in float32 where it can be had,
            else blocked.

    Returns:
        (B, Ĥ, T, D̂), or (B, Ĥ, T, D) without `features`.

    Raises:
        ValueError: if W is even, a shape does not fit, `impl` is unknown or cannot run here, or there is a
            placement without features.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    if features is None and placement is not NOWHERE:
        raise ValueError("a placement needs features: values are neither normed nor rotated; leave it out")
    if impl in ("reference", "unfolded") or (impl == "auto" and x.device.type != "cpu"):
        heads = simulate_heads if impl == "reference" else simulate_heads_unfolded
        x = heads(x, weight1, bias1, weight2, bias2)
        return x if features is None else place(simulate_features(x, *features), placement)
    check_head_weights(x, weight1, bias1, weight2, bias2)
    if features is not None:
        check_feature_weights(x, *features)
    check_no_tangent("expand", x, weight1, bias1, weight2, bias2, *(features or ()))
    cast, *weights = to_autocast_dtype(x, weight1, bias1, weight2, bias2, *(features or [None] * 4))
    assert cast is not None
    one_dtype = all(w is None or w.dtype == cast.dtype for w in (*weights, *placement[:1], *placement[2:4]))
    if impl == "native":
        check_native(cast)
        if not one_dtype or cast.dtype.itemsize < 4:
            raise ValueError(
                "impl='native' computes in one dtype, float32 or float64, autocast and 16 bits are not for it; "
                f"got x of {cast.dtype}; use impl='auto'"
            )
    native = impl == "native" or (
        impl == "auto" and one_dtype and cast.dtype.itemsize >= 4 and preferred("cpu", cast.dtype)
    )
    return _expand(cast.transpose(1, 2), *weights, *placement, native)


@torch.library.custom_op("heedful::sas_expand", mutates_args=())
def _expand(
    x: Tensor,
    conv1: Tensor,
    conv1_bias: Tensor | None,
    conv2: Tensor,
    conv2_bias: Tensor | None,
    lin1: Tensor | None,
    lin1_bias: Tensor | None,
    lin2: Tensor | None,
    lin2_bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    norm_first: bool,
    native: bool,
) -> Tensor:
    """X (B, T, H, D) -> (B, Ĥ, T, D̂)."""
    if native:
        weights = (conv1, conv1_bias, conv2, conv2_bias, lin1, lin1_bias, lin2, lin2_bias, norm)
        return run_expand(x, weights, Placement(norm, eps, cos, sin, norm_first))
    layers = Layers.of(conv1, conv1_bias, conv2, conv2_bias, lin1, lin1_bias, lin2, lin2_bias)
    placement = Placement(norm, eps, cos, sin, norm_first)
    out = _like_out(x, conv1, lin1, norm)
    with no_autocast(x.device):
        for rows, tokens in pieces(x, layers):
            part = out[rows, :, tokens].transpose(0, 1)  # (Ĥ, b, t, D̂)
            layers.forward(x[rows, tokens], placement.of(rows, tokens), part)
    return out


@_expand.register_fake
def _(
    x: Tensor,
    conv1: Tensor,
    conv1_bias: Tensor | None,
    conv2: Tensor,
    conv2_bias: Tensor | None,
    lin1: Tensor | None,
    lin1_bias: Tensor | None,
    lin2: Tensor | None,
    lin2_bias: Tensor | None,
    norm: Tensor | None,
    *rest: Any,
) -> Tensor:
    return _like_out(x, conv1, lin1, norm)


def _like_out(x: Tensor, conv1: Tensor, lin1: Tensor | None, norm: Tensor | None) -> Tensor:
    batch, length, _, size = x.shape
    wide = size if lin1 is None else lin1.shape[0]
    return x.new_empty(batch, conv1.shape[0], length, wide, dtype=(x if norm is None else norm).dtype)


@torch.library.custom_op("heedful::sas_expand_backward", mutates_args=())
def _expand_backward(
    grad: Tensor,
    x: Tensor,
    conv1: Tensor,
    conv1_bias: Tensor | None,
    conv2: Tensor,
    conv2_bias: Tensor | None,
    lin1: Tensor | None,
    lin1_bias: Tensor | None,
    lin2: Tensor | None,
    lin2_bias: Tensor | None,
    norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm_first: bool,
    native: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the weights, gains included; empty where there is no weight or none is needed."""
    weights = (conv1, conv1_bias, conv2, conv2_bias, lin1, lin1_bias, lin2, lin2_bias)
    placement = Placement(norm, eps, cos, sin, norm_first)
    if native:
        return run_expand_backward(grad, x, (*weights, norm), placement, need_x, need_weights)  # type: ignore[return-value]
    layers = Layers.of(*weights)
    d_x = x.new_empty(x.shape if need_x else 0)
    sums = layers.sums() if need_weights else []
    d_norm = None
    if norm is not None and need_weights:
        d_norm = torch.zeros_like(norm, dtype=wide_dtype(norm))
    for rows, tokens in pieces(x, layers):
        part = grad[rows, :, tokens].transpose(0, 1)
        d_piece = layers.backward(x[rows, tokens], placement.of(rows, tokens), part, sums, d_norm, need_x)
        if d_piece is not None:
            d_x[rows, tokens] = d_piece
    totals = [total for layer in sums for total in layer]
    totals += [None] * (len(weights) - len(totals))
    return d_x, *(  # type: ignore[return-value]
        x.new_empty(0)
        if total is None or weight is None
        else total.reshape(weight.shape).to(weight.dtype).contiguous()
        for weight, total in zip((*weights, norm), (*totals, d_norm), strict=True)
    )


@_expand_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *weights, _, _, _, _, _, need_x, need_weights = rest
    d_x = x.new_empty(x.shape if need_x else 0)
    return d_x, *(
        x.new_empty(0) if weight is None or not need_weights else weight.new_empty(weight.shape)
        for weight in weights
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *weights, norm, eps, cos, sin, norm_first, native = inputs
    ctx.save_for_backward(*weights, norm, cos, sin)
    ctx.options = eps, norm_first, native


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:10]
    with no_autocast(grad.device):
        found = _expand_backward(grad, *ctx.saved_tensors, *ctx.options, needed[0], any(needed[1:]))
    return *(d if need else None for d, need in zip(found, needed, strict=True)), *(None,) * 5


_expand.register_autograd(_gradients, setup_context=_save)
