"""Who may look at whom: causality, padding and packed segments, as boolean tensors."""

import torch
from torch import Tensor


def visible_keys(
    n_queries: int,
    n_keys: int,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The keys each query may attend to.

    The last `n_queries` of the keys belong to the queries. A query sees the real keys up to its own, of
    its own segment; a padded query sees nothing.

    Args:
        n_queries: T.
        n_keys: S >= T.
        key_mask: (B, S) bool, False = padding, or None.
        segment_ids: (B, S) integers, or None.
        device: where to build the mask.

    Returns:
        (1 or B, T, S) bool.
    """
    key = torch.arange(n_keys, device=device)
    visible = (key <= key[n_keys - n_queries :, None])[None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, :] & key_mask[:, n_keys - n_queries :, None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, n_keys - n_queries :, None] == segment_ids[:, None, :])
    return visible


def rank_in_segment(
    n_keys: int, key_mask: Tensor | None, segment_ids: Tensor | None, device: torch.device
) -> Tensor:
    """How many real keys of the same row and segment come before each key.

    This is the position of a token in its own sequence, and rank 0 marks the first real token of it.
    Padding gets the rank a real token would have in its place.

    Returns:
        (1 or B, S) int64.
    """
    if key_mask is None and segment_ids is None:
        return torch.arange(n_keys, device=device)[None]
    if segment_ids is None:
        assert key_mask is not None
        return key_mask.long().cumsum(-1) - key_mask.long()
    real = torch.ones_like(segment_ids) if key_mask is None else key_mask.long()
    # Equal ids need not be neighbours, so sort them together; a stable sort keeps their order.
    ids, order = segment_ids.sort(dim=-1, stable=True)
    real = real.gather(-1, order)
    before = real.cumsum(-1) - real
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    base = torch.where(starts, before, 0).cummax(-1).values
    return torch.empty_like(order).scatter_(-1, order, before - base)


def voted_keys(visible: Tensor, rank: Tensor) -> Tensor:
    """The keys a query may vote on: those it sees, but neither itself nor the first real one.

    Args:
        visible: (1 or B, T, S) bool, from `visible_keys`.
        rank: (1 or B, S), from `rank_in_segment`.

    Returns:
        (1 or B, T, S) bool.
    """
    n_queries, n_keys = visible.shape[-2:]
    key = torch.arange(n_keys, device=visible.device)
    itself = key == key[n_keys - n_queries :, None]
    return visible & ~itself & (rank > 0)[:, None, :]
