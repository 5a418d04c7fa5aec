"""A budget of cached tokens for every layer, found by the greedy search of arXiv 2410.02703.

All layers start with the whole context. A move lowers one layer by one rung of a ladder of budgets; the move
that adds least loss per token freed is kept, and a move that would lift the loss above the target freezes its
layer. The search ends when every layer is frozen or at the lowest rung. Two things make it fast:

- **Inputs are reused.** `BudgetedLoss` keeps the hidden states that enter each layer under the current budgets,
  so trying another budget in layer l runs the layers from l to the last. The loss is exactly that of
  `evaluate(model, rows, kv_budget=[...])`.
- **Candidates are measured lazily.** The last measured damage of each layer stands in for the present one. The
  layer where it is least is measured again and its move is taken if it is still the least; otherwise the next
  one is measured, as in accelerated submodular greedy (Minoux 1978). A step then costs one or two measurements
  instead of one per layer. It assumes that moves hurt more the less is held; `lazy=False` measures all.

Memory: rows x tokens x width x layers values for the inputs, up to three times that while trying.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.attention.eviction import Eviction, get_policy
from heedful.data import TokenDataset
from heedful.evaluation.layerwise import layers_of, starting_at
from heedful.evaluation.loss import batches, labelled_logits
from heedful.hf.cache import HeedfulCache


def ladder(context: int, lowest: int = 2) -> tuple[int, ...]:
    """The budgets that a layer goes through: from `context` tokens to `lowest`, each about 3/4 of the one before.

    Raises:
        ValueError: for a context below the lowest budget.
    """
    if context < lowest:
        raise ValueError(f"context must be at least {lowest}, the lowest budget, got {context}")
    rungs = [context]
    while rungs[-1] > lowest:
        rungs.append(max(lowest, min(rungs[-1] - 1, round(0.75 * rungs[-1]))))
    return tuple(rungs)


def split_rows(rows: TokenDataset, n_search: int) -> tuple[TokenDataset, TokenDataset]:
    """Rows to search on and rows to report on, disjoint, both from all parts of the text.

    The rows are cut into up to 8 stretches; each gives a block of neighbouring rows to the one and the block
    after it to the other.

    Args:
        rows: all rows, in the order of the text.
        n_search: rows to search on, at most; half of all if there are fewer. Up to 4 times as many to report on.

    Raises:
        ValueError: for `n_search` below 1, or fewer than 2 rows.
    """
    if n_search < 1:
        raise ValueError(f"the search needs 1 row or more, got {n_search}")
    total = len(rows)
    if total < 2:
        raise ValueError(
            f"expected 2 rows or more, to search and to report on, got {total}; use a longer text"
        )
    n_search = min(n_search, total // 2)
    n_report = min(4 * n_search, total - n_search)
    blocks = min(8, n_search)
    search: list[int] = []
    report: list[int] = []
    for i in range(blocks):
        start, end = (total * at // blocks for at in (i, i + 1))
        middle = start + n_search * (i + 1) // blocks - n_search * i // blocks
        search += range(start, middle)
        report += range(middle, min(end, middle + -(-n_report // blocks)))
    return _take(rows, search), _take(rows, report)


def _take(rows: TokenDataset, which: list[int]) -> TokenDataset:
    return TokenDataset({name: tensor[which] for name, tensor in rows.tensors.items()})


@dataclass(frozen=True)
class Measurement:
    """The loss under some budgets, and what entered the layers on the way."""

    budgets: tuple[int, ...]
    """Tokens held per layer."""
    loss: float
    """Nats per labelled token."""
    first: int
    """The first layer that was run."""
    inputs: list[list[Tensor]]
    """(B, T, C) for each batch of rows and each layer after `first`."""


@dataclass
class _Batch:
    inputs: list[Tensor]  # (B, T, C) per layer
    rows: dict[str, Tensor]  # (B, T) each


class BudgetedLoss:
    """The loss of a model under budgets, computed from the first layer whose budget is another.

    Args:
        model: a trained or converted model; it is put into evaluation mode.
        rows: input_ids (N, T), labels (N, T) with -100 = not counted, and attention_mask (N, T) if any are
            padded.
        policy: which token is evicted (`heedful.attention.eviction`).
        batch_size: rows at a time.
        grace: the newest tokens that never go, the one that has just arrived included.
        first: the first tokens that never go.

    Raises:
        ValueError: for an unknown policy, "selective" with layers that do not select, packed rows, or rows
            without labels.
    """

    def __init__(
        self,
        model: Any,
        rows: TokenDataset,
        policy: str = "selective",
        batch_size: int = 32,
        grace: int = 1,
        first: int = 1,
    ) -> None:
        check_policy(model, policy)
        if "segment_ids" in rows.tensors:
            raise ValueError(
                "rows with segment_ids mix documents, which a cache that evicts cannot hold; make rows with "
                "heedful.data.by_document"
            )
        self.model = model.eval()
        self.policy, self.grace, self.first = policy, grace, first
        self.layers = layers_of(model)
        empty: Any = model.new_cache(Eviction()).layers
        self.fixed = {i for i, layer in enumerate(empty) if not hasattr(layer, "memory")}
        """The layers with a sliding window of their own, where a budget changes nothing."""
        self.context = rows.tensors["input_ids"].shape[1]
        self.tokens = int((rows.tensors["labels"][:, 1:] != -100).sum())
        if not self.tokens:
            raise ValueError("no token is labelled, so there is nothing to measure; check the labels")
        self.budgets = (self.context,) * len(self.layers)
        """The budgets whose inputs are kept."""
        self._batches: list[_Batch] = []
        self.full_loss = self._start(rows, batch_size)
        """Nats per labelled token with the full cache."""
        self.loss = self.full_loss
        """Nats per labelled token under `budgets`."""

    @torch.no_grad()
    def measure(self, budgets: Sequence[int]) -> Measurement:
        """The loss under `budgets`, one number of tokens per layer; `context` or more evicts nothing.

        Raises:
            ValueError: for an unsound budget or a wrong number of them.
        """
        self.eviction(budgets).budgets(len(self.budgets))
        changed = [i for i, (new, old) in enumerate(zip(budgets, self.budgets, strict=True)) if new != old]
        if not changed:
            return Measurement(self.budgets, self.loss, len(self.budgets), [[] for _ in self._batches])
        first, nll = changed[0], 0.0
        inputs: list[list[Tensor]] = []
        for batch in self._batches:
            with starting_at(self.layers, first, batch.inputs[first]) as entered:
                nll += self._nll(batch.rows, self._cache(budgets))
            inputs.append(entered[1:])
        return Measurement(tuple(budgets), nll / self.tokens, first, inputs)

    def eviction(self, budgets: Sequence[int]) -> Eviction:
        """What is asked of the caches with these budgets."""
        return Eviction(tuple(budgets), self.policy, grace=self.grace, first=self.first)

    def keep(self, measured: Measurement) -> None:
        """Make the budgets of `measured` the current ones; it must come from `measure` under these budgets."""
        for batch, later in zip(self._batches, measured.inputs, strict=True):
            batch.inputs[measured.first + 1 :] = later
        self.budgets, self.loss = measured.budgets, measured.loss

    @torch.no_grad()
    def _start(self, rows: TokenDataset, batch_size: int) -> float:
        nll = 0.0
        for part in batches(self.model, rows, batch_size):
            with starting_at(self.layers, 0, None) as entered:
                nll += self._nll(part, None)
            self._batches.append(_Batch(entered, part))
        return nll / self.tokens

    def _cache(self, budgets: Sequence[int]) -> HeedfulCache | None:
        """Where layers whose budget is the context evict nothing, so that no policy goes query by query there."""
        if all(budget >= self.context for budget in budgets):
            return None
        cache = self.model.new_cache(self.eviction(budgets))
        plain = self.model.new_cache(Eviction())
        for i, budget in enumerate(budgets):
            if budget >= self.context:
                cache.layers[i] = plain.layers[i]
        return cache

    def _nll(self, rows: dict[str, Tensor], cache: HeedfulCache | None) -> float:
        logits, targets = labelled_logits(self.model, rows, cache)
        return F.cross_entropy(logits, targets, reduction="none").double().sum().item()


def check_policy(model: Any, policy: str) -> None:
    """Raise ValueError for an unknown policy, or one that needs selective layers where some are not."""
    needed = get_policy(policy).ranks_by
    if needed is None:
        return
    for number, score in enumerate(model.scores):
        if needed not in getattr(score, "state_names", ()):
            raise ValueError(
                f"the policy {policy!r} needs a model with score 'selective' in every layer, layer {number} has "
                f"{score.config.form!r}; use another policy, e.g. 'streaming'"
            )


@dataclass(frozen=True)
class Move:
    """One decision of the search: a layer goes down a rung, or stays where it is for good."""

    layer: int
    """Counted from 0."""
    budget: int
    """Tokens that were tried, one rung below the layer's budget."""
    accepted: bool
    """False: the loss would exceed the target, and the layer is frozen above `budget`."""
    loss: float
    """Loss on the search rows with the move made, nats per token."""
    measured: int
    """Measurements since the move before."""
    rates: tuple[float | None, ...]
    """Last measured damage of each layer, nats per token and token freed; None = not measured yet."""
    fresh: tuple[int, ...]
    """Layers whose rate was measured under the present budgets."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Move":
        """What `to_dict` gave, from JSON or not.

        Raises:
            TypeError: if fields are missing or unknown.
        """
        return cls(**{**fields, "rates": tuple(fields["rates"]), "fresh": tuple(fields["fresh"])})


class BudgetSearch:
    """The greedy search; iterate over `moves()` and read `budgets`.

        search = BudgetSearch(model, rows, target=evaluate(model, rows).loss + 0.01)
        for move in search.moves():
            print(move.layer, move.budget, move.loss)
        print(search.budgets, search.memory_factor)

    Args:
        model: a trained or converted model; it is put into evaluation mode.
        rows: what to measure on, as for `BudgetedLoss`; on them the target is never exceeded.
        target: the highest loss allowed, nats per labelled token.
        policy: which token is evicted (`heedful.attention.eviction`).
        lazy: measure only moves that may be the best; False measures all of them at every step.
        batch_size: rows at a time.
        earlier: moves of a search with the same arguments that was interrupted; they are repeated without
            measuring, and the search goes on as it would have.
        watch: called with (layer, budget) before every measurement.
        grace: the newest tokens that never go, the one that has just arrived included.
        first: the first tokens that never go.

    Raises:
        ValueError: if the loss with the full cache is above the target, the earlier moves do not follow from
            one another, or as in `BudgetedLoss`.
    """

    def __init__(
        self,
        model: Any,
        rows: TokenDataset,
        target: float,
        *,
        policy: str = "selective",
        lazy: bool = True,
        batch_size: int = 32,
        earlier: Sequence[Move] = (),
        watch: Callable[[int, int], None] | None = None,
        grace: int = 1,
        first: int = 1,
    ) -> None:
        self._losses = BudgetedLoss(model, rows, policy, batch_size, grace, first)
        self.context = self._losses.context
        self.full_loss = self._losses.full_loss
        """Loss with the full cache, nats per token."""
        if not self.full_loss <= target:
            raise ValueError(
                f"the loss with the full cache is {self.full_loss:.4f} nats per token, already above the target of "
                f"{target:.4f}: nothing can be saved; train longer, or give a higher target"
            )
        self.target = target
        self.lazy = lazy
        self.rungs = ladder(self.context, grace + first)
        n_layers = len(self._losses.budgets)
        self.budgets = [self.context] * n_layers
        """Tokens per layer, so far."""
        self.loss = self.full_loss
        """Loss under `budgets`, nats per token."""
        self.frozen: set[int] = set()
        """Layers that cannot be lowered without exceeding the target."""
        self.fixed = frozenset(self._losses.fixed)
        """Layers with a sliding window of their own, which stay at `context` and are not counted."""
        self._watch = watch
        self._rates: list[float | None] = [None] * n_layers
        self._fresh: set[int] = set()
        self._measured = 0
        self._best: tuple[int, Measurement] | None = None
        self._repeat(earlier)

    @property
    def memory_factor(self) -> float:
        """Tokens of the full cache over tokens held: context x layers / sum of the budgets."""
        counted = [budget for i, budget in enumerate(self.budgets) if i not in self.fixed]
        return self.context * len(counted) / sum(counted)

    @property
    def eviction(self) -> Eviction:
        """What is asked of the caches with the budgets so far."""
        return self._losses.eviction(self.budgets)

    @property
    def finished(self) -> bool:
        """Whether every layer is frozen or at the lowest rung."""
        return not self._candidates()

    def moves(self) -> Iterator[Move]:
        """Search on; every decision is yielded once it is made."""
        while candidates := self._candidates():
            layer = self._choose(candidates)
            if layer in self._fresh:
                yield self._accept(layer)
            elif (broken := self._try(layer)) is not None:
                self.frozen.add(layer)
                yield self._move(layer, False, broken)

    def _candidates(self) -> list[int]:
        lowest = self.rungs[-1]
        stay = self.frozen | self.fixed
        return [i for i, b in enumerate(self.budgets) if i not in stay and b > lowest]

    def _choose(self, candidates: list[int]) -> int:
        """The layer to measure next or, if it has been measured under these budgets, to lower."""
        stale = [i for i in candidates if i not in self._fresh]
        if stale and not self.lazy:
            return stale[0]
        return min(candidates, key=self._rate)

    def _rate(self, layer: int) -> float:
        rate = self._rates[layer]
        return -math.inf if rate is None else rate

    def _below(self, layer: int) -> int:
        return self.rungs[self.rungs.index(self.budgets[layer]) + 1]

    def _lowered(self, layer: int) -> list[int]:
        return [self._below(i) if i == layer else b for i, b in enumerate(self.budgets)]

    def _measure(self, layer: int) -> Measurement:
        if self._watch is not None:
            self._watch(layer, self._below(layer))
        if self._losses.budgets != tuple(self.budgets):  # after moves that were repeated
            self._losses.keep(self._losses.measure(self.budgets))
        return self._losses.measure(self._lowered(layer))

    def _try(self, layer: int) -> float | None:
        """Measure a move; the loss is returned if it breaks the target."""
        trial = self._measure(layer)
        self._measured += 1
        if not trial.loss <= self.target:
            return trial.loss
        rate = (trial.loss - self.loss) / (self.budgets[layer] - self._below(layer))
        self._rates[layer] = rate
        self._fresh.add(layer)
        if self._best is None or rate < self._rate(self._best[0]):
            self._best = layer, trial
        return None

    def _accept(self, layer: int) -> Move:
        trial = self._best[1] if self._best is not None and self._best[0] == layer else self._measure(layer)
        self._losses.keep(trial)
        self.budgets, self.loss = list(trial.budgets), trial.loss
        self._fresh, self._best = set(), None
        return self._move(layer, True, trial.loss)

    def _move(self, layer: int, accepted: bool, loss: float) -> Move:
        budget = self.budgets[layer] if accepted else self._below(layer)
        measured, self._measured = self._measured, 0
        return Move(layer, budget, accepted, loss, measured, tuple(self._rates), tuple(sorted(self._fresh)))

    def _repeat(self, moves: Sequence[Move]) -> None:
        for number, move in enumerate(moves, start=1):
            if move.layer not in self._candidates() or move.budget != self._below(move.layer):
                raise ValueError(
                    f"move {number} of the earlier search lowers layer {move.layer} to {move.budget}, which "
                    f"does not follow from the moves before it; start a new search"
                )
            if len(move.rates) != len(self.budgets):
                raise ValueError(
                    f"move {number} of the earlier search knows {len(move.rates)} layers, the model has "
                    f"{len(self.budgets)}; start a new search"
                )
            if move.accepted:
                self.budgets[move.layer], self.loss = move.budget, move.loss
            else:
                self.frozen.add(move.layer)
            self._rates, self._fresh = list(move.rates), set(move.fresh)
