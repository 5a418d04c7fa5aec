"""Who goes when, in a block of queries: the stepwise rule, for all of them in turn.

The rule is serial, each eviction changes what the next query may evict, but few tokens are ever in question. In
a few queries that evict m tokens between them, somebody goes whose priority is at least the m-th largest of the
least priorities that tokens have there: fewer than m of those above it can be gone. So the others are dropped
first, and the rest is decided by plain numbers, cheaper than by tensors of this size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from heedful.attention.eviction.rule import Rule

TOGETHER = 32
"""Queries whose candidates are looked up at once."""
NOBODY = float("-inf")


def departures(rule: Rule, priority: Tensor, positions: Tensor) -> Tensor:
    """The query before which each token is evicted, as `Rule.evict` does one query after the other.

    Args:
        rule: when tokens go.
        priority: (B, T, S), what each query finds; highest goes first, the oldest among equals.
        positions: (B, S) position of each token in its row, -1 = padding or none; the last T are the queries' own.

    Returns:
        (B, S) int64: the index of the first query that no longer sees the token, T if it stays.
    """
    length, total = priority.shape[1:]
    held = (positions[:, : total - length] >= 0).sum(-1).tolist()
    if rule.threshold is not None:  # as it compares with a tensor
        rule = replace(rule, threshold=torch.tensor(rule.threshold, dtype=priority.dtype).item())
    rows = zip(priority, positions, held, strict=True)
    return torch.stack([_of_row(rule, rated, where, alive) for rated, where, alive in rows])


def _of_row(rule: Rule, rated: Tensor, positions: Tensor, alive: int) -> Tensor:
    """`departures` of one row, (T, S) and (S,); `alive` tokens are held at the start."""
    length, total = rated.shape
    arrivals = positions[total - length :].tolist()
    order = positions.argsort()
    gone_at = torch.full_like(positions, length)
    fixed = positions <= 0
    for start in range(0, length, TOGETHER):
        now = arrivals[start : start + TOGETHER]
        arrived = sum(p >= 0 for p in now)
        over = 0 if rule.budget is None else alive + arrived - rule.budget
        if over > 0 or rule.threshold is not None:
            part = rated[start : start + TOGETHER]
            columns = _candidates(rule, part, fixed, over, total - length + start)
            columns = order[columns[order]]
            own = [column - (total - length) - start for column in columns.tolist()]
            leaves = _in_turn(rule, part.index_select(1, columns).tolist(), now, own, alive)
            when = [length if t is None else start + t for t in leaves]
            gone_at[columns] = torch.tensor(when, dtype=torch.long, device=columns.device)
            fixed = fixed | (gone_at < length)
            alive -= sum(t is not None for t in leaves)
        alive += arrived
    return gone_at


def _candidates(rule: Rule, rated: Tensor, fixed: Tensor, over: int, held: int) -> Tensor:
    """Whom a few queries may evict, (S,) bool: `rated` is (n, S), `fixed` (S,), who cannot go."""
    most = rated.amax(0)
    may = most > (torch.inf if rule.threshold is None else rule.threshold)
    if over > 0:
        least = rated.amin(0)[:held].masked_fill_(fixed[:held], NOBODY)
        may |= most >= (least.topk(over).values[-1] if over <= held else NOBODY)
    may[held + len(rated) :] = False
    return may & ~fixed


def _in_turn(
    rule: Rule, rated: list[list[float]], newest: list[int], own: list[int], alive: int
) -> list[int | None]:
    """The query before which each candidate goes.

    Args:
        rule: when tokens go.
        rated: for each query the priorities of the candidates, oldest first.
        newest: the position of each query, -1 for padding.
        own: for each candidate the query that is its own, below 0 if it was there before.
        alive: tokens held before the first query.
    """
    leaves: list[int | None] = [None] * len(own)
    for candidate, query in enumerate(own):
        for row in rated[: query + 1] if query >= 0 else ():
            row[candidate] = NOBODY  # not yet there, or the newest
    for query, (position, row) in enumerate(zip(newest, rated, strict=True)):
        if position < 0:
            continue
        alive += 1
        if position % rule.evict_every:
            continue
        going = []
        if rule.threshold is not None:
            going = [c for c, priority in enumerate(row) if priority > rule.threshold]
            for candidate in going:
                row[candidate] = NOBODY
        while rule.budget is not None and alive - len(going) > rule.budget:
            going.append(row.index(max(row)))  # the first of equals, which is the oldest
            row[going[-1]] = NOBODY
        for candidate in going:
            leaves[candidate] = query
            for later in rated[query + 1 :]:
                later[candidate] = NOBODY
        alive -= len(going)
    return leaves
