"""One decoding step of selective attention over a cache of unordered slots."""

import torch
from torch import Tensor

from heedful.ops.precision import no_autocast, to_autocast_dtype, wide_dtype


def least_needed_slot(priority: Tensor, positions: Tensor) -> Tensor:
    """The slot that the next token may overwrite: the highest priority, the oldest among equals.

    Slot 0 holds the first real token and is never chosen.

    Args:
        priority: (B, C), finite.
        positions: (B, C) integers.

    Returns:
        (B, 1) int64.
    """
    rated, age = priority[:, 1:], positions[:, 1:]
    # Ties are common, relu gives exact zeros.
    oldest = age.masked_fill(rated != rated.amax(-1, keepdim=True), torch.iinfo(age.dtype).max)
    return oldest.argmin(-1, keepdim=True) + 1


def attend_slots(q: Tensor, k: Tensor, v: Tensor, soft_mask: Tensor, newest: Tensor, scale: float) -> Tensor:
    """Attend with the newest token, then add its votes to `soft_mask`, in place.

    The same numbers as `selective_attention` gives for its last query, in any order of the keys.

    Args:
        q: (B, H, 1, D).
        k: (B, G, C, D), every slot in use; slot 0 holds the first real token, which is never voted on.
        v: (B, G, C, E).
        soft_mask: (B, C), the votes against each slot so far; float32, float64 for float64 q.
        newest: (B, 1), the slot of the query's own token.
        scale: multiplies the logits.

    Returns:
        (B, H, 1, E), the dtype of v.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = to_autocast_dtype(q, k, v)  # type: ignore[assignment]
        with no_autocast(q.device):
            return attend_slots(q, k, v, soft_mask, newest, scale)
    batch, heads, _, size = q.shape
    groups, dtype = k.shape[1], wide_dtype(q)
    grouped = (q.to(dtype) * scale).view(batch, groups, heads // groups, size)
    logits = grouped @ k.to(dtype).transpose(-1, -2)  # (B, G, H / G, C)
    votes = logits[:, 0, 0].relu()
    out = logits.sub_(soft_mask[:, None, None]).softmax(-1) @ v.to(dtype)
    votes.scatter_(1, newest, 0.0)
    soft_mask[:, 1:].add_(votes[:, 1:])
    return out.view(batch, heads, 1, -1).to(v.dtype)
