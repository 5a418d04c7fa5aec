"""What the machine can do: its fastest matrix product and its fastest copy, measured."""

from dataclasses import dataclass

import torch

from heedful.bench.timing import interleaved

SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (8192, 512, 512), (2048, 64, 2048))  # rows, inner, columns
COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Ceilings:
    """Upper bounds for the threads and the precision they were measured with."""

    gemm: float
    """FLOP/s of the fastest product; a multiply-add is 2."""
    copy: float
    """Bytes/s read and written by a large copy."""
    gemm_shape: tuple[int, int, int]
    """Rows, inner size and columns of that product."""


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, *, shapes: tuple[tuple[int, int, int], ...] = SHAPES
) -> Ceilings:
    """Time products of a few shapes and one large copy; some 2 seconds on one core.

    Args:
        device: where to run.
        dtype: of the factors.
        shapes: rows, inner size and columns of the products to try.
    """

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    factors = {str(shape): (draw(shape[0], shape[1]), draw(shape[1], shape[2])) for shape in shapes}
    source = torch.zeros(COPY_BYTES // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    with torch.no_grad():
        products = {name: (lambda a=a, b=b: a @ b) for name, (a, b) in factors.items()}
        timings = interleaved({**products, "copy": lambda: target.copy_(source)}, turns=7, device=device)
    speeds = {
        shape: 2 * shape[0] * shape[1] * shape[2] / min(timings[str(shape)].samples) for shape in shapes
    }
    best = max(speeds, key=speeds.__getitem__)
    return Ceilings(speeds[best], 2 * COPY_BYTES / min(timings["copy"].samples), best)
