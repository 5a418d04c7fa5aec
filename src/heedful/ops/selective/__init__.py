"""Selective attention: `selective_attention`, and the soft count of its memory loss."""

from heedful.ops.selective.api import selective_attention, unmasked_count
from heedful.ops.selective.memory_loss import memory_share

__all__ = ["memory_share", "selective_attention", "unmasked_count"]
