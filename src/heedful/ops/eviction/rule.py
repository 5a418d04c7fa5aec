"""The one eviction rule, for prefill, decode and evaluation alike.

At every query: the token arrives; tokens that a sliding window hides from it go; tokens whose priority exceeds the
threshold go; if more real tokens are held than the budget allows, those with the highest priority go too, the
oldest among equals; then the query attends; then its votes count. The first real tokens of the row and the newest,
one of each at least, go by a window alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.ops.checks import check_most

MOST = 2**48
"""Tokens that a rule may speak of: more than any text has, and sums of them fit the integers of a tensor."""


@dataclass(frozen=True)
class Rule:
    """When tokens go.

    Raises:
        ValueError: for a budget below `first + grace`; an `evict_every`, `grace`, `first` or `window` below 1; a
            threshold that is not a finite number greater than 0; none of budget, threshold and window.
    """

    budget: int | None
    """Tokens held at most while a query attends, those that never go included; None = no bound."""
    evict_every: int = 1
    """Evict only at positions divisible by it; up to evict_every - 1 more tokens are held in between."""
    threshold: float | None = None
    """Tokens whose priority exceeds it go at once; None = only the budget evicts."""
    grace: int = 1
    """The newest tokens that never go, the one that has just arrived included."""
    first: int = 1
    """The first tokens that never go."""
    window: int | None = None
    """A query sees the last so many tokens, its own included, as in a layer with a sliding window: who is older
    goes at once, even the first. None = no window."""

    def __post_init__(self) -> None:
        if self.budget is None and self.threshold is None and self.window is None:
            raise ValueError("give a budget, a threshold, or both; without either nothing is ever evicted")
        for name in ("evict_every", "grace", "first"):
            check_count(name, getattr(self, name))
        if self.window is not None:
            check_count("window", self.window)
        if self.budget is not None:
            check_budget(self.budget, self.grace, self.first)
        check_threshold(self.threshold)

    @property
    def n_slots(self) -> int | None:
        """Tokens that can be held at once; None = no bound."""
        slots = None if self.budget is None else self.budget + self.evict_every - 1
        bounds = [bound for bound in (slots, self.window) if bound is not None]
        return min(bounds, default=None)

    @property
    def untouched(self) -> int:
        """Of so many tokens nobody ever goes, unless by a threshold."""
        return min((bound for bound in (self.budget, self.window) if bound is not None), default=0)

    def hidden(self, positions: Tensor, newest: Tensor) -> Tensor:
        """Which tokens the window hides from the newest one; (B, S) positions of both, or (B, 1) of the newest."""
        if self.window is None:
            return torch.zeros_like(positions, dtype=torch.bool)
        return (positions <= newest - self.window) & (newest >= 0)

    @property
    def plain(self) -> bool:
        """Whether the first token and the newest alone are safe."""
        return self.grace == 1 and self.first == 1

    def movable(self, positions: Tensor, newest: Tensor) -> Tensor:
        """Which tokens may go.

        Args:
            positions: (B, S) position of each token in its row, the first real token has 0; -1 = none.
            newest: (B, 1) position of the newest token.

        Returns:
            (B, S) bool.
        """
        return (positions >= self.first) & (positions <= newest - self.grace)

    def due(self, newest: Tensor) -> Tensor:
        """The rows whose newest token, (B, 1) positions with -1 for padding, is one that evicts: (B,) bool."""
        return (newest[:, 0] >= 0) & (newest[:, 0] % self.evict_every == 0)

    def evict(
        self, alive: Tensor, priority: Tensor, positions: Tensor, newest: Tensor, room: int = 0
    ) -> Tensor:
        """Evict what has to go.

        Args:
            alive: (B, S) bool, the tokens held.
            priority: (B, S), highest goes first.
            positions: (B, S) position of each token in its row, the first real token has 0.
            newest: (B, 1) position of the newest token, -1 where it is padding.
            room: tokens to make room for beside those in `alive`.

        Returns:
            (B, S) bool, what is left.
        """
        alive = alive & ~self.hidden(positions, newest)
        movable, due = self.movable(positions, newest), self.due(newest)
        if self.threshold is not None:
            alive = alive & ~(movable & (priority > self.threshold) & due[:, None])
        if self.budget is None:
            return alive
        for _ in range(min(self.evict_every, alive.shape[-1])):
            over = (alive.sum(-1) > self.budget - room) & due
            candidates = alive & movable
            rated = priority.masked_fill(~candidates, -torch.inf)
            # Ties are common, relu gives exact zeros: among the highest take the lowest position.
            tied = candidates & (rated == rated.amax(-1, keepdim=True))
            age = positions.masked_fill(~tied, torch.iinfo(positions.dtype).max)
            victim = age.argmin(-1, keepdim=True)
            dropped = torch.zeros_like(alive).scatter_(-1, victim, True)
            alive = alive & ~(dropped & over[:, None])
        return alive


def check_budget(budget: object, grace: int = 1, first: int = 1) -> None:
    """Raise unless the budget holds at least the tokens that never go."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= grace + first:
        check_most("budget", budget, MOST)
        return
    safe = "the first token and the newest are"
    if (grace, first) != (1, 1):
        safe = f"first={first} and grace={grace}: the first {first} tokens and the newest {grace} are"
    raise ValueError(
        f"budget must be a whole number >= {grace + first} ({safe} never evicted), got {budget!r}"
    )


def check_count(name: str, value: object) -> None:
    """Raise unless it is a whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    check_most(name, value, MOST)


def check_threshold(threshold: object) -> None:
    """Raise unless it is None or a finite number greater than 0."""
    if threshold is None:
        return
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be a finite number greater than 0, got {threshold!r}")


def eviction_mask(
    votes: Tensor,
    budget: int | None,
    *,
    evict_every: int = 1,
    threshold: float | None = None,
    grace: int = 1,
    first: int = 1,
    window: int | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The keys each query attends to when tokens are evicted by their votes: evaluation in parallel.

    Args:
        votes: (B, T, T), S of query i on key j; what is above or on the diagonal does not matter.
        budget: tokens held at most while a query attends, those that never go included; >= first + grace. None =
            only the threshold and the window evict.
        evict_every: evict only at real-token positions divisible by it; up to budget + evict_every - 1 tokens
            are held in between.
        threshold: a token whose summed votes exceed it goes, whatever the budget; > 0.
        grace: the newest tokens that never go, the one that has just arrived included.
        first: the first tokens that never go.
        window: a query sees the last so many tokens, its own included; who is older goes at once.
        key_mask: (B, T) bool, False = padding, which never arrives and attends to nothing.

    Returns:
        (B, T, T) bool.

    Raises:
        ValueError: for what `Rule` refuses, or shapes that do not fit.
    """
    rule = Rule(budget, evict_every, threshold, grace, first, window)
    if votes.ndim != 3 or votes.shape[1] != votes.shape[2]:
        raise ValueError(f"votes must have shape (B, T, T), got {tuple(votes.shape)}")
    batch, length, _ = votes.shape
    if key_mask is not None and (key_mask.shape != (batch, length) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be bool of shape (B, T) = {(batch, length)}, got {key_mask.dtype} "
            f"{tuple(key_mask.shape)}"
        )
    real = torch.ones(batch, length, dtype=torch.bool, device=votes.device) if key_mask is None else key_mask
    positions = torch.where(real, real.long().cumsum(-1) - 1, -1)
    alive, soft_mask = torch.zeros_like(real), torch.zeros_like(votes[:, 0])
    earlier = torch.ones(length, length, dtype=torch.bool, device=votes.device).tril(-1)
    rows = []
    for t in range(length):
        alive = alive.clone()
        alive[:, t] = real[:, t]
        alive = rule.evict(alive, soft_mask, positions, positions[:, t : t + 1])
        rows.append(alive & real[:, t, None])
        soft_mask = soft_mask + torch.where(real[:, t, None] & earlier[t], votes[:, t], 0.0)
    return torch.stack(rows, dim=1) if rows else votes.bool()
