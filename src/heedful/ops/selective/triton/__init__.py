"""Selective attention by Triton kernels, for NVIDIA GPUs. Triton is imported where a kernel is first needed."""

from heedful.ops.selective.triton.available import unavailable
from heedful.ops.selective.triton.op import selective_triton

__all__ = ["selective_triton", "unavailable"]
