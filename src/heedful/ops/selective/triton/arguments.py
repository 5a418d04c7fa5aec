"""What the kernels are given besides plain tensors: Triton takes named tuples apart."""

from typing import NamedTuple

from torch import Tensor


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


def in_heads(x: Tensor) -> Heads:
    """A (B, H, T, ·) tensor for a kernel; copied only where its features are not neighbours."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Heads(x, x.stride(0), x.stride(1), x.stride(2))


def in_slots(x: Tensor) -> Slots:
    """A (B, C) tensor for a kernel; copied only where its slots are not neighbours."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Slots(x, x.stride(0))
