"""Tasks under KV-cache budgets, one after the other."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean
from typing import Any

from lm_eval.api import task as harness_task
from lm_eval.evaluator import evaluate

from heedful.attention.eviction import Eviction
from heedful.attention.eviction.settings import Budget
from heedful.lm_eval.model import HeedfulLM
from heedful.lm_eval.tasks import LoadedTask

MOST_LOGITS = 2**26  # of a batch; the harness holds them and their logarithms
MOST_ROWS = 32
DRAWS = 1000  # for the errors of metrics that have no formula for it
PART = "part"  # the field of a document that says what kind it is of


@dataclass(frozen=True)
class Figure:
    """One number of a task."""

    task: str
    """Of a group the group, else the task."""
    metric: str
    value: float
    error: float | None
    """Standard error over the documents, where the harness gives one."""


@dataclass(frozen=True)
class TaskResult:
    """One task with one policy and budget."""

    name: str
    """As it was asked for, with the length where it has one."""
    policy: str | None
    """Which token is evicted; None for the full cache."""
    kv_budget: Budget
    grace: int
    first: int
    held: int
    """The most tokens that a layer held at the end of a request."""
    evicted: bool
    """Whether anything was: where all texts fit the budget, nothing is."""
    documents: int
    figures: tuple[Figure, ...]
    parts: dict[str, dict[str, float]]
    """Means over the documents of a kind, such as a paradigm of BLiMP, by kind and metric."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure(
    model: HeedfulLM,
    tasks: Sequence[LoadedTask],
    budgets: Sequence[Budget],
    policies: Sequence[str],
    *,
    grace: int = 1,
    first: int = 1,
    limit: int | None = None,
    context: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Iterator[TaskResult]:
    """Measure every task with the full cache, if it is among the budgets, then with every policy and budget.

    Args:
        model: the model; what it holds and its batch size change.
        tasks: what to measure.
        budgets: tokens held per layer, or "full", which is measured once.
        policies: which token is evicted.
        grace: the newest tokens that never go.
        first: the first tokens that never go.
        limit: documents of each task, the first ones; None: all.
        context: tokens of a piece of the task `text`; None: as many as the model reads.
        progress: called with the number of the measurement, from 0, and its requests done and to do.

    Returns:
        An iterator that measures as it goes.

    Raises:
        ValueError: at once, for a policy that does not go with the model or an unsound budget.
    """
    plan: list[tuple[str | None, Budget, Eviction]] = []
    if "full" in budgets:
        plan.append((None, "full", Eviction()))
    for policy in policies:
        for budget in budgets:
            if budget != "full":
                plan.append((policy, budget, Eviction.of(budget, policy, kv_grace=grace, kv_first=first)))
    for _, _, eviction in plan:
        model.hold(eviction)
    return _measured(model, tasks, plan, limit, context, progress)


def _measured(
    model: HeedfulLM,
    tasks: Sequence[LoadedTask],
    plan: Sequence[tuple[str | None, Budget, Eviction]],
    limit: int | None,
    context: int | None,
    progress: Callable[[int, int, int], None] | None,
) -> Iterator[TaskResult]:
    usual = model._max_length
    number = 0
    for policy, budget, eviction in plan:
        for task in tasks:
            model.hold(eviction)
            model._max_length = context if task.name == "text" else usual
            room = MOST_LOGITS // ((task.tokens or model.max_length) * model.model.config.vocab_size)
            model.batch_size_per_gpu = max(1, min(MOST_ROWS, room))
            model.report = _reporter(progress, number)
            try:
                with _no_bars():
                    found: Any = evaluate(
                        model, task.tasks, limit=limit, bootstrap_iters=DRAWS, log_samples=True
                    )
            finally:
                model.report, model._max_length = None, usual
            yield TaskResult(
                name=task.name,
                policy=policy,
                kv_budget=budget,
                grace=eviction.grace,
                first=eviction.first,
                held=model.held,
                evicted=model.evicted,
                documents=sum(counts["effective"] for counts in found["n-samples"].values()),
                figures=tuple(_figures(found)),
                parts=_parts(found),
            )
            number += 1


@contextmanager
def _no_bars() -> Iterator[None]:
    """The harness draws one while it makes requests, and asks nobody whether the screen is taken."""
    theirs: Any = harness_task
    bar = theirs.tqdm
    theirs.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        theirs.tqdm = bar


def _reporter(progress: Callable[[int, int, int], None] | None, number: int) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(number, done, total)

    return report


def _figures(found: Any) -> Iterator[Figure]:
    """The groups' where there are any, else the tasks'."""
    for task, values in (found.get("groups") or found["results"]).items():
        for key, value in values.items():
            metric, _, which = key.partition(",")
            if not which or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{which}")
            named = metric if which == "none" else f"{metric} ({which})"
            yield Figure(task, named, float(value), float(error) if isinstance(error, int | float) else None)


def _parts(found: Any) -> dict[str, dict[str, float]]:
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for samples in found["samples"].values():
        for sample in samples:
            for metric in sample["metrics"] if PART in sample["doc"] else ():
                values[sample["doc"][PART]][metric].append(sample[metric])
    return {
        part: {metric: mean(v) for metric, v in metrics.items()} for part, metrics in sorted(values.items())
    }
