"""The heads of SAS as matrix products, for GPUs.

cuDNN's convolutions are made for images, with many channels: for the few that heads are, the gradient of the
weights alone took a third of a training step of a model of 23 M parameters on an H200 (results/gpu), and each
convolution turns its input around. As a matrix product over heads and taps heads stay where attention reads them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.ops.sas.steps import check_head_weights


def simulate_heads_unfolded(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    """What `simulate_heads` computes, with the same arguments."""
    check_head_weights(x, weight1, bias1, weight2, bias2)
    wide = _conv(x, weight1, bias1)
    return wide + _conv(wide.relu(), weight2, bias2)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X (B, H, T, D), weight (Ĥ, H, W) -> (B, Ĥ, T, D)."""
    batch, heads, length, size = x.shape
    width = weight.shape[-1]
    taps = x.flatten(2)
    if width > 1:
        padded = F.pad(x, (width // 2, width // 2))
        neighbours = [padded[..., tap : tap + size] for tap in range(width)]
        taps = torch.stack(neighbours, dim=2).reshape(batch, heads * width, length * size)
    # One product per row: the gradient of the weights is a sum over rows, each of which is a product of its own.
    rows = weight.flatten(1).expand(batch, -1, -1)
    out = torch.bmm(rows, taps) if bias is None else torch.baddbmm(bias[:, None], rows, taps)
    return out.view(batch, len(weight), length, size)
