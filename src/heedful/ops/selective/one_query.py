"""Selective attention of one query over all keys so far, as two products: a step of decoding without a budget."""

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.ops.precision import drop_denormals, wide_dtype
from heedful.ops.selective.reference import per_head


def selective_one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: tuple[Tensor, Tensor, float] | None,
    soft_mask: Tensor | None,
    visible: Tensor | None,
    voted: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Same result as `selective_reference` for one query; shapes as there.

    No key is repeated for the heads that share it, and nothing but one row of logits per head is made.

    Args:
        q: (B, H, 1, D).
        k: (B, G, S, D).
        v: (B, G, S, E).
        select: queries (B, R, 1, D'), keys (B, R, S, D') and scale of the selection heads; None = head 0.
        soft_mask: (B, R, S - 1), or None.
        visible: (B, 1, S) bool, or None: all are.
        voted: (B, 1, S) bool, or None: all but the first and the newest.
        scale: multiplies the logits.
    """
    batch, heads, _, size = q.shape
    groups, n_keys, dtype = k.shape[1], k.shape[2], wide_dtype(q)
    grouped = (q.to(dtype) * scale).reshape(batch, groups, heads // groups, size)
    logits = (grouped @ k.to(dtype).mT).view(batch, heads, n_keys)
    if select is None:
        votes = logits[:, :1].relu()
    else:
        select_q, select_k, select_scale = select
        votes = ((select_q.to(dtype) * select_scale) @ select_k.to(dtype).mT)[:, :, 0].relu()
    if voted is None:
        inner = votes[..., 1:-1]
        votes = F.pad(inner, (1, 1)) if n_keys > 1 else torch.zeros_like(votes)
    else:
        votes = votes.masked_fill(~voted, 0.0)
    before = torch.zeros_like(votes) if soft_mask is None else F.pad(soft_mask.to(dtype), (0, 1))
    logits = logits - per_head(before, heads)
    if visible is None:
        weights = logits.softmax(-1)
    else:  # a query without any key gets 0, not NaN
        alive = visible.any(-1, keepdim=True)
        weights = logits.masked_fill(~visible & alive, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)
    out = drop_denormals(weights).view(batch, groups, heads // groups, n_keys) @ v.to(dtype)
    return out.view(batch, heads, 1, v.shape[-1]).to(v.dtype), before + votes
