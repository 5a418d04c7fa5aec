"""Selective attention of a block of queries over keys that are evicted as the votes go."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.ops.precision import no_autocast, to_autocast_dtype, wide_dtype
from heedful.ops.selective.tiles import LOG2_E, TILE, exclusive_sum, exp2_


def attend_pruned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor | None,
    positions: Tensor,
    scale: float,
    evict: Callable[[Tensor], Tensor | None],
) -> tuple[Tensor, Tensor]:
    """`softmax(L - F) v` over the keys that are left, head 0 selecting. No gradients.

    Votes do not depend on who was evicted, so F before every query comes first, then the evictions, then the
    attention of all heads. Extra memory is that of T rows of S logits for some heads.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D); the last T keys belong to the queries, the others stand in any order.
        v: (B, G, S, E).
        soft_mask: (B, 1, S - T) votes already cast on the first keys; None = none.
        positions: (B, S) position of each key among the real tokens of its row, -1 = padding or nothing.
        scale: multiplies the logits.
        evict: from F before every query, (B, T, S), to the index of the first query that no longer sees each
            key, (B, S) integers; None = all stay.

    Returns:
        out (B, H, T, E) in the dtype of v, 0 at padding, and F after the last query, (B, 1, S).

    Source: Leviathan, Kalman, Matias, arXiv 2410.02703, section 4.
    """
    q, k, v = to_autocast_dtype(q, k, v)  # type: ignore[assignment]
    with no_autocast(q.device):
        return _attend(q, k, v, soft_mask, positions, scale, evict)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor | None,
    positions: Tensor,
    scale: float,
    evict: Callable[[Tensor], Tensor | None],
) -> tuple[Tensor, Tensor]:
    batch, _, length, size = q.shape
    groups, n_keys, dtype = k.shape[1], k.shape[2], wide_dtype(q)
    q, k, values = q.to(dtype) * (scale * LOG2_E), k.to(dtype).transpose(-1, -2), v.to(dtype)
    grouped = q.view(batch, groups, -1, size)  # heads that share a key head become rows of one product
    together = max(1, TILE // max(1, batch * grouped.shape[2] * n_keys))  # key heads in a core's cache
    parts = [slice(at, at + together) for at in range(0, groups, together)]

    logits = grouped[:, parts[0]] @ k[:, parts[0]]
    padding = positions[:, n_keys - length :, None] < 0
    votes = logits[:, 0, :length].relu()
    votes[..., n_keys - length :].tril_(-1)
    votes *= ((positions > 0).to(dtype) * (1 / LOG2_E))[:, None]
    votes.masked_fill_(padding, 0.0)
    masks, after = exclusive_sum(votes[:, None])[:, 0], votes.sum(1)
    if soft_mask is not None:
        start = F.pad(soft_mask[:, 0].to(dtype), (0, length))
        masks += start[:, None]
        after += start
    gone_at = evict(masks)

    masks *= LOG2_E
    last = torch.full_like(positions, length) if gone_at is None else gone_at
    last = last.masked_fill(positions < 0, 0).int()
    query = torch.arange(length, dtype=torch.int32, device=q.device)[:, None]
    masks.masked_fill_(query >= last[:, None], torch.inf)
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
    masks[..., n_keys - length :].masked_fill_(later, torch.inf)
    masks.masked_fill_(padding, 0.0)  # a row that saw nothing would be NaN

    outs = []
    for part in parts:
        if part is not parts[0]:
            logits = grouped[:, part] @ k[:, part]
        tile = logits.view(batch, -1, length, n_keys).sub_(masks[:, None])
        weights = exp2_(tile.sub_(tile.amax(-1, keepdim=True)))
        total = weights.sum(-1, keepdim=True)
        product = weights.view(logits.shape) @ values[:, part]
        outs.append(product.view(batch, -1, length, v.shape[-1]).div_(total))
    out = torch.cat(outs, dim=1).masked_fill_(padding[:, None], 0.0)
    return out.to(v.dtype), after[:, None]
