"""Who goes when, in a block of queries, by a policy that has to see what each of them did."""

import torch
from torch import Tensor

from heedful.attention.eviction.policy import Policy
from heedful.attention.score import EvictableScore
from heedful.ops.eviction import Rule


def paid_attention(score: EvictableScore, logits: Tensor, visible: Tensor) -> Tensor:
    """What a policy sees of one query, (B, H, S): the sizes of its weights; where heads mix, some are below 0."""
    return score.weights(logits, visible).abs()


def observed_departures(
    rule: Rule,
    policy: Policy,
    score: EvictableScore,
    scores: Tensor,
    positions: Tensor,
    length: int,
    logits: Tensor | None,
    keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The query before which each token is evicted, as `Rule.evict` does one query after the other.

    Args:
        rule: when tokens go; it has a budget or a window.
        policy: one that needs weights or keys.
        score: what makes weights of the logits.
        scores: (B, S) or (B, N, S), before the first query.
        positions: (B, S) position of each token in its row, -1 = padding or none.
        length: T; the last T tokens are the queries' own.
        logits: (B, H, T, S), for a policy that needs weights.
        keys: (B, G, S, D), for a policy that needs keys.

    Returns:
        (B, S) int64, the index of the first query that no longer sees the token, T if it stays; the scores
        after the last query.
    """
    budget, before = rule.budget or 0, positions.shape[1] - length
    held = positions >= 0
    alive = held.clone()
    alive[:, before:] = False
    gone_at = torch.full_like(positions, length)
    due = [False] * length
    if rule.window is not None:
        due = [True] * length  # it moves on with every query
    elif positions.shape[1] > budget:  # else nobody can go, and the device need not be asked
        due = rule.due(positions[:, before:].reshape(-1, 1)).view(-1, length).any(0).tolist()
    for t in range(length):
        newest = positions[:, before + t, None]
        earlier = alive.clone()
        alive[:, before + t] = held[:, before + t]
        if due[t]:
            if policy.needs_keys:
                assert keys is not None
                scores = policy.rate(keys, earlier)
            priority = policy.priority(scores, positions.masked_fill(~earlier, -1), newest, budget)
            left = rule.evict(alive, priority, positions, newest)
            gone_at.masked_fill_(alive & ~left, t)
            alive = left
        if policy.needs_weights:
            assert logits is not None
            visible = alive & (newest >= 0)
            weights = paid_attention(score, logits[:, :, t], visible[:, None])
            updated = policy.update(scores, weights, newest).to(scores.dtype)
            seen = visible if scores.ndim == 2 else visible[:, None]
            scores = torch.where(seen, updated, scores)
    return gone_at, scores
