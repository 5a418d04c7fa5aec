"""Selective attention, the formula itself (Leviathan et al., arXiv 2410.02703, section 3)."""

import torch
from torch import Tensor

from heedful.ops.dot_product import masked_softmax, repeat_kv
from heedful.ops.precision import wide_dtype


def soft_masks(select_logits: Tensor, soft_mask: Tensor | None, voted: Tensor) -> Tensor:
    """F before every query, and after the last one: the running sum of the votes.

    A vote is `S[i, j] = relu(L[i, j])` where query i may vote on key j; `F[i] = sum_{u < i} S[u]`:
    a vote affects later queries, never its own.

    Args:
        select_logits: (B, R, T, S), raw scaled logits of the selection heads.
        soft_mask: (B, R, S - T), votes already cast on the earlier keys, or None.
        voted: (1 or B, T, S) bool.

    Returns:
        (B, R, T + 1, S): row i is F for query i, row T what the next query would see.
    """
    # where, not a product: 0 * -inf would be NaN.
    votes = torch.where(voted[:, None], select_logits.relu(), 0.0)
    start = votes.new_zeros(*votes.shape[:2], 1, votes.shape[-1])
    if soft_mask is not None:
        new = votes.shape[-1] - soft_mask.shape[-1]
        start = torch.nn.functional.pad(soft_mask.to(votes.dtype), (0, new))[:, :, None]
    return torch.cat((start, votes), dim=-2).cumsum(-2)


def per_head(soft_mask: Tensor, n_heads: int) -> Tensor:
    """(B, R, ...) -> (B, 1 or H, ...): head h listens to selection head h * R // H."""
    selectors = soft_mask.shape[1]
    if selectors == 1:
        return soft_mask
    index = torch.arange(n_heads, device=soft_mask.device) * selectors // n_heads
    return soft_mask[:, index]


def selective_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: tuple[Tensor, Tensor, float] | None,
    soft_mask: Tensor | None,
    visible: Tensor,
    voted: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`softmax(L - F) v` and the final F; shapes as in `selective_attention`."""
    dtype = wide_dtype(q)
    n_heads = q.shape[1]
    logits = q.to(dtype) @ repeat_kv(k, n_heads).to(dtype).transpose(-1, -2) * scale
    select_logits = logits[:, :1]  # head 0
    if select is not None:
        select_q, select_k, select_scale = select
        select_logits = select_q.to(dtype) @ select_k.to(dtype).transpose(-1, -2) * select_scale
    masks = soft_masks(select_logits, soft_mask, voted)
    weights = masked_softmax(logits - per_head(masks[:, :, :-1], n_heads), visible[:, None])
    out = weights @ repeat_kv(v, n_heads).to(dtype)
    # A copy: a view in a cache would keep all T rows of F alive.
    return out.to(v.dtype), masks[:, :, -1].clone()
