"""How the kernels cut their work: chosen from registers and spills of the code compiled for sm_90.

`benchmarks/compile_triton.py` prints that report; `benchmarks/gpu.py` checks them on a GPU, times others, and its
summary holds the lines to replace here, whose entries are all there is to choose. **A tiling that has not passed
its part `check` on a GPU is not to be trusted**: on an H200, Triton 3.6 compiled the kernel `within_blocks` to
something else than was written in most tilings of half precision, some of them without an error (results/gpu). So
the gradient of the selection heads is computed in float32, where every case agreed: of half precision by products
in one TF32 pass, which holds its factors as they are. In half precision nothing else spills; that kernel does, and
was still the fastest of seven tilings that agreed. In float32, products in three TF32 passes hold each factor
twice, hence the small tiles; there that gradient spills, and a little that of the queries at 64.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Launch:
    """How one kernel is cut and compiled."""

    keys: int
    """Keys per tile."""
    warps: int = 4
    stages: int = 2
    heads: int = 1
    """Heads per program that share a tile of F."""
    span: int = 8
    """Tiles of keys per program, where a program does not take all of them."""
    rows: int = 32
    """Queries at a time, in the kernel that owns keys."""


@dataclass(frozen=True)
class Tiling:
    """One entry for each kernel, and the queries per block, which are the same for all of them."""

    block: int
    votes: Launch
    attend: Launch
    query: Launch
    key: Launch
    # The two of the gradient of the selection heads, which is computed in float32.
    selection: Launch = Launch(16, stages=1, span=1)
    later: Launch = Launch(16, stages=1)


# By the largest of the head sizes, padded to a power of two.
_UP_TO_64 = Tiling(
    block=64,
    votes=Launch(64),
    attend=Launch(32, stages=3, heads=2),
    query=Launch(32, stages=3, heads=2),
    key=Launch(64, rows=32),
)
_128 = Tiling(
    block=64,
    votes=Launch(64),
    attend=Launch(32, stages=3),
    query=Launch(16, stages=3),
    key=Launch(32, rows=32),
)
HALF = {16: _UP_TO_64, 32: _UP_TO_64, 64: _UP_TO_64, 128: _128}
_SINGLE = Tiling(
    block=16,
    votes=Launch(16),
    attend=Launch(16),
    query=Launch(16),
    key=Launch(16, warps=8, stages=1, rows=16),
)
SINGLE = {16: _SINGLE, 32: _SINGLE, 64: _SINGLE, 128: replace(_SINGLE, query=Launch(16, stages=1))}
# Float32 that holds half precision, for the gradient of the selection heads alone: one TF32 pass, larger tiles.
_WIDENED = replace(_SINGLE, block=64, selection=Launch(32, stages=1, span=1))
_WIDENED_128 = replace(_SINGLE, block=32, selection=Launch(32, stages=2, span=1))
WIDENED = {16: _WIDENED, 32: _WIDENED, 64: _WIDENED, 128: _WIDENED_128}


def decode(dtype: torch.dtype, *sizes: int) -> Launch:
    """How a decoding step is cut."""
    return Launch(32 if dtype == torch.float32 and padded_size(max(sizes)) == 128 else 64)


def padded_size(size: int) -> int:
    """The power of two, 16 or more, that a head size is padded to inside a kernel."""
    return max(16, 1 << (size - 1).bit_length())


def tiling(dtype: torch.dtype, *sizes: int, holds_half: bool = False) -> Tiling:
    """The tiling for inputs of some dtype and head sizes; `holds_half`: of float32 that holds 16 bits."""
    table = HALF if dtype != torch.float32 else WIDENED if holds_half else SINGLE
    return table[padded_size(max(sizes))]
