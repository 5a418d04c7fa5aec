"""The expansion of SAS on one piece of the tokens, forward and backward, in layouts that need few copies.

Convolutions run channels-last, (tokens, 1, D, heads) in memory; the features are a matrix product whose rows are
heads x tokens, the order that attention reads. One transposition lies between the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.ops.precision import wide_dtype
from heedful.ops.sas.placing import Placement, place_backward, place_piece

PIECE = 2**18  # values of one intermediate result: 1 MB of float32 stay in the cache of a core


class Layer(NamedTuple):
    """A convolution or a matrix."""

    weight: Tensor
    bias: Tensor | None


class Sum(NamedTuple):
    """The gradients of a layer over the pieces so far, in the precision of sums."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: Layer) -> "Sum":
        def zeros(x: Tensor) -> Tensor:
            return torch.zeros_like(x, dtype=wide_dtype(x))

        return cls(zeros(layer.weight), None if layer.bias is None else zeros(layer.bias))

    def add(self, d_weight: Tensor, grad: Tensor) -> None:
        """Add a piece: the gradient of the weight, and (..., outputs) that of the output."""
        self.weight.add_(d_weight)
        if self.bias is not None:
            self.bias.add_(grad.flatten(0, -2).sum(0))


@dataclass(frozen=True)
class Layers:
    """The layers of an expansion."""

    conv1: Layer  # (Ĥ, H, 1, W), channels-last
    conv2: Layer  # (Ĥ, Ĥ, 1, W), channels-last
    features: tuple[Layer, Layer] | None

    @classmethod
    def of(
        cls,
        conv1: Tensor,
        conv1_bias: Tensor | None,
        conv2: Tensor,
        conv2_bias: Tensor | None,
        lin1: Tensor | None,
        lin1_bias: Tensor | None,
        lin2: Tensor | None,
        lin2_bias: Tensor | None,
    ) -> "Layers":
        features = None
        if lin1 is not None and lin2 is not None:
            features = Layer(lin1, lin1_bias), Layer(lin2, lin2_bias)
        conv1, conv2 = (
            conv[:, :, None].contiguous(memory_format=torch.channels_last) for conv in (conv1, conv2)
        )
        return cls(Layer(conv1, conv1_bias), Layer(conv2, conv2_bias), features)

    def sums(self) -> list[Sum]:
        """Zeros to add the gradients of the layers to, in order."""
        return [Sum.of(layer) for layer in (self.conv1, self.conv2, *(self.features or ()))]

    def forward(self, x: Tensor, placement: Placement, out: Tensor) -> None:
        """X (b, t, H, D) -> out (Ĥ, b, t, D̂), which is written."""
        hidden = _conv(_channels_last(x), self.conv1)
        wide = _token_rows(_conv(hidden.relu(), self.conv2).add_(hidden))
        if self.features is None:
            out.copy_(wide.view(out.shape))
            return
        lin1, lin2 = self.features
        hidden = F.linear(wide.flatten(0, 1), *lin1)
        refined = F.linear(hidden.relu(), *lin2).add_(hidden)
        place_piece(refined.view(out.shape), placement, out)

    def backward(
        self,
        x: Tensor,
        placement: Placement,
        grad: Tensor,
        sums: list[Sum],
        d_norm: Tensor | None,
        need_x: bool,
    ) -> Tensor | None:
        """Add to the gradients of the layers, and return that of x.

        Args:
            x: (b, t, H, D).
            placement: of these tokens.
            grad: (Ĥ, b, t, D̂), the gradient of the output.
            sums: gradients of the layers so far; empty if nobody wants them.
            d_norm: gradient of the gains so far, (D̂,), or None if nobody wants it.
            need_x: return the gradient of x.
        """
        rows = _channels_last(x)
        hidden = _conv(rows, self.conv1)
        active = hidden.relu()
        if self.features is None:
            d_wide = grad.reshape(grad.shape[0], -1, grad.shape[-1])  # (Ĥ, n, D)
        else:
            wide = _token_rows(_conv(active, self.conv2).add_(hidden))
            d_wide = _features_backward(wide, self.features, placement, grad, sums[2:], d_norm)
        d_out = _heads_last(d_wide)
        d_active = _conv_backward(active, self.conv2, d_out, sums[1:2], True)
        assert d_active is not None
        d_hidden = torch.ops.aten.threshold_backward(d_active, active, 0).add_(d_out)
        d_rows = _conv_backward(rows, self.conv1, d_hidden, sums[:1], need_x)
        return None if d_rows is None else d_rows[:, :, 0].view(x.shape)


def pieces(x: Tensor, layers: Layers) -> Iterator[tuple[slice, slice]]:
    """Cut the tokens of x (B, T, H, D): rows of the batch, and tokens of these rows."""
    batch, length, heads, size = x.shape
    wide = max(heads, layers.conv1.weight.shape[0]) * max(
        size, 1 if layers.features is None else layers.features[0].weight.shape[0]
    )
    fit = max(1, PIECE // wide)
    rows = max(1, fit // max(1, length))
    tokens = max(1, -(-length // max(1, -(-length // fit))))  # pieces of nearly one size
    for row in range(0, batch, rows):
        for token in range(0, length, tokens):
            yield slice(row, row + rows), slice(token, token + tokens)


def _channels_last(x: Tensor) -> Tensor:
    """(b, t, H, D) -> (b * t, H, 1, D) with the heads innermost in memory."""
    heads, size = x.shape[2:]
    return x.transpose(2, 3).reshape(-1, 1, size, heads).permute(0, 3, 1, 2)


# PyTorch transposes matrices several times faster than it permutes three axes.


def _token_rows(x: Tensor) -> Tensor:
    """(n, Ĥ, 1, D) with the heads innermost -> (Ĥ, n, D)."""
    n, heads, _, size = x.shape
    return x.permute(0, 2, 3, 1).reshape(-1, heads).t().contiguous().view(heads, n, size)


def _heads_last(x: Tensor) -> Tensor:
    """(Ĥ, n, D) -> (n, Ĥ, 1, D) with the heads innermost."""
    heads, n, size = x.shape
    return x.reshape(heads, -1).t().contiguous().view(n, 1, size, heads).permute(0, 3, 1, 2)


def _conv(rows: Tensor, layer: Layer) -> Tensor:
    return F.conv2d(rows, *layer, padding=(0, layer.weight.shape[-1] // 2))


def _conv_backward(x: Tensor, layer: Layer, grad: Tensor, sums: list[Sum], need_x: bool) -> Tensor | None:
    """The gradient of x if needed; those of weight and bias are added to `sums`, where there is one."""
    padding, wanted = [0, layer.weight.shape[-1] // 2], [need_x, bool(sums), False]
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, layer.weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, wanted
    )
    for total in sums:
        total.add(d_weight, grad.permute(0, 2, 3, 1))
    return d_x


def _features_backward(
    wide: Tensor,
    layers: tuple[Layer, Layer],
    placement: Placement,
    grad: Tensor,
    sums: list[Sum],
    d_norm: Tensor | None,
) -> Tensor:
    """The gradient of wide (Ĥ, n, D) from that of the output (Ĥ, b, t, D̂)."""
    lin1, lin2 = layers
    rows = wide.flatten(0, 1)
    hidden = F.linear(rows, *lin1)
    active = hidden.relu()
    x = None if placement.norm is None else F.linear(active, *lin2).add_(hidden).view(grad.shape)
    grad = place_backward(x, placement, grad, d_norm).to(rows.dtype).reshape(hidden.shape)
    d_hidden = torch.ops.aten.threshold_backward(grad @ lin2.weight, active, 0).add_(grad)
    if sums:
        sums[0].add(d_hidden.t() @ rows, d_hidden)
        sums[1].add(grad.t() @ active, grad)
    return (d_hidden @ lin1.weight).view(wide.shape)
