"""From runs to a table: per form the mean over seeds, and the difference with its spread beside it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.table import Table

from heedful.comparison.statistics import paired
from heedful.screen import Column, table, text
from heedful.training import RunResult


@dataclass(frozen=True)
class FormSummary:
    """One form over its seeds."""

    name: str
    runs: list[RunResult]
    baseline: list[RunResult]

    @property
    def loss(self) -> float:
        """Mean validation loss."""
        return mean(run.val_loss for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the loss over seeds; None for one seed."""
        return stdev(run.val_loss for run in self.runs) if len(self.runs) > 1 else None

    @property
    def steps(self) -> int:
        """Of a run: those it was told, or for `--match seconds` those that its seconds allow."""
        return int(self.runs[0].config.get("train", {}).get("steps") or 0)

    @property
    def differences(self) -> list[float]:
        """Loss minus the baseline's, seed by seed."""
        return self._paired({run.seed: run.val_loss for run in self.baseline}, "val_loss")

    @property
    def answer_differences(self) -> list[float]:
        """Right answers, as a share, minus the baseline's, seed by seed."""
        return self._paired({run.seed: run.val_accuracy for run in self.baseline}, "val_accuracy")

    def _paired(self, base: Mapping[int, float], name: str) -> list[float]:
        return [getattr(run, name) - base[run.seed] for run in self.runs if run.seed in base]

    def mean_of(self, name: str) -> float | None:
        """The mean of a field; None where a run has none."""
        values = [getattr(run, name) for run in self.runs]
        return None if any(v is None for v in values) else mean(values)

    def accuracy_at(self, times: str) -> float | None:
        """Mean of the right answers at this many lengths of training; None where a run has none."""
        values = [(run.accuracy_at or {}).get(times) for run in self.runs]
        known = [v for v in values if v is not None]
        return mean(known) if len(known) == len(values) else None

    @property
    def steps_to_learn(self) -> str:
        """From which measured step on the answers are right; the median over seeds, and how many got there."""
        reached = [_steps_to(run) for run in self.runs]
        known = sorted(step for step in reached if step is not None)
        if not known:
            return "never"
        middle = f"{known[(len(known) - 1) // 2]:,}"
        return middle if len(known) == len(reached) else f"{middle} ({len(known)} of {len(reached)})"


LEARNED = 0.95
"""Right answers of a task that counts as learned."""


def _steps_to(run: RunResult) -> int | None:
    """The first measured step from which on two measurements in a row are right."""
    per_step = run.tokens / (run.config.get("train", {}).get("steps") or 1)
    rights = [right for _, _, right in run.curve]
    for i, (tokens, _, right) in enumerate(run.curve):
        if min(right, rights[min(i + 1, len(rights) - 1)]) >= LEARNED:
            return round(tokens / per_step)
    return None


def summarise(runs: Sequence[RunResult]) -> list[FormSummary]:
    """One summary per form, in order of appearance; the first form is the baseline."""
    forms: dict[str, list[RunResult]] = {}
    for run in runs:
        forms.setdefault(f"{run.attention} x {run.score}", []).append(run)
    baseline = next(iter(forms.values()), [])
    return [FormSummary(name, of_form, baseline) for name, of_form in forms.items()]


COLUMNS = (
    "form",
    "seeds",
    "steps",
    "parameters",
    "FLOPs/token",
    "lr",
    "loss",
    "vs first",
    "bits/byte",
    "answers",
    "answers vs first",
    "at 2x",
    "at 4x",
    "steps to 95 %",
    "ms/step",
    "cache B/token",
)


def rows(summaries: Sequence[FormSummary]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells, without the columns that say nothing about this data."""
    table, same_steps = [], len({s.steps for s in summaries}) < 2
    for s in summaries:
        first = s.runs[0]
        loss = f"{s.loss:.3f}" + (f" ± {s.spread:.3f}" if s.spread is not None else "")
        bpb = s.mean_of("val_bpb")
        cells = [
            s.name,
            str(len(s.runs)),
            "" if same_steps else f"{s.steps:,}",
            f"{first.params:,}",
            f"{first.flops_per_token / 1e6:.2f} M",
            f"{first.lr:g}",
            loss,
            _difference(s, s.differences, "{:+.3f}"),
            "" if bpb is None else f"{bpb:.3f}",
            f"{s.mean_of('val_accuracy'):.1%}" if bpb is None else "",
            _difference(s, [100 * d for d in s.answer_differences], "{:+.1f} %") if bpb is None else "",
            *(_percent(s.accuracy_at(times)) for times in ("2", "4")),
            s.steps_to_learn if bpb is None else "",
            f"{1000 * (s.mean_of('seconds_per_step') or 0):.0f}",
            f"{first.cache_bytes_per_token:,}",
        ]
        table.append(cells)
    shown = [i for i in range(len(COLUMNS)) if any(cells[i] for cells in table)]
    return [COLUMNS[i] for i in shown], [[cells[i] for i in shown] for cells in table]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _difference(s: FormSummary, d: list[float], as_text: str) -> str:
    if s.runs is s.baseline:
        return "first"
    if not d:
        return "no common seed"
    if len(d) == 1:
        return as_text.format(d[0])
    found = paired(d)
    low, high = (as_text.format(value) for value in (found.low, found.high))
    return f"{as_text.format(found.estimate)} ({low} to {high})"


TERMINAL = ("form", "loss", "vs first", "bits/byte", "answers", "answers vs first", "at 2x", "at 4x", "steps")
OPTIONAL = ("ms/step", "parameters", "steps to 95 %", "cache B/token", "FLOPs/token", "lr")
"""On a screen too narrow for all of them, the last go first."""


def rich_table(
    summaries: Sequence[FormSummary], title: str, width: int = 80, keep: Collection[str] = ()
) -> Table:
    """For a terminal of `width` columns: what fits there, the columns `keep` in any case; summary.md has all."""
    headers, cells = rows(summaries)
    wanted = dict.fromkeys((*TERMINAL, *keep, *OPTIONAL))
    order = [headers.index(name) for name in wanted if name in headers]
    columns = []
    for i in order:
        name, optional = headers[i].replace(" ", "\n"), headers[i] in OPTIONAL and headers[i] not in keep
        columns.append(text(name) if headers[i] == "form" else Column(name, optional=optional))
    broken = [[_broken(row[i]) for i in order] for row in cells]
    return table(columns, broken, title=title, width=width)


def _broken(cell: str) -> str:
    """Mean and spread below each other."""
    return cell.replace(" ±", "\n±").replace(" (", "\n(").replace(" to ", "\nto ")


def markdown_table(summaries: Sequence[FormSummary]) -> str:
    """For summary.md."""
    headers, cells = rows(summaries)
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def one_rate_note(summaries: Sequence[FormSummary]) -> str:
    """What a comparison without a sweep cannot know; empty for one form."""
    if len(summaries) < 2:
        return ""
    return (
        f"One learning rate, {summaries[0].runs[0].lr:g}, for all forms: at the best rate of each, differences may "
        "be half as large (`--lr-sweep 2e-3,5e-3,1e-2,2e-2` finds it)."
    )


def noise_note(summaries: Sequence[FormSummary]) -> str:
    """What the seeds allow to say about the differences."""
    seeds = min(len(s.runs) for s in summaries)
    if len(summaries) == 1:
        return "One form only: there is nothing to compare with."
    if seeds < 2:
        return (
            "**One seed: this table does not rank the forms.** At small sizes two seeds of the same form "
            "differ by as much as two forms do; run with more seeds (`--seeds`) before believing a difference."
        )
    return (
        f"{seeds} seeds. The difference is paired: form minus first form at the same seed, its mean and 95 % "
        "interval (paired t). An interval that includes zero shows no difference; resolving 0.02 nats takes 15 to "
        "25 seeds at small sizes."
    )
