"""The one eviction rule, for prefill, decode and evaluation alike.

At every query: the token arrives; if more real tokens are held than the budget allows, those with the highest
priority are evicted, never the first real token of the row nor the newest, the oldest among equals; then the
query attends; then its votes count.
"""

import torch
from torch import Tensor


def evict(
    alive: Tensor, priority: Tensor, positions: Tensor, newest: Tensor, budget: int, times: int, due: Tensor
) -> Tensor:
    """Evict until at most `budget` tokens are held.

    Args:
        alive: (B, S) bool, the tokens held, the newest included.
        priority: (B, S), highest goes first.
        positions: (B, S) position of each token in its row, the first real token has 0.
        newest: (B, 1) position of the newest token.
        budget: tokens that may be held, at least 2.
        times: evictions that can be necessary at most.
        due: (B,) bool, the rows that evict now.

    Returns:
        (B, S) bool, what is left.
    """
    movable = (positions > 0) & (positions != newest)
    for _ in range(times):
        over = (alive.sum(-1) > budget) & due
        candidates = alive & movable
        rated = priority.masked_fill(~candidates, -torch.inf)
        # Ties are common, relu gives exact zeros: among the highest take the lowest position.
        tied = candidates & (rated == rated.amax(-1, keepdim=True))
        age = positions.masked_fill(~tied, torch.iinfo(positions.dtype).max)
        victim = age.argmin(-1, keepdim=True)
        dropped = torch.zeros_like(alive).scatter_(-1, victim, True)
        alive = alive & ~(dropped & over[:, None])
    return alive


def check_budget(budget: object, evict_every: object = 1) -> None:
    """Raise unless the budget holds at least the first token and the newest."""
    for name, value, least in (("budget", budget, 2), ("evict_every", evict_every, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            why = " (the first token and the newest are never evicted)" if name == "budget" else ""
            raise ValueError(f"{name} must be a whole number >= {least}{why}, got {value!r}")


def eviction_mask(
    votes: Tensor, budget: int, *, evict_every: int = 1, key_mask: Tensor | None = None
) -> Tensor:
    """The keys each query attends to when tokens are evicted by their votes: evaluation in parallel.

    Args:
        votes: (B, T, T), S of query i on key j; what is above or on the diagonal does not matter.
        budget: tokens held at most while a query attends, the first and the newest included; >= 2.
        evict_every: evict only at real-token positions divisible by it; up to budget + evict_every - 1 tokens
            are held in between.
        key_mask: (B, T) bool, False = padding, which never arrives and attends to nothing.

    Returns:
        (B, T, T) bool.

    Raises:
        ValueError: for a budget below 2, an `evict_every` below 1, or shapes that do not fit.
    """
    check_budget(budget, evict_every)
    if votes.ndim != 3 or votes.shape[1] != votes.shape[2]:
        raise ValueError(f"votes must have shape (B, T, T), got {tuple(votes.shape)}")
    batch, length, _ = votes.shape
    if key_mask is not None and (key_mask.shape != (batch, length) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be bool of shape (B, T) = {(batch, length)}, got {key_mask.dtype} "
            f"{tuple(key_mask.shape)}"
        )
    real = torch.ones(batch, length, dtype=torch.bool, device=votes.device) if key_mask is None else key_mask
    positions = real.long().cumsum(-1) - 1
    alive, soft_mask = torch.zeros_like(real), torch.zeros_like(votes[:, 0])
    earlier = torch.ones(length, length, dtype=torch.bool, device=votes.device).tril(-1)
    rows = []
    for t in range(length):
        alive = alive.clone()
        alive[:, t] = real[:, t]
        newest = positions[:, t : t + 1]
        due = real[:, t] & (newest[:, 0] % evict_every == 0)
        alive = evict(alive, soft_mask, positions, newest, budget, evict_every, due)
        rows.append(alive & real[:, t, None])
        soft_mask = soft_mask + torch.where(real[:, t, None] & earlier[t], votes[:, t], 0.0)
    return torch.stack(rows, dim=1) if rows else votes.bool()
