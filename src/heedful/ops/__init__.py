"""The maths as pure functions on tensors; needs torch and nothing else."""

from heedful.ops.rope import rope
from heedful.ops.sas import aggregate_heads, simulate_features, simulate_heads
from heedful.ops.selective import memory_share, selective_attention, unmasked_count

__all__ = [
    "aggregate_heads",
    "memory_share",
    "rope",
    "selective_attention",
    "simulate_features",
    "simulate_heads",
    "unmasked_count",
]
