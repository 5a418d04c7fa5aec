"""The expansion of SAS, heads then features, in one call.

`reference` is `simulate_heads` and `simulate_features`, one after the other: autograd keeps every intermediate
result. `blocked` goes through the tokens in pieces that stay in a core's cache, keeps the input alone, and makes
the rest again in the backward pass, piece by piece. It is a registered operator with a fake kernel, so that it
compiles; differentiating its backward pass raises.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from heedful.ops.checks import check_choice
from heedful.ops.precision import no_autocast, to_autocast_dtype
from heedful.ops.sas.pieces import Layers, pieces
from heedful.ops.sas.steps import check_feature_weights, check_head_weights, simulate_features, simulate_heads

IMPLEMENTATIONS = ("auto", "reference", "blocked")


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
    *,
    impl: str = "auto",
) -> Tensor:
    """Simulate more heads, and wider ones where `features` are given.

    Zheng et al., arXiv 2507.07694: for queries and keys `simulate_features(simulate_heads(x, ...), ...)`, for
    values `simulate_heads(x, ...)`.

    Args:
        x: (B, H, T, D).
        weight1: (Ĥ, H, W) with W odd.
        bias1: (Ĥ,) or None.
        weight2: (Ĥ, Ĥ, W).
        bias2: (Ĥ,) or None.
        features: the weights of the second step; None leaves the features alone, as for values.
        impl: "reference" calls the two steps, "blocked" keeps the input alone and makes the rest again in the
            backward pass; "auto" is blocked on the CPU and the reference elsewhere.

    Returns:
        (B, Ĥ, T, D̂), or (B, Ĥ, T, D) without `features`.

    Raises:
        ValueError: if W is even, a shape does not fit, or `impl` is unknown.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "reference" or (impl == "auto" and x.device.type != "cpu"):
        x = simulate_heads(x, weight1, bias1, weight2, bias2)
        return x if features is None else simulate_features(x, *features)
    check_head_weights(x, weight1, bias1, weight2, bias2)
    if features is not None:
        check_feature_weights(x, *features)
    cast, *weights = to_autocast_dtype(x, weight1, bias1, weight2, bias2, *(features or [None] * 4))
    assert cast is not None
    return _expand(cast.transpose(1, 2), *weights)


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
) -> Tensor:
    """X (B, T, H, D) -> (B, Ĥ, T, D̂)."""
    layers = Layers.of(conv1, conv1_bias, conv2, conv2_bias, lin1, lin1_bias, lin2, lin2_bias)
    out = x.new_empty(_shape_out(x, conv1, lin1))
    for rows, tokens in pieces(x, layers):
        part = out[rows, :, tokens].transpose(0, 1)  # (Ĥ, b, t, D̂)
        layers.forward(x[rows, tokens], part)
    return out


@_expand.register_fake
def _(x, conv1, conv1_bias, conv2, conv2_bias, lin1, lin1_bias, lin2, lin2_bias):
    return x.new_empty(_shape_out(x, conv1, lin1))


def _shape_out(x: Tensor, conv1: Tensor, lin1: Tensor | None) -> tuple[int, int, int, int]:
    batch, length, _, size = x.shape
    return batch, conv1.shape[0], length, size if lin1 is None else lin1.shape[0]


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
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the weights; empty where there is no weight or none is needed."""
    weights = (conv1, conv1_bias, conv2, conv2_bias, lin1, lin1_bias, lin2, lin2_bias)
    layers = Layers.of(*weights)
    d_x = x.new_empty(x.shape if need_x else 0)
    sums = layers.sums() if need_weights else []
    for rows, tokens in pieces(x, layers):
        part = grad[rows, :, tokens].transpose(0, 1)
        d_piece = layers.backward(x[rows, tokens], part, sums, need_x)
        if d_piece is not None:
            d_x[rows, tokens] = d_piece
    totals = [total for layer in sums for total in layer]
    totals += [None] * (len(weights) - len(totals))
    return d_x, *(  # type: ignore[return-value]
        x.new_empty(0)
        if total is None or weight is None
        else total.reshape(weight.shape).to(weight.dtype).contiguous()
        for weight, total in zip(weights, totals, strict=True)
    )


@_expand_backward.register_fake
def _(grad, x, *rest):
    *weights, need_x, need_weights = rest
    d_x = x.new_empty(x.shape if need_x else 0)
    return d_x, *(
        x.new_empty(0) if weight is None or not need_weights else x.new_empty(weight.shape)
        for weight in weights
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    saved = ctx.saved_tensors
    needed = ctx.needs_input_grad
    with no_autocast(grad.device):
        found = _expand_backward(grad, *saved, needed[0], any(needed[1:]))
    return tuple(d if need else None for d, need in zip(found, needed, strict=True))


_expand.register_autograd(_gradients, setup_context=_save)
