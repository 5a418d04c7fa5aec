"""Promises about caches that evict, for the scores that say they go with them: `EvictableScore`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from heedful.attention import Attention, EvictableScore, EvictingCache
from heedful.attention.eviction import POLICIES
from heedful.testing.promise import Case, assert_close, promise


@promise
def roomy_budget_changes_nothing(case: Case) -> None:
    """An EvictingCache with room for all gives the outputs of no cache: whole, in pieces, token by token."""
    module, x = case.module(), case.tokens()
    expected = module(x)
    ones = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for policy in policies(module):
        for sizes in splits(case.length):
            for name, mask in (("", None), (", with a mask", ones)):
                out = evicting(module, x, sizes, policy, max(case.length, 2), mask)
                assert_close(f"policy {policy!r}, in pieces of {sizes}{name}", out, expected)


@promise
def evictions_are_stepwise(case: Case, *, budget: int | None = None) -> None:
    """Under a budget smaller than the sequence, whole and in pieces, the outputs are those of token by token."""
    module, x = case.module(), case.tokens()
    for policy in policies(module):
        held = budget or max(case.length // 2, 2)
        by_token = evicting(module, x, [1] * case.length, policy, held)
        for sizes in splits(case.length)[:-1]:
            what = f"policy {policy!r}, {held} tokens held, in pieces of {sizes}"
            assert_close(what, evicting(module, x, sizes, policy, held), by_token)


@promise
def evictions_ignore_padding(case: Case, *, budget: int | None = None) -> None:
    """Under a budget, rows padded on the left, by different amounts, give the outputs of the rows alone."""
    module, x = case.module(), case.tokens()
    padding = [b * (case.length // 2) // max(case.batch - 1, 1) for b in range(case.batch)]
    mask = torch.arange(case.length, device=x.device) >= torch.tensor(padding, device=x.device)[:, None]
    x = torch.where(mask[..., None], x, 100 * x)
    for policy in policies(module):
        held = budget or max(case.length // 2, 2)
        alone = [
            evicting(module, x[row : row + 1, pad:], [case.length], policy, held)
            for row, pad in enumerate(padding)
        ]
        for sizes in splits(case.length):
            out = evicting(module, x, sizes, policy, held, mask)
            for row, pad in enumerate(padding):
                what = f"policy {policy!r}, {held} tokens held, in pieces of {sizes}, row {row} after {pad} padded"
                assert_close(what, out[row : row + 1, pad:], alone[row])


def policies(module: Attention) -> list[str]:
    """The policies to check: by age, and those that rank by the score's own state; none if it never evicts."""
    if not isinstance(module.score, EvictableScore):
        return []
    names = module.score.state_names
    return ["streaming", *(name for name, policy in POLICIES.items() if policy.ranks_by in names)]


def splits(length: int) -> list[list[int]]:
    """How the sequence is fed: whole, in pieces, a long piece and then single tokens, token by token."""
    third = -(-length // 3)
    return [[length], [third, third], [third, *[1] * (length - third)], [1] * length]


@torch.no_grad()
def evicting(
    module: Attention,
    x: Tensor,
    sizes: Sequence[int],
    policy: str,
    budget: int,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The outputs of one pass through an EvictingCache, `sizes` tokens at a time; the last piece takes the rest."""
    cache, outs, start = EvictingCache(budget, policy), [], 0
    for size in [*sizes, x.shape[1]]:
        stop = min(start + size, x.shape[1])
        if stop > start:
            mask = None if key_mask is None else key_mask[:, start:stop]
            outs.append(module(x[:, start:stop], cache=cache, key_mask=mask))
        start = stop
    return torch.cat(outs, dim=1)
