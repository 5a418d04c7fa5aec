"""Selective attention by Triton kernels, for NVIDIA GPUs. Triton is imported where a kernel is first needed."""

from heedful.ops.selective.triton.available import unavailable
from heedful.ops.selective.triton.op import selective_triton
from heedful.ops.selective.triton.slots import attend_slots_triton

__all__ = ["attend_slots_triton", "selective_triton", "unavailable"]
