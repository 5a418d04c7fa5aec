"""Whether the kernels can run some tensors, and why not."""

import importlib.util
import os

import torch
from torch import Tensor

from heedful.ops.compiling import constant_result

LARGEST = 128
AGREED_ON = (9, 0)
"""The compute capability of the GPU on which the kernels agreed with the formula (one H200; results/gpu)."""
AGREED = {(40, 40), (64, 64), (96, 64), (96, 96), (128, 128)}
"""D and E with which they did in 16 bits, with D' of both; in float32 those of every case did."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unavailable(q: Tensor, v: Tensor, select_q: Tensor | None = None) -> str | None:
    """Why `impl="triton"` cannot run these tensors, and what to do; None if it can.

    Args:
        q: (B, H, T, D).
        v: (B, G, S, E).
        select_q: (B, R, T, D') or None.
    """
    reason = _machine(q.device.type, q.device.index or 0)
    if reason:
        return reason
    if q.dtype not in DTYPES:
        return f"it takes float16, bfloat16 and float32, got {q.dtype}; use impl='sdpa'"
    for name, size in (("D", q), ("E", v), ("D'", select_q)):
        if size is not None and not 1 <= size.shape[-1] <= LARGEST:
            return f"it takes head sizes from 1 to {LARGEST}, got {name} = {size.shape[-1]}; use impl='sdpa'"
    if little_shared_memory(q.device):
        # There all kernels have one stage, with which a gradient at a head size of 128 was miscompiled elsewhere.
        largest = max(x.shape[-1] for x in (q, v, select_q) if x is not None)
        if largest > LARGEST // 2:
            return f"on this GPU it takes head sizes up to {LARGEST // 2}, got {largest}; use impl='sdpa'"
    if (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
        and torch.is_grad_enabled()
    ):
        return (
            "its gradient of the selection heads is summed in any order, and deterministic algorithms were "
            "asked for; use impl='sdpa', or torch.no_grad()"
        )
    return None


def trusted(q: Tensor, v: Tensor, select_q: Tensor | None = None) -> bool:
    """Whether `auto` takes the kernels: they run, and agreed with the formula in such a dtype, size and GPU.

    Shapes as in `unavailable`.
    """
    sizes = q.shape[-1], v.shape[-1]
    alike = select_q is None or {*sizes} == {select_q.shape[-1]}
    known = q.dtype == torch.float32 or (sizes in AGREED and alike)
    return (
        known
        and unavailable(q, v, select_q) is None
        and (q.device.type != "cuda" or _capability(q.device.index or 0) == AGREED_ON)
    )


@constant_result
def little_shared_memory(device: torch.device) -> bool:
    """Whether a block of threads of this GPU has some 99 kB of shared memory, not 163 or more."""
    if device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability in ((8, 6), (8, 9)) or capability[0] == 12


@constant_result
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@constant_result
def _machine(device: str, index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton, or use impl='blocked'"
    if device == "cuda":
        if torch.version.hip:
            return "it needs an NVIDIA GPU; use impl='sdpa'"
        capability = torch.cuda.get_device_capability(index)
        if capability < (8, 0):
            return f"it needs a GPU of compute capability 8.0, got {capability[0]}.{capability[1]}; use impl='sdpa'"
        return None
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"it needs an NVIDIA GPU, got tensors on {device}; use impl='blocked', or set TRITON_INTERPRET=1 before "
        "Python starts to try the kernels, slowly, on the CPU"
    )
