"""Faster forms of `Rule.evict`: each chooses the tokens that it would, and is tested against it.

- `departures`: a block of queries, as `Rule.evict` query after query; prefill and evaluation.
- `least_needed_slot`: one query under a plain budget, all slots taken; a decoding step, any policy.
- `most_voted_slot`: the same where priorities are F, in one reduction; selective decoding.
- The decoding kernel for GPUs picks as `most_voted_slot` does (`heedful.ops.selective.triton.slots`).

The rule is serial, each eviction changes what the next query may evict, but few tokens are ever in question. In
some queries, take any m tokens that may go, m being how many have gone by the last of the queries. One of them is
always left, so that nobody goes who is never above the least priority that any of the m has there. The others are
dropped first, and the rest is decided by plain numbers, cheaper than by tensors of this size.
"""

from array import array
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from heedful.ops.eviction.rule import Rule

TOGETHER = 16
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
    of_row = _of_row if rule.window is None else _of_windowed_row
    return torch.stack([of_row(rule, rated, where, alive) for rated, where, alive in rows])


def least_needed_slot(
    priority: Tensor, positions: Tensor, newest: Tensor | None = None, grace: int = 1, first: int = 1
) -> Tensor:
    """The slot that the next token may overwrite, as `Rule.evict` with all slots taken.

    The highest priority goes, the oldest among equals. Slot 0 holds the first real token and is never chosen.

    Args:
        priority: (B, C), finite.
        positions: (B, C) integers, from 0 on.
        newest: (B, 1) position of the token that comes; needed if more than one is safe at either end.
        grace: the newest tokens that never go, the one that comes included.
        first: the first tokens that never go.

    Returns:
        (B, 1) int64.
    """
    rated, age = priority[:, 1:], positions[:, 1:]
    if grace > 1 or first > 1:
        assert newest is not None
        rated = rated.masked_fill((age < first) | (age > newest - grace), NOBODY)
    # Ties are common, relu gives exact zeros.
    oldest = age.masked_fill(rated != rated.amax(-1, keepdim=True), torch.iinfo(age.dtype).max)
    return oldest.argmin(-1, keepdim=True) + 1


def most_voted_slot(
    soft_mask: Tensor, positions: Tensor, newest: Tensor | None = None, grace: int = 1, first: int = 1
) -> Tensor:
    """`least_needed_slot` for F, which is never negative; (B, C) both."""
    if soft_mask.dtype != torch.float32:
        return least_needed_slot(soft_mask, positions, newest, grace, first)
    # The bits of such a number, read as an integer, grow with it: one minimum settles the ties too.
    bits, age = soft_mask[:, 1:].view(torch.int32), positions[:, 1:]
    rank = age.sub(bits, alpha=2**32)
    if grace > 1 or first > 1:
        assert newest is not None
        rank = rank.masked_fill((age < first) | (age > newest - grace), torch.iinfo(rank.dtype).max)
    return rank.argmin(-1, keepdim=True) + 1


def _of_row(rule: Rule, rated: Tensor, positions: Tensor, alive: int) -> Tensor:
    """`departures` of one row, (T, S) and (S,); `alive` tokens are held at the start."""
    length, total = rated.shape
    before = total - length
    places = positions.tolist()
    newest = places[before:]
    arrived = [sum(p >= 0 for p in newest[start : start + TOGETHER]) for start in range(0, length, TOGETHER)]
    over = [0 if rule.budget is None else alive + n - rule.budget for n in accumulate(arrived)]
    if length % TOGETHER:
        rated = torch.cat((rated, rated[-1:].expand(-length % TOGETHER, -1)))
    parts = rated.unflatten(0, (-1, TOGETHER))
    gone_at = [length] * total
    for part, columns in enumerate(_candidates(rule, parts, positions, newest, over)):
        start = part * TOGETHER
        left = [column for column in columns if gone_at[column] == length]
        if left:
            priorities = parts[part].index_select(1, _integers(left).to(parts.device)).tolist()
            youngest = [position - rule.grace for position in newest[start : start + TOGETHER]]
            least = min((place for place in youngest if place >= -rule.grace), default=0)
            for candidate, column in enumerate(left):
                if places[column] > least:
                    for row, place in zip(priorities, youngest, strict=False):
                        if places[column] > place:
                            row[candidate] = NOBODY  # not yet there, or too new
            for candidate, query in _in_turn(rule, priorities, newest[start : start + TOGETHER], alive):
                gone_at[left[candidate]] = start + query
                alive -= 1
        alive += arrived[part]
    return _integers(gone_at).to(positions.device)


def _of_windowed_row(rule: Rule, rated: Tensor, positions: Tensor, alive: int) -> Tensor:
    """`_of_row` where a window hides tokens too: query after query, in plain numbers."""
    length, total = rated.shape
    before, places = total - length, positions.tolist()
    rows = None if rule.budget is None and rule.threshold is None else rated.tolist()
    held = sorted((c for c in range(before) if places[c] >= 0), key=places.__getitem__)
    gone_at = [length] * total
    for query, newest in enumerate(places[before:]):
        if newest < 0:
            continue
        held.append(before + query)
        going = [c for c in held if places[c] <= newest - (rule.window or 0)]
        if rows is not None and newest % rule.evict_every == 0:
            left = held[len(going) :]
            may = [c for c in left if rule.first <= places[c] <= newest - rule.grace]
            may.sort(key=rows[query].__getitem__, reverse=True)  # equals stay in order: the oldest first
            n = 0 if rule.budget is None else max(0, len(left) - rule.budget)
            if rule.threshold is not None:
                n = max(n, sum(rows[query][c] > rule.threshold for c in may))
            going += may[:n]
        for column in going:
            gone_at[column] = query
            held.remove(column)
    return _integers(gone_at).to(positions.device)


def _candidates(
    rule: Rule, parts: Tensor, positions: Tensor, newest: list[int], over: list[int]
) -> list[list[int]]:
    """The columns of those whom each part of the queries may evict, oldest first.

    Args:
        rule: when tokens go.
        parts: (P, n, S), the priorities in P parts of n queries.
        positions: (S,).
        newest: the position of each query, -1 for padding; the columns before theirs were there before the first.
        over: for each part how many tokens are too many by its end, if nobody had gone.
    """
    before = positions.shape[0] - len(newest)
    most = parts.amax(1)
    may = most > (torch.inf if rule.threshold is None else rule.threshold)
    needed = min(max(over), before)
    bounds = [torch.inf if m <= 0 else NOBODY for m in over]
    if needed > 0:
        earliest = next(
            (position for position in newest if position >= 0), -1
        )  # who may go then, may go later
        held = (positions[:before] >= rule.first) & (positions[:before] <= earliest - rule.grace)
        some = torch.where(held, parts[0, 0, :before], NOBODY).topk(needed).indices
        least = torch.where(held, parts[..., :before].amin(1), NOBODY)[:, some].cummin(1).values.tolist()
        bounds = [least[p][m - 1] if 0 < m <= needed else bounds[p] for p, m in enumerate(over)]
    may |= most >= torch.tensor(bounds, dtype=most.dtype, device=parts.device)[:, None]
    may &= positions >= rule.first
    order = positions.argsort()
    part, column = may[:, order].nonzero(as_tuple=True)
    columns: list[list[int]] = [[] for _ in over]
    for p, c in zip(part.tolist(), order[column].tolist(), strict=True):
        columns[p].append(c)
    return columns


def _integers(values: list[int]) -> Tensor:
    """As `torch.tensor`, which takes five times as long."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _in_turn(rule: Rule, rated: list[list[float]], newest: list[int], alive: int) -> list[tuple[int, int]]:
    """Who goes before which query, (candidate, query).

    Args:
        rule: when tokens go.
        rated: for each query the priorities of the candidates, the oldest first; those that are gone get the least.
        newest: the position of each query, -1 for padding.
        alive: tokens held before the first query.
    """
    gone: list[tuple[int, int]] = []
    for query, position in enumerate(newest):
        alive += position >= 0
        if position < 0 or position % rule.evict_every:
            continue
        row = rated[query]
        going = []
        if rule.threshold is not None:
            going = [c for c, priority in enumerate(row) if priority > rule.threshold]
            for candidate in going:
                row[candidate] = NOBODY
        over = 0 if rule.budget is None else alive - len(going) - rule.budget
        if over == 1:
            going.append(row.index(max(row)))  # the first of equals, which is the oldest
        elif over > 1:
            going += sorted(range(len(row)), key=row.__getitem__, reverse=True)[:over]  # equals stay in order
        for candidate in going:
            gone.append((candidate, query))
        for later in rated[query + 1 :]:
            for candidate in going:
                later[candidate] = NOBODY
        alive -= len(going)
    return gone
