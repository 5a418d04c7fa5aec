"""The compute multiplier: how much more compute the baseline needs for the loss that a form reaches.

The first form is trained for several numbers of steps, each with a schedule of its own length: a curve of loss
against compute. Where that curve reaches a form's loss, the baseline has spent what the form's loss is worth.
Above 1 the form saves compute, below 1 the same compute is better spent on the baseline.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from rich.table import Table

from heedful.comparison.statistics import Interval, bootstrapped
from heedful.comparison.table import FormSummary
from heedful.screen import table, text
from heedful.training import RunResult


def training_flops(run: RunResult) -> float:
    """FLOPs of a training run: a backward pass costs twice a forward pass."""
    return 3.0 * run.flops_per_token * run.tokens


def training_seconds(run: RunResult) -> float:
    """Seconds of its optimizer steps."""
    return run.tokens / run.tokens_per_second


COSTS: dict[str, Callable[[RunResult], float]] = {"FLOPs": training_flops, "seconds": training_seconds}


def multiplier(
    form: Sequence[RunResult], baseline: Sequence[RunResult], cost: Callable[[RunResult], float]
) -> Interval | None:
    """What the baseline would spend for the form's loss, over what the form spent; bootstrapped over seeds.

    Args:
        form: one run per seed.
        baseline: runs of several lengths, each with the same seeds.
        cost: of a run.

    Returns:
        None with fewer than two lengths of the baseline. Infinite where the baseline never reaches the loss, 0
        where its shortest run is better: then the true value lies beyond what was run.
    """
    lengths = sorted({run.tokens for run in baseline})
    by_seed = {(run.tokens, run.seed): run for run in baseline}
    seeds = [run.seed for run in form if all((tokens, run.seed) in by_seed for tokens in lengths)]
    if len(lengths) < 2 or not seeds:
        return None
    own = {run.seed: run for run in form}
    costs = [mean(cost(by_seed[tokens, seed]) for seed in seeds) for tokens in lengths]
    spent = mean(cost(own[seed]) for seed in seeds)

    def of_seeds(drawn: list[int]) -> float:
        chosen = [seeds[i] for i in drawn]
        losses = [mean(by_seed[tokens, seed].val_loss for seed in chosen) for tokens in lengths]
        reached = cost_at(mean(own[seed].val_loss for seed in chosen), costs, losses)
        return reached / spent

    return bootstrapped(of_seeds, len(seeds))


def cost_at(loss: float, costs: Sequence[float], losses: Sequence[float]) -> float:
    """Where a curve of loss against the log of its cost first falls to `loss`; 0 before it, infinite beyond."""
    if loss > losses[0]:
        return 0.0
    for (c0, l0), (c1, l1) in zip(
        zip(costs, losses, strict=True), zip(costs[1:], losses[1:], strict=True), strict=False
    ):
        if l1 <= loss <= l0:
            share = 0.0 if l0 == l1 else (l0 - loss) / (l0 - l1)
            return math.exp(math.log(c0) + share * (math.log(c1) - math.log(c0)))
    return math.inf


@dataclass(frozen=True)
class Multipliers:
    """Of every form but the first, for people."""

    rows: list[list[str]]
    """A form's name, and a cell for each of `COSTS`."""
    note: str
    """What the numbers are."""

    @property
    def markdown(self) -> str:
        """For summary.md."""
        lines = [f"| form | {' | '.join(COSTS)} |", "|---|" + "---|" * len(COSTS)]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in self.rows])

    def rich(self, width: int) -> Table:
        """For a terminal of `width` columns."""
        columns = [text("form"), *(text(cost) for cost in COSTS)]
        return table(columns, self.rows, title="compute multiplier", width=width)


def multipliers(summaries: Sequence[FormSummary], longer: Sequence[RunResult]) -> Multipliers | None:
    """What each form's compute is worth; None where the baseline has one length only, or there is no other form."""
    if len(summaries) < 2 or not longer:
        return None
    first, baseline = summaries[0].name, [*summaries[0].runs, *longer]
    rows = [
        [s.name, *(written(multiplier(s.runs, baseline, cost)) for cost in COSTS.values())]
        for s in summaries[1:]
    ]
    note = (
        f"what {first} would have to spend for the loss of a form, over what the form spent; from "
        f"{len({run.tokens for run in baseline})} lengths of {first}, each with its own schedule; 95 % interval by "
        f"bootstrap over seeds. Above 1 the form saves compute."
    )
    return Multipliers(rows, note)


def written(interval: Interval | None) -> str:
    """For a table."""
    if interval is None:
        return ""
    if (interval.low, interval.high) == (-math.inf, math.inf):
        return f"{_number(interval.estimate)} (one seed, no interval)"
    return f"{_number(interval.estimate)} ({_number(interval.low)} to {_number(interval.high)})"


def _number(value: float) -> str:
    if value == math.inf:
        return "beyond the longest run"
    if value <= 0:
        return "below the shortest run"
    return f"{value:.2f}"
