"""Products of float32 matrices on a CPU: torch's own, or oneDNN's where those are much faster.

On AMD processors the library behind `torch.mm` reaches half the speed of oneDNN's linear layer, which has no
public name for float32. It is tried once per process: it must give the right numbers and take at most three
quarters of the time, else `torch.mm` stays.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """`x y^T`, in `out` or in memory of its own.

    Args:
        x: (m, d), or (planes, m, d).
        y: (n, d), or (planes, n, d).
        out: (m, n), or (planes, m, n); may be left alone.

    Returns:
        The product, contiguous.
    """
    if _suits_onednn(x, y):
        return _onednn(x, y)
    return torch.matmul(x, y.mT, out=out)


def add_product(total: Tensor, x: Tensor, y: Tensor, *, fresh: bool = False) -> None:
    """Add `x y` to the total, or put it there.

    Args:
        total: (m, n), or (planes, m, n).
        x: (m, d), or (planes, m, d).
        y: (d, n), or (planes, d, n).
        fresh: whether to overwrite what is in `total`.
    """
    beta = 0 if fresh else 1
    if x.ndim == 3:
        total.baddbmm_(x, y, beta=beta)
    elif x.is_contiguous() and _suits_onednn(x, y):
        part = _onednn(x, y.t().contiguous())
        total.copy_(part) if fresh else total.add_(part)
    else:
        total.addmm_(x, y, beta=beta)


def _suits_onednn(x: Tensor, y: Tensor) -> bool:
    return (
        x.ndim == 2
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and y.is_contiguous()  # other strides end in a routine that is a hundred times slower
        and onednn_is_faster()
    )


def _onednn(x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's linear layer is there, right, and much faster than `torch.mm` on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 64, generator=generator) for n in (1024, 128))
    out = torch.empty(1024, 128)
    try:
        found = _onednn(x, y)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):  # private: any version may drop it
        return False
    exact = x.double() @ y.double().t()
    if found.shape != exact.shape or float((found - exact).abs().max()) > 1e-4:
        return False
    ours = _fastest(lambda: torch.mm(x, y.t(), out=out))
    return _fastest(lambda: _onednn(x, y)) < 0.75 * ours


def _fastest(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
