"""What a selection head learns from, layer by layer: the attention that later queries will pay to each key.

For query i the target is the attention that i and all later queries pay to a key, summed over the heads that share
the selector, as a distribution over the keys that may be evicted by then. The prediction is softmax(-F), so that F
becomes the logarithm of the attention still to come, up to a constant. The loss is their KL. It needs the layer's
own queries, keys and input, nothing from other layers, and no threshold for when a token counts as dead.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heedful.attention.score import Select
from heedful.ops.dot_product import repeat_kv
from heedful.ops.precision import no_autocast, wide_dtype

EVERY = 16
"""One query in so many is a target."""
_TOGETHER = 256  # queries whose weights are in memory at once


def local_loss(
    q: Tensor,
    k: Tensor,
    select: Select,
    scale: float,
    own_votes: Tensor | None = None,
    *,
    grace: int = 1,
    first: int = 1,
    softcap: float | None = None,
) -> Tensor:
    """The mean KL of softmax(-F) to the attention to come, nats; gradients reach the selection alone.

    Args:
        q: (B, H, T, D), T >= 5 * EVERY.
        k: (B, G, T, D).
        select: queries and keys of the selection heads, (B, R, T, D') both; R = 1 or G.
        scale: multiplies the logits of both.
        own_votes: (B, R, T), what F begins with; None: 0.
        grace: the newest tokens that never go.
        first: the first tokens that never go.
        softcap: what the attention draws its logits into; None: nothing.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: for too short a text.
    """
    assert select is not None
    blocks = q.shape[2] // EVERY
    if blocks < 5:
        raise ValueError(f"a text to learn from has {5 * EVERY} tokens or more, got {q.shape[2]}")
    with no_autocast(q.device):
        to_come = attention_to_come(q, k, scale, select[0].shape[1], softcap)
        F = checkpoint(votes_before, *select, scale, use_reentrant=False)
        if own_votes is not None:
            F = F + own_votes[:, :, None]
    # the very first queries have nobody to lose, the last ones too little future
    targets = slice(3, blocks - 2)
    queries = torch.arange(blocks, device=q.device)[targets] * EVERY
    keys = torch.arange(q.shape[2], device=q.device)
    may_go = (keys <= queries[:, None] - grace) & (keys >= first)
    queries_left = may_go.any(-1)
    target = to_come[:, :, targets].masked_fill(~may_go, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    predicted = (-F[:, :, targets]).masked_fill(~may_go, -torch.inf)[:, :, queries_left].log_softmax(-1)
    target = target[:, :, queries_left]
    pieces = torch.nn.functional.kl_div(predicted.masked_fill(target == 0, 0.0), target, reduction="none")
    return pieces.sum(-1).mean()


@torch.no_grad()
def attention_to_come(
    q: Tensor, k: Tensor, scale: float, selectors: int, softcap: float | None = None
) -> Tensor:
    """The attention that query i and all later ones pay to each key, summed over heads, for every EVERY-th i.

    Args:
        q: (B, H, T, D).
        k: (B, G, T, D).
        scale: multiplies the logits.
        selectors: R; each sums over H / R heads, in order.
        softcap: what the attention draws its logits into; None: nothing.

    Returns:
        (B, R, T // EVERY, T), float32 or wider; what queries after the last whole block pay does not count.
    """
    length, dtype = q.shape[2] // EVERY * EVERY, wide_dtype(q)
    k = repeat_kv(k, q.shape[1])
    paid = []
    for start in range(0, length, _TOGETHER):
        stop = min(start + _TOGETHER, length)
        logits = q[:, :, start:stop].to(dtype) @ k[:, :, :stop].to(dtype).mT * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        later = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
        weights = logits.masked_fill_(later, -torch.inf).softmax(-1)
        summed = weights.unflatten(1, (selectors, -1)).sum(2).unflatten(2, (-1, EVERY)).sum(3)
        paid.append(torch.nn.functional.pad(summed, (0, q.shape[2] - stop)))
    return torch.cat(paid, 2).flip(2).cumsum(2).flip(2)


def votes_before(select_q: Tensor, select_k: Tensor, scale: float) -> Tensor:
    """F before every EVERY-th query, from the logits of selection heads.

    Args:
        select_q: (B, R, T, D').
        select_k: (B, R, T, D').
        scale: multiplies the logits.

    Returns:
        (B, R, T // EVERY, T), float32 or wider.
    """
    length, dtype = select_q.shape[2] // EVERY * EVERY, wide_dtype(select_q)
    cast = []
    for start in range(0, length, _TOGETHER):
        stop = min(start + _TOGETHER, length)
        logits = select_q[:, :, start:stop].to(dtype) @ select_k[:, :, :stop].to(dtype).mT * scale
        earlier = torch.ones(stop - start, stop, dtype=torch.bool, device=logits.device).tril(start - 1)
        earlier[:, 0] = False
        votes = logits.relu().masked_fill(~earlier, 0.0).unflatten(2, (-1, EVERY)).sum(3)
        cast.append(torch.nn.functional.pad(votes, (0, select_q.shape[2] - stop)))
    votes = torch.cat(cast, 2)
    return votes.cumsum(2) - votes
