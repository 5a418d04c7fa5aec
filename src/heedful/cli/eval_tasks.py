"""`heedful eval --tasks`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.cli.errors import UsageError
from heedful.cli.parsing import split
from heedful.errors import Interrupted
from heedful.files import write_json
from heedful.lm_eval import check_installed
from heedful.screen import Column, progress_bar, spinner, table, text

RAW = "tasks.json"
LINE_EVERY = 10.0  # seconds, where there is no bar


def run_tasks(
    folder: Path, values: dict[str, Any], budgets: Sequence[Any], policies: Sequence[str] | None, out: Path
) -> int:
    """Measure tasks of lm-evaluation-harness, and leave table and raw results.

    Raises:
        ImportError: without the harness.
        UsageError: for flags that cannot be.
    """
    check_installed()
    names = split("--tasks", values["tasks"], str)
    lengths = split("--length", values["length"], int)
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise UsageError(
            f"--length takes different numbers above 0, separated by commas, got {values['length']!r}"
        )
    if values["limit"] is not None and values["limit"] < 1:
        raise UsageError(f"--limit must be 1 or more, got {values['limit']}")
    for name, task in (("data", "text"), ("task_data", "blimp")):
        if values[name] is not None and task not in names:
            raise UsageError(
                f"--{name.replace('_', '-')} belongs to the task {task!r}, which is not among --tasks"
            )
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, expected a folder for the results; use another --out")

    from heedful.evaluation.kv_budget import check_policies, default_policies
    from heedful.lm_eval.model import HeedfulLM
    from heedful.lm_eval.run import TaskResult, measure
    from heedful.lm_eval.tasks import Given, load_tasks, quiet
    from heedful.training.settings import SETTINGS, TrainSettings

    console = Console(highlight=False)
    screen = Console(stderr=True, highlight=False)
    model = HeedfulLM(folder)
    try:
        check_policies(model.model, policies or default_policies(model.model))
    except ValueError as error:
        raise UsageError(f"--policy: {error}") from None
    own = folder / SETTINGS
    usual = TrainSettings.load(own).context if own.exists() else 2048
    context = values["context"] or min(usual, model.max_length)
    for flag, tokens in (("--context", context), ("--length", max(lengths))):
        if tokens > model.max_length:
            raise UsageError(f"{flag} {tokens} is more than the model reads, {model.max_length} tokens")
    quiet()
    given = Given(
        folder,
        lengths,
        values["limit"] or Given.examples,
        data=values["data"],
        text_column=values["text_column"] or Given.text_column,
        task_data=values["task_data"],
        context=context,
    )
    with spinner(screen, "making the tasks"):
        tasks = load_tasks(names, given)
    chosen = policies or default_policies(model.model)
    out.mkdir(parents=True, exist_ok=True)
    todo = len(tasks) * sum(1 if budget == "full" else len(chosen) for budget in budgets)
    results: list[TaskResult] = []
    progress = _Progress([task.name for task in tasks], todo, screen)
    try:
        with progress:
            for result in measure(
                model,
                tasks,
                budgets,
                chosen,
                grace=values["kv_grace"],
                first=values["kv_first"],
                limit=values["limit"],
                context=context,
                progress=progress.update,
            ):
                results.append(result)
                write_json(out / RAW, _raw(folder, values["limit"], results))
    except KeyboardInterrupt:
        if results:
            _print(results, console)
        kept = f"those done are in {out / RAW}" if results else "nothing was written"
        raise Interrupted(f"stopped after {len(results)} of {todo} measurements; {kept}") from None
    _print(results, console)
    console.print(f"written: {out / RAW}", soft_wrap=True)
    return 0


def _raw(folder: Path, limit: int | None, results: Sequence[Any]) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "model": str(folder),
        "limit": limit,
        "versions": {name: version(name) for name in ("heedful", "lm_eval", "transformers", "torch")},
        "results": [result.to_dict() for result in results],
    }


class _Progress:
    """A bar over all measurements; where the output is no terminal, a line now and then."""

    def __init__(self, names: Sequence[str], todo: int, console: Console) -> None:
        self.names, self.todo, self.console = names, todo, console
        self.last_line = time.perf_counter()
        self.bar = progress_bar(console, "place", counted=False)
        self.task = self.bar.add_task(names[0], total=todo, place=f"1 of {todo}")

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, number: int, done: int, total: int) -> None:
        """Some more requests of a measurement are answered."""
        name, place = self.names[number % len(self.names)], f"{number + 1} of {self.todo}"
        self.bar.update(self.task, completed=number + done / total, description=name, place=place)
        if not self.console.is_terminal and time.perf_counter() - self.last_line > LINE_EVERY:
            self.last_line = time.perf_counter()
            self.console.print(f"{name}  {place}  {done:,} of {total:,} requests")


def _print(results: Sequence[Any], console: Console) -> None:
    """A line per figure and measurement, those of one figure together."""
    columns = [text("task"), text("metric"), text("policy"), Column("tokens"), Column("held")]
    columns += [Column("value"), Column("±", optional=True)]
    rows: list[tuple[str, ...]] = []
    ends: list[int] = []
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        for key in dict.fromkeys((f.task, f.metric) for result in own for f in result.figures):
            for result in own:
                for figure in result.figures:
                    if (figure.task, figure.metric) == key:
                        rows.append(_row(result, figure))
            ends.append(len(rows) - 1)
    console.print(table(columns, rows, width=console.width, lines_after=ends[:-1]))
    idle = [result for result in results if result.policy is not None and not result.evicted]
    for name in dict.fromkeys(result.name for result in idle):
        budgets = dict.fromkeys(str(result.kv_budget) for result in idle if result.name == name)
        console.print(f"{name}: no text is longer than a cache of {', '.join(budgets)}: nothing was evicted")


def _row(result: Any, figure: Any) -> tuple[str, ...]:
    full = result.policy is None
    return (
        figure.task,
        figure.metric,
        "full cache" if full else result.policy,
        "" if full else str(result.kv_budget),
        str(result.held),
        f"{figure.value:.4f}",
        "" if figure.error is None else f"{figure.error:.4f}",
    )
