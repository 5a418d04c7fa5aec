"""Layers with a sliding window whose attention is ours: a query sees the last tokens alone.

Without a cache all tokens of a text attend at once, under a mask; with one the window is part of the stepwise rule,
beside the budget (`heedful.ops.eviction.Rule`).
"""

import torch
from torch import Tensor

from heedful.attention.score import EvictableScore
from heedful.attention.tokens import Layer, Tokens
from heedful.ops.masks import rank_in_segment, visible_keys, voted_keys


def attend_alone(layer: Layer, tokens: Tokens, window: int) -> Tensor:
    """`Tokens.attend_alone` where each query sees the last `window` tokens, its own included: (B, H, T, E).

    Each step of it is in memory for all pairs of tokens, in training as without.
    """
    score = layer.score
    assert isinstance(score, EvictableScore)
    k, v = layer.keys_values(tokens.memory)
    masks = tokens.key_mask, tokens.segment_ids
    rank = rank_in_segment(tokens.length, *masks, tokens.x.device)
    visible = visible_keys(tokens.length, tokens.length, *masks, tokens.x.device)
    visible = (visible & (rank[:, :, None] - rank[:, None] < window)).expand(tokens.x.shape[0], -1, -1)
    out, _ = score.attend(
        tokens.q,
        k,
        v,
        x=tokens.x,
        state={},
        visible=visible,
        voted=voted_keys(visible, rank),
        scale=layer.scale,
        **tokens.selection(tokens.memory),
    )
    return out


def masks_of(
    given: Tensor | None, batch: int, length: int, window: int
) -> tuple[Tensor | None, Tensor | None]:
    """The key mask (B, T) and segment ids (B, T) of the new tokens, from what transformers masks for a window.

    Args:
        given: (B, 1, T, S) bool, or numbers where what is below 0 is hidden; the last T keys are the queries' own.
        batch: B.
        length: T.
        window: the last tokens that a query sees, its own included.

    Raises:
        ValueError: for a mask that says anything else.
    """
    if given is None:
        return None, None
    if given.ndim == 2:
        return given[:, -length:].bool(), None
    seen = given[:, 0] if given.dtype == torch.bool else given[:, 0] >= 0
    if given.ndim != 4 or given.shape[1:3] != (1, length):
        raise ValueError(
            f"give a layer with a sliding window attention_mask (B, S), got {tuple(given.shape)}"
        )
    seen = seen[..., -length:]
    real = seen.diagonal(dim1=1, dim2=2)
    both = real[:, 1:] & real[:, :-1]
    starts = torch.nn.functional.pad(both & ~seen.diagonal(offset=-1, dim1=1, dim2=2), (1, 0))
    segment_ids = starts.long().cumsum(-1)
    key = torch.arange(length, device=given.device)
    expected = visible_keys(length, length, real, segment_ids, given.device)
    expected = expected & (key[:, None] - key < window)
    if not torch.equal(expected, seen & real[:, :, None]):
        raise ValueError(
            f"a layer with a sliding window of {window} attends causally, to real tokens of a document; this "
            f"attention_mask (B, 1, T, S) says otherwise: leave it out"
        )
    key_mask = None if bool(real.all()) else real.expand(batch, -1)
    return key_mask, segment_ids.expand(batch, -1) if bool(starts.any()) else None
