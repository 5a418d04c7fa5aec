"""Initialisation that leaves already loaded weights alone."""

import math

import torch
from torch import Tensor


def fill_(weight: Tensor, value: Tensor) -> None:
    """Copy `value` into a parameter.

    Model loaders mark the parameters that a checkpoint has already filled and guard `torch.nn.init`
    with that mark; a plain copy must respect it too, or a reload would silently reset the weights.
    """
    if not getattr(weight, "_is_hf_initialized", False):
        with torch.no_grad():
            weight.copy_(value)


def zero_sum(copies: int, shape: tuple[int, int, int]) -> Tensor:
    """Random weights (copies, heads, in, W) by which copies of heads start apart; their sum over copies is zero.

    Copies that are alike in everything get equal gradients and stay alike for ever. With these amounts added to
    what makes their values, the mean of their outputs stays what it was, and their gradients differ. They are whole
    numbers up to 256, which bfloat16 and float16 hold, times a power of two, such that values come out about as
    large as they went in.
    """
    numbers = (45 * torch.randn(copies, *shape)).round().clamp(-128, 128)
    numbers = numbers - numbers.roll(1, 0)  # about 64 large, none beyond 256
    return numbers * 2.0 ** round(-math.log2(64 * (shape[1] * shape[2]) ** 0.5))
