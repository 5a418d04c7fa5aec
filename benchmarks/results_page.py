"""The tables and the first figure of results/README.md, from the raw data of the studies beside it.

    python benchmarks/results_page.py            # write them
    python benchmarks/results_page.py --check    # fail where the page says something else

What stands between `<!-- NAME -->` and `<!-- end -->` is written here; the rest of the page is by hand.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from results_figure import draw_verdicts, shown, text_of

from heedful.study import load_study
from heedful.study.plan import FOLDER, Study
from heedful.study.report import counted_verdicts, interval_text, sides
from heedful.study.rows import read_rows
from heedful.study.verdict import Verdict, verdicts

RESULTS = Path("results")
PAGE = RESULTS / "README.md"
FIGURE = RESULTS / "verdicts.png"
LETTERS = {
    "heads": "a",
    "sas-compute": "b",
    "sas-ablations": "c",
    "selective": "d",
    "votes": "d",
    "memory": "e",
    "memory-assignment": "e",
    "task-variable-assignment": "f",
    "task-induction": "f",
    "task-mqar": "f",
    "task-selective-copy": "f",
    "task-copy": "f",
    "task-sorting": "f",
    "task-parity": "f",
    "task-needle": "f",
    "task-variable-tracking": "f",
    "frontier": "g",
    "shakespeare": "h",
    "initial-scale": "i",
    "learning-rate": "i",
    "larger": "i",
}
"""Studies in the order of the page; those of a letter ask one question."""
NEAR = 0.02
"""Right answers this close to the best are marked as it is."""


def verdict_table() -> str:
    """One row for each study: what its first contrast says."""
    lines = [
        "| study | claim | first contrast | difference (95 %) | in | rate | seeds | verdict | its others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for letter, study, found in found_verdicts():
        first = found[0]
        cells = [
            f"{letter}. [{study.title}]({study.name}/README.md)",
            study.claim,
            sides(first.contrast, "vs"),
            interval_text(first.difference),
            first.contrast.metric or study.metric,
            _rate(study.name),
            str(first.seeds),
            f"**{first.says}**",
            counted_verdicts(found[1:]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(name: str) -> str:
    """The learning rate of its runs, or of how many each arm had the best; as the rows have it."""
    rows = read_rows(RESULTS / name / "runs.jsonl")
    tried = {row["lr"] for row in read_rows(RESULTS / name / "sweep.jsonl")} or {row["lr"] for row in rows}
    return f"{tried.pop():g}" if len(tried) == 1 else f"best of {len(tried)}"


def found_verdicts() -> list[tuple[str, Study, list[Verdict]]]:
    """Letter, study and verdicts of every study of which two seeds are there."""
    every = []
    for name, letter in LETTERS.items():
        study = load_study(name)
        rows = [row for row in read_rows(RESULTS / name / "runs.jsonl") if row["role"] == "seed"]
        found = verdicts(study, rows, read_rows(RESULTS / name / "budgets.jsonl"))
        if found:
            every.append((letter, study, found))
    return every


def first_verdicts() -> list[tuple[str, Study, Verdict]]:
    """The same, the first contrast of each alone: what the figure shows."""
    return [(letter, study, found[0]) for letter, study, found in found_verdicts()]


def task_table() -> str:
    """Right answers at the length of training and at four times it, form by form."""
    tasks = [
        name for name in LETTERS if name.startswith("task-") and (RESULTS / name / "runs.jsonl").exists()
    ]
    right = {name: _right(load_study(name)) for name in tasks}
    heads = [f"[{name.removeprefix('task-')}]({name}/README.md)" for name in tasks]
    lines = ["| form | " + " | ".join(heads) + " |", "|---" * (len(tasks) + 1) + "|"]
    for arm in load_study(tasks[0]).arms:
        lines.append(f"| `{arm}` | " + " | ".join(_cell(right[name], arm) for name in tasks) + " |")
    return "\n".join(lines)


def _right(study: Study) -> dict[str, tuple[float, float]]:
    """Arm -> right answers at 1 and at 4 times the length, mean over its seeds."""
    rows = [row for row in read_rows(RESULTS / study.name / "runs.jsonl") if row["role"] == "seed"]
    found = {}
    for arm in study.arms:
        own = [row["accuracy_at"] for row in rows if row["arm"] == arm]
        if own:
            found[arm] = (mean(at["1"] for at in own), mean(at["4"] for at in own))
    return found


def _cell(right: dict[str, tuple[float, float]], arm: str) -> str:
    if arm not in right:
        return ""
    best = [max(values) for values in zip(*right.values(), strict=True)]
    return " / ".join(
        f"**{value:.0%}**" if value > top - NEAR else f"{value:.0%}"
        for value, top in zip(right[arm], best, strict=True)
    ).replace("%", "")


def not_run() -> str:
    """Studies without results."""
    missing = [
        p.stem for p in sorted(FOLDER.glob("*.toml")) if not (RESULTS / p.stem / "runs.jsonl").exists()
    ]
    if not missing:
        return "Every study in `studies/` has been run at the size for two cores."
    begun = [name for name in missing if (RESULTS / name / "sweep.jsonl").exists()]
    said = [
        f"{what}: {', '.join(f'`{name}`' for name in names)}."
        for what, names in (
            (
                "These stand in `studies/` with their claims, and have not been run",
                sorted({*missing} - {*begun}),
            ),
            ("The sweep of learning rates has run, or a part of it, and no verdict is there, of", begun),
        )
        if names
    ]
    return " ".join(said)


def every_result() -> str:
    """All pages with their titles, the studies first."""
    pages = [p.parent.name for p in RESULTS.glob("*/README.md")]
    lines = ["| page | what it is |", "|---|---|"]
    for name in sorted(pages, key=lambda n: ([*LETTERS, n].index(n), n)):
        title = (
            (RESULTS / name / "README.md").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        )
        lines.append(f"| [{name}]({name}/README.md) | {title} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "tasks": task_table,
    "verdicts": verdict_table,
    "not run": not_run,
    "all": every_result,
}


def written(page: str) -> str:
    """The page with its tables as the raw data has them.

    Raises:
        ValueError: if a table has no place in it.
    """
    for name, make in TABLES.items():
        place = re.compile(f"(<!-- {name} -->\n)(?:.*?\n)??(<!-- end -->)", re.S)
        table = make()
        page, found = place.subn(lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", page)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"{PAGE} must have one place <!-- {name} --> ... <!-- end -->, has {found}")
    return page


def main() -> int:
    """Write or check page and figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    firsts = first_verdicts()
    if check and text_of(FIGURE) != shown(firsts):
        print(f"{FIGURE} shows other data; run python {sys.argv[0]}", file=sys.stderr)
        return 1
    if check and after != before:
        print(f"{PAGE} differs from the raw data; run python {sys.argv[0]}", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(after, encoding="utf-8")
        draw_verdicts(firsts, FIGURE)
        print(f"written: {PAGE}, {FIGURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
