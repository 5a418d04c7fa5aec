"""From the names of tasks to tasks: ours, which need no network, and those of lm-evaluation-harness."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from heedful.lm_eval import TASKS
from heedful.ops.checks import did_you_mean

OURS = tuple(sorted(file.stem for file in TASKS.glob("*.yaml")))
SIZED = "copy", "mqar", "needle", "needle_multikey", "variable_tracking"
"""Those that are made as long as is asked for."""
SENTENCE = 128
"""Tokens that a sentence of BLiMP stays below, whatever the tokenizer."""


@dataclass(frozen=True)
class Given:
    """What tasks are made with."""

    run: Path
    """Folder of the model, whose tokenizer says how long a text is."""
    lengths: tuple[int, ...] = (512,)
    """Tokens of a text with its answer, for tasks in `SIZED`, each measured with each."""
    examples: int = 100
    """How many texts are made."""
    data: str | None = None
    """What the task `text` reads."""
    text_column: str = "text"
    """Where its texts are, if it is a table."""
    task_data: str | None = None
    """The folder that `blimp` reads."""
    context: int = 2048
    """Tokens of a piece of `text`."""


@dataclass(frozen=True)
class LoadedTask:
    """One thing to measure."""

    name: str
    tasks: Any
    """What the harness evaluates: one task, or a group of them."""
    tokens: int | None
    """The most that a request has, where it is known."""


def load_tasks(names: Sequence[str], given: Given) -> list[LoadedTask]:
    """The tasks of these names; of those in `SIZED` one for each length.

    Raises:
        ValueError: for no name, an unknown one or one given twice, or what a task refuses.
        FileNotFoundError: where a task has no data.
    """
    if not names:
        raise ValueError(f"expected one task or more, got none; ours are {', '.join(OURS)}")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"the task {name} is named twice; leave one out")
    theirs = None
    if any(name not in OURS for name in names):
        theirs = TaskManager(metadata={"pretrained": str(given.run)})
        for name in names:
            if name not in (*OURS, *theirs.all_tasks):
                raise ValueError(
                    f"the task {name!r} is not known; {did_you_mean(name, (*OURS, *theirs.all_tasks))}ours are "
                    f"{', '.join(OURS)}; `lm_eval ls tasks` lists those of the harness"
                )
    found: list[LoadedTask] = []
    for name in names:
        if name not in OURS:
            assert theirs is not None
            found.append(LoadedTask(name, _ready(theirs.load([name])), None))
        for length in given.lengths if name in SIZED else (None,) if name in OURS else ():
            found.append(_ours(name, length, given))
    return found


def _ours(name: str, length: int | None, given: Given) -> LoadedTask:
    metadata: dict[str, Any] = {"pretrained": str(given.run)}
    if length is not None:
        metadata |= {"length": length, "examples": given.examples}
    if name == "text":
        metadata |= {"data": given.data, "text_column": given.text_column}
    if name == "blimp":
        metadata |= {"task_data": given.task_data}
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=metadata)
    loaded: Any = manager.load([name])
    if length is not None:
        task, name = loaded["tasks"][name], f"{name}_{length}"
        task.set_config("task", name)
        loaded["tasks"] = {name: task}
    return LoadedTask(name, _ready(loaded), length or {"text": given.context}.get(name, SENTENCE))


def _ready(loaded: Any) -> Any:
    """As the harness's own `simple_evaluate` prepares tasks."""
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def quiet() -> None:
    """Keep the harness from remarks on the tasks themselves; what it says of requests stays."""
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
