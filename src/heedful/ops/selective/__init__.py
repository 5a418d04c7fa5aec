"""Selective attention: `selective_attention` and the soft count of its memory loss."""

from heedful.ops.selective.api import selective_attention, unmasked_count

__all__ = ["selective_attention", "unmasked_count"]
