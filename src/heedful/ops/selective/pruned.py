"""Selective attention of a block of queries over keys that are evicted as the votes go."""

from collections.abc import Callable

import torch
from torch import Tensor

from heedful.ops.precision import no_autocast, to_autocast_dtype, wide_dtype
from heedful.ops.selective.limits import Limits, few
from heedful.ops.selective.tiles import exclusive_sum

TILE = 2**19
"""Logits that are computed at once, 2 MB of float32: some heads by all keys."""


def attend_pruned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor | None,
    positions: Tensor,
    scale: float,
    evict: Callable[[Tensor], Tensor | None],
    select: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(L - F) v` over the keys that are left. No gradients.

    Votes do not depend on who was evicted, so F before every query comes first, then the evictions, then the
    attention of all heads. Keys whose votes leave them less than exp(-30) of any row's weight are left out of that
    (float64: exp(-60)). Extra memory is that of T rows of S logits for some heads.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D); the last T keys belong to the queries, the others stand in any order.
        v: (B, G, S, E).
        soft_mask: (B, 1, S - T) votes already cast on the first keys; None = none.
        positions: (B, S) position of each key among the real tokens of its row, -1 = padding or nothing.
        scale: multiplies the logits.
        evict: from F before every query, (B, T, S), to the index of the first query that no longer sees each
            key, (B, S) integers; None = all stay.
        select: queries (B, 1, T, D') and keys (B, 1, S, D') of a selection head; None: head 0.

    Returns:
        out (B, H, T, E) in the dtype of v, 0 at padding, and F after the last query, (B, 1, S).

    Source: Leviathan, Kalman, Matias, arXiv 2410.02703, section 4.
    """
    select_q, select_k = select or (q[:, :1], k[:, :1])
    q, k, v, select_q, select_k = to_autocast_dtype(q, k, v, select_q, select_k)  # type: ignore[assignment]
    with no_autocast(q.device):
        return _attend(q, k, v, select_q, select_k, soft_mask, positions, scale, evict)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor,
    select_k: Tensor,
    soft_mask: Tensor | None,
    positions: Tensor,
    scale: float,
    evict: Callable[[Tensor], Tensor | None],
) -> tuple[Tensor, Tensor]:
    batch, _, length, size = q.shape
    groups, n_keys, dtype = k.shape[1], k.shape[2], wide_dtype(q)
    q, k, v_wide = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    own, real = slice(n_keys - length, n_keys), positions[:, n_keys - length :, None] >= 0
    padded = not bool(real.all())

    votes = (select_q[:, 0].to(dtype) * scale @ select_k[:, 0].to(dtype).mT).relu_()
    votes[..., own].tril_(-1)
    votes *= (positions > 0).to(dtype)[:, None]
    if padded:
        votes.masked_fill_(~real, 0.0)
    start = votes.new_zeros(batch, n_keys)
    if soft_mask is not None:
        start[:, : soft_mask.shape[-1]] = soft_mask[:, 0]
    masks = exclusive_sum(votes[:, None], start[:, None])[:, 0]
    after = masks[:, -1] + votes[:, -1]

    gone_at = evict(masks)
    last = torch.full_like(positions, length) if gone_at is None else gone_at
    last = last.masked_fill(positions < 0, 0)

    # heads that share a key head become rows of one product; a projection gives them apart from each other
    grouped = q.reshape(batch, groups, -1, size)
    limits = Limits.of(q, k, start)
    needed = (~(start >= limits.largest_mask) & (last > 0)).any(0)  # a NaN leaves nothing out
    needed[own] = True
    columns = needed.nonzero()[:, 0]
    if few(columns.numel(), n_keys):
        k, v_wide, masks = (x.index_select(2, columns) for x in (k, v_wide, masks))
        last = last.index_select(1, columns)
    query = torch.arange(length, dtype=dtype, device=q.device)[:, None]
    seen = (last.to(dtype)[:, None] - query).clamp_(0.0, 1.0)
    seen[..., -length:].tril_()
    if limits.bounded:
        limits.cut_off(masks, after)
    else:
        masks.masked_fill_(seen == 0, torch.inf)

    outs = []
    together = max(1, TILE // max(1, batch * grouped.shape[2] * k.shape[2]))  # key heads in a core's cache
    for at in range(0, groups, together):
        part = slice(at, at + together)
        logits = grouped[:, part] @ k[:, part].mT
        weights = logits.view(batch, -1, length, k.shape[2]).sub_(masks[:, None])
        if not limits.bounded:
            weights.sub_(weights.amax(-1, keepdim=True)).clamp_(min=-limits.margin)
        weights.exp_().mul_(seen[:, None])
        total = weights.sum(-1, keepdim=True)
        product = weights.view(logits.shape) @ v_wide[:, part]
        outs.append(product.view(batch, -1, length, v.shape[-1]).div_(total))
    out = torch.cat(outs, dim=1)
    if padded:
        out.masked_fill_(~real[:, None], 0.0)
    return out.to(v.dtype), after[:, None]
