"""What is asked of the caches of a whole model: one value, for every command and call that evicts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Union

from heedful.attention.cache import KVCache, LayerCache
from heedful.attention.eviction.cache import EvictingCache, check_score
from heedful.attention.eviction.policy import get_policy
from heedful.attention.score import Score
from heedful.ops.eviction.rule import check_budget, check_count, check_threshold

Budget = int | Sequence[int] | str
"""Tokens held per layer: a number, a list with one per layer, or "full"."""
AnyBudget = Union[Budget, "Eviction", Mapping[str, Any], None]
"""What `Eviction.of` takes for one."""


@dataclass(frozen=True)
class Eviction:
    """How many tokens each layer holds, and who goes.

    Raises:
        ValueError: for a budget below `first + grace`; an `evict_every`, `grace` or `first` below 1, or with
            nothing to evict; a threshold that is not a finite number above 0; an unknown policy.
    """

    budget: int | tuple[int, ...] | None = None
    """Tokens held while a query attends, those that never go included: for all layers, or one per layer.
    None: no bound."""
    policy: str = "selective"
    """Which token goes (`heedful.attention.eviction.POLICIES`)."""
    evict_every: int = 1
    """Evict only at positions divisible by it; up to evict_every - 1 more tokens are held in between."""
    threshold: float | None = None
    """Votes F above which a token goes, whatever the budget; needs the policy "selective"."""
    grace: int = 1
    """The newest tokens that never go, the one that has just arrived included."""
    first: int = 1
    """The first tokens that never go."""

    def __post_init__(self) -> None:
        for name in ("evict_every", "grace", "first"):
            check_count(name, getattr(self, name))
        if isinstance(self.budget, list | tuple):
            object.__setattr__(self, "budget", tuple(self.budget))
        budgets = self.budget if isinstance(self.budget, tuple) else (self.budget,)
        for budget in budgets:
            if budget is not None and not isinstance(budget, int):
                raise ValueError(
                    f'kv_budget must be "full", a whole number or a list with one per layer, got {self.budget!r}'
                )
            if budget is not None:
                check_budget(budget, self.grace, self.first)
        if not budgets or (isinstance(self.budget, tuple) and None in self.budget):
            raise ValueError(
                f"a list of budgets holds a whole number for every layer, got {list(budgets)}; "
                f"a number of at least the longest text keeps all of it"
            )
        get_policy(self.policy)
        check_threshold(self.threshold)
        for name in ("evict_every", "grace", "first"):
            if getattr(self, name) != 1 and not self.evicts:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs a budget or a threshold; nothing is evicted without"
                )

    @classmethod
    def of(
        cls,
        kv_budget: AnyBudget = None,
        kv_policy: str | None = None,
        kv_evict_every: int | None = None,
        kv_threshold: float | None = None,
        kv_grace: int | None = None,
        kv_first: int | None = None,
    ) -> "Eviction":
        """One value from what callers write.

        Args:
            kv_budget: tokens per layer: a number, a list with one per layer, "full" or None for no bound; or an
                `Eviction`, or what its `to_dict` gave.
            kv_policy: which token goes; default "selective", or that of the `Eviction` given.
            kv_evict_every: likewise, default 1.
            kv_threshold: likewise, default none.
            kv_grace: the newest tokens that never go; likewise, default 1.
            kv_first: the first tokens that never go; likewise, default 1.

        Raises:
            ValueError: for what is unsound.
        """
        given = {"policy": kv_policy, "evict_every": kv_evict_every, "threshold": kv_threshold}
        given |= {"grace": kv_grace, "first": kv_first}
        fields = {name: value for name, value in given.items() if value is not None}
        if isinstance(kv_budget, Eviction):
            return cls(**{**asdict(kv_budget), **fields})
        if isinstance(kv_budget, Mapping):
            if unknown := sorted(set(kv_budget) - {"budget", *given}):
                raise ValueError(
                    f"unknown settings of an eviction: {unknown}; expected budget, {', '.join(given)}"
                )
            return cls(**{**kv_budget, **fields})
        return cls(None if kv_budget == "full" else kv_budget, **fields)  # type: ignore[arg-type]

    @property
    def evicts(self) -> bool:
        """Whether there is a bound at all."""
        return self.budget is not None or self.threshold is not None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for `of`."""
        budget = list(self.budget) if isinstance(self.budget, tuple) else self.budget
        return {**asdict(self), "budget": budget}

    def budgets(self, n_layers: int) -> list[int | None]:
        """One budget per layer; None = no bound.

        Raises:
            ValueError: for a list of another length.
        """
        if not isinstance(self.budget, tuple):
            return [self.budget] * n_layers
        if len(self.budget) != n_layers:
            raise ValueError(f"kv_budget must have one entry per layer ({n_layers}), got {len(self.budget)}")
        return list(self.budget)

    def check_scores(self, scores: Iterable[Score]) -> None:
        """Raise ValueError unless tokens may be evicted under each of these, as is asked for here."""
        for score in scores if self.evicts else ():
            check_score(score, get_policy(self.policy), self.threshold)

    def layer_caches(self, n_layers: int, windows: Sequence[int | None] | None = None) -> list[KVCache]:
        """An empty cache for each layer.

        Args:
            n_layers: their number.
            windows: per layer, how many of the last tokens its queries see, None: all; that bounds what is held.

        Raises:
            ValueError: for a list of budgets of another length, or a threshold with a policy that has no votes.
        """
        rest = self.policy, self.evict_every, self.threshold, self.grace, self.first
        caches: list[KVCache] = []
        for budget, window in zip(self.budgets(n_layers), windows or [None] * n_layers, strict=True):
            if budget is not None or self.threshold is not None:
                caches.append(EvictingCache(budget, *rest, window=window))
            elif window is not None:  # nobody ranks
                caches.append(EvictingCache(None, "streaming", window=window))
            else:
                caches.append(LayerCache())
        return caches
