"""What the speeds should be: goals beside the figures that `heedful bench` and `benchmarks/sas.py` wrote.

    python benchmarks/goals.py results/kernels results/train results/prefill results/decode results/sas

Every goal is a ratio of two cases that took turns, under the conditions that it was stated for. Figures that were
taken while the machine worked on something else are not judged.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from heedful.screen import Column, screen_width, table, text

PICKED = "*"
"""The case that impl="auto" takes."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """A ratio that should not be exceeded."""

    bench: str
    """Name of the file of figures."""
    workload: str
    lengths: Sequence[int]
    case: str
    against: str
    """Name of a case, or of its beginning where a backend follows; "" is the first case."""
    limit: float
    measure: Literal["time", "extra memory"] = "time"
    where: Mapping[str, Any] = field(default_factory=dict)
    """What the settings must be: a value, or a tuple of possible ones."""


CPU = {"device": "cpu", "dtype": "fp32", "threads": (1, 2)}
EIGHT_HEADS = {**CPU, "heads": 8, "kv_heads": 8, "head_dim": 64, "batch": 1}
BF16 = {**EIGHT_HEADS, "dtype": "bf16"}
GPU = {"device": "cuda", "dtype": "bf16", "heads": 16, "head_dim": (64, 128), "batch": 1}
SMALL = {**CPU, "d_model": 128, "n_heads": 8}  # heads of 16, as in the demo
LARGE = {**CPU, "d_model": 512, "n_heads": 8}
LONG = (1024, 2048, 4096)
EVERY_KEY, TWIN, PLAIN = "selective, every key", "no-selection twin", "plain SDPA"
SAS, PUBLISHED = "SAS, heedful", "SAS, published"

GOALS = (
    Goal("kernels", "prefill", LONG, TWIN, PLAIN, 1.15, where=EIGHT_HEADS),
    Goal("kernels", "train", LONG, TWIN, PLAIN, 1.15, where=EIGHT_HEADS),
    Goal("kernels", "prefill", LONG, EVERY_KEY, PLAIN, 1.35, where=EIGHT_HEADS),
    Goal("kernels", "train", LONG, EVERY_KEY, PLAIN, 1.35, where=EIGHT_HEADS),
    Goal("kernels", "prefill", (2048,), PICKED, PLAIN, 1.30, where=BF16),
    Goal("kernels", "train", (2048,), PICKED, "x-transformers", 1 / 5, where=EIGHT_HEADS),
    Goal("kernels", "train", (4096,), PICKED, "x-transformers", 1 / 20, "extra memory", EIGHT_HEADS),
    Goal("kernels", "prefill", (2048, 4096, 8192, 16384), PICKED, PLAIN, 1.40, where=GPU),
    Goal("kernels", "train", (2048, 4096, 8192, 16384), PICKED, PLAIN, 1.55, where=GPU),
    Goal("sas", "SAS prefill", (2048,), SAS, PUBLISHED, 0.25, where=EIGHT_HEADS),
    Goal("sas", "SAS train", (2048,), SAS, PUBLISHED, 0.35, where=EIGHT_HEADS),
    Goal("sas", "SAS prefill", (2048,), SAS, PUBLISHED, 0.25, "extra memory", EIGHT_HEADS),
    Goal("sas", "SAS train", (2048,), SAS, PUBLISHED, 0.25, "extra memory", EIGHT_HEADS),
    Goal("train", "training step", (256,), "selective", "MHA softmax", 1.15, where=SMALL),
    Goal("train", "training step", (256,), "SAS", "MHA softmax", 1.9, where=SMALL),
    Goal("train", "training step", (1024,), "SAS", "MHA softmax", 1.9, where=LARGE),
    Goal("prefill", "prefill", (8192,), "pruned, budget 512", PLAIN, 0.35, where=EIGHT_HEADS),
    Goal("decode", "decode", (8192,), "selective slots, T/16", "plain SDPA, full cache", 1 / 8, where=CPU),
    Goal("decode", "decode", (8192,), "selective slots, T/4", "plain SDPA, T/4 keys", 1.2, where=CPU),
)


@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured."""

    goal: Goal
    row: Row
    against: str
    ratio: float | None
    """None where the figures were disturbed."""

    @property
    def met(self) -> bool | None:
        """None where the figures were disturbed."""
        return None if self.ratio is None else self.ratio <= self.goal.limit


def read(paths: Iterable[Path]) -> list[Row]:
    """The figures in files, or in the *.jsonl of folders; `bench` is the name of the file."""
    rows = []
    for path in paths:
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if file.stem == "decode":
                    row = {"workload": "decode", "length": row["context"], **row}
                rows.append({"bench": file.stem, **row})
    return rows


def judge(rows: Sequence[Row], goals: Iterable[Goal] = GOALS) -> Iterator[Verdict]:
    """A verdict for every goal and every group of figures that it was stated for."""
    for goal in goals:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if _stated(goal, row):
                groups.setdefault((row["length"], row["threads"], row.get("command")), []).append(row)
        for group in groups.values():
            case = next((r for r in group if _is(goal.case, r)), None)
            against = next((r for r in group if _is(goal.against, r)), None)
            if case is None or against is None:
                continue
            if case.get("disturbed") or against.get("disturbed"):
                yield Verdict(goal, case, against["case"], None)
                continue
            value = "seconds" if goal.measure == "time" else "extra_bytes"
            if case.get(value) is not None and against.get(value):
                yield Verdict(goal, case, against["case"], case[value] / against[value])


def _stated(goal: Goal, row: Row) -> bool:
    """Whether the goal was stated for this length and these settings."""
    if (row["bench"], row["workload"]) != (goal.bench, goal.workload) or row["length"] not in goal.lengths:
        return False
    # a file of an earlier version may lack a setting that it did not have
    return all(
        row.get(name) in (wanted if isinstance(wanted, tuple) else (wanted,))
        for name, wanted in goal.where.items()
        if name in row
    )


def _is(name: str, row: Row) -> bool:
    if name == PICKED:
        return bool(row.get("picked"))
    return row["case"] == name or (name == PLAIN and row["case"].startswith(f"{PLAIN},"))


def goals_table(verdicts: Sequence[Verdict], width: int) -> Table:
    """A line per verdict, laid out for `width` columns."""
    columns = [text("what"), text("case / against"), Column("measured", breaks=True)]
    columns += [Column("goal", breaks=True), text("")]
    rows = []
    for v in verdicts:
        precision = v.row.get("dtype", "fp32")
        threads = v.row["threads"]
        what = f"{v.goal.workload}, T {v.row['length']:,}, {threads} thread{'s' if threads > 1 else ''}"
        what += ("" if precision == "fp32" else f", {precision}") + (
            "" if v.goal.measure == "time" else ", memory"
        )
        met = {True: "met", False: "[bold]missed[/]", None: "foreign load"}[v.met]
        ratio = "-" if v.ratio is None else shown_ratio(v.ratio, v.goal.limit, v.goal.measure)
        goal = shown_goal(v.goal.limit, v.goal.measure)
        rows.append((what, f"{v.row['case']} / {v.against}", ratio, goal, met))
    return table(columns, rows, title="goals", width=width)


def shown_ratio(ratio: float, limit: float, measure: str) -> str:
    """0.18 as "5.6x faster" where the goal is said so."""
    if limit > 0.2:
        return f"{ratio:.2f}"
    factor = 1 / ratio
    return f"{factor:.{0 if factor >= 10 else 1}f}x {'less' if measure != 'time' else 'faster'}"


def shown_goal(limit: float, measure: str) -> str:
    """A limit as it was stated."""
    if limit > 0.2:
        return f"≤ {limit:.2f}"
    return f"≥ {1 / limit:.0f}x {'less' if measure != 'time' else 'faster'}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", help="figures: *.jsonl, or folders of them")
    verdicts = list(judge(read(parser.parse_args().paths)))
    console = Console(highlight=False, width=screen_width())
    if not verdicts:
        console.print("no goal was stated for these figures")
        return
    console.print(goals_table(verdicts, console.width))
    met = sum(v.met is True for v in verdicts)
    console.print(f"{met} of {len(verdicts)} met")


if __name__ == "__main__":
    main()
