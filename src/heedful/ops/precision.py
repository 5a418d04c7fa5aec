"""The precision of sums and softmax, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from heedful.ops.compiling import constant_result


def wide_dtype(x: Tensor) -> torch.dtype:
    """What votes, sums and softmax of `x` are computed in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


@constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)  # torch 2.11 cannot trace it


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off inside an operation that chooses its own precision."""
    if not _has_autocast(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def to_autocast_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast to the autocast dtype where autocast is on, as torch does for its own attention."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor | None) -> Tensor | None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(dtype)

    return tuple(map(cast, tensors))


def drop_denormals(weights: Tensor) -> Tensor:
    """Weights with those that are lost in rounding as 0: denormal ones slow a product down many times."""
    return torch.threshold(weights, 2.0**30 * torch.finfo(weights.dtype).tiny, 0.0)
