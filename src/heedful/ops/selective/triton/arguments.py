"""What the kernels are given besides plain tensors: Triton takes named tuples apart."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Heads(NamedTuple):
    """A tensor (B, H, T, ·) whose features are neighbours; batch, heads and tokens may lie anywhere."""

    data: Tensor
    batch: int
    """The stride of the first axis, in elements."""
    head: int
    row: int


class Slots(NamedTuple):
    """A tensor (B, C), whose rows may lie anywhere."""

    data: Tensor
    batch: int


class Counts(NamedTuple):
    """How many there are of everything."""

    length: int
    """T."""
    n_keys: int
    """S."""
    n_blocks: int
    """Blocks of queries."""
    heads: int
    groups: int
    """Key heads."""
    selectors: int


class Scales(NamedTuple):
    """What logits are multiplied by."""

    logits: float
    select: float


ALIGNED = 16
"""Elements that features and rows of half precision are aligned to, and bytes that their addresses are.

With head sizes of 40 the kernels ran into illegal memory accesses on an H200 (Triton 3.6; results/gpu), in float16
and bfloat16, and agreed with the formula in float32, and in 16 bits with 64, 96 and 128.
"""


def in_sixteens(x: Tensor) -> Tensor:
    """Zeros behind the features, up to a multiple of 16: they change no product."""
    return x if x.shape[-1] % ALIGNED == 0 else F.pad(x, (0, -x.shape[-1] % ALIGNED))


def in_heads(x: Tensor) -> Heads:
    """A (B, H, T, ·) tensor for a kernel; copied where its features are no neighbours, or rows are not aligned."""
    if x.stride(-1) != 1 or (x.element_size() == 2 and not _aligned(x)):
        x = x.clone(memory_format=torch.contiguous_format)
    return Heads(x, x.stride(0), x.stride(1), x.stride(2))


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % ALIGNED == 0 and all(
        stride % ALIGNED == 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1
    )


def in_slots(x: Tensor) -> Slots:
    """A (B, C) tensor for a kernel; copied only where its slots are not neighbours."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Slots(x, x.stride(0))
