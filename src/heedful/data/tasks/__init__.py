"""Synthetic tasks: what a model has to remember, count or find. `--data synthetic:NAME`, one file each."""

from typing import Any

from heedful.data.tasks.copying import Copy, SelectiveCopy
from heedful.data.tasks.induction import Induction
from heedful.data.tasks.mqar import MQAR
from heedful.data.tasks.needle import Needle
from heedful.data.tasks.parity import Parity
from heedful.data.tasks.score import answer_accuracy
from heedful.data.tasks.sorting import Sorting
from heedful.data.tasks.task import Task
from heedful.data.tasks.variable_assignment import VariableAssignment
from heedful.data.tasks.variable_tracking import VariableTracking
from heedful.ops.checks import check_most, did_you_mean

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        VariableAssignment,
        VariableTracking,
        MQAR,
        Induction,
        Copy,
        SelectiveCopy,
        Needle,
        Sorting,
        Parity,
    )
}
"""By name."""

PREFIX = "synthetic"
MOST = 2**20
"""What an option of a task may say."""


def task_class(data: str) -> type[Task] | None:
    """The task that `synthetic:NAME` names; None for other data.

    Raises:
        ValueError: if there is no such task.
    """
    prefix, _, name = data.partition(":")
    if prefix != PREFIX:
        return None
    if name not in TASKS:
        known = ", ".join(f"{PREFIX}:{task}" for task in TASKS)
        raise ValueError(
            f"there is no synthetic task {name!r}; {did_you_mean(name, TASKS)}expected one of: {known}"
        )
    return TASKS[name]


def task_of(data: str, options: dict[str, Any]) -> Task | None:
    """The task that `synthetic:NAME` names, with its options; None for other data.

    Raises:
        ValueError: if there is no such task, it has no such option, or other data is given options.
    """
    found = task_class(data)
    if found is None:
        if options:
            raise ValueError(f"--task.* are options of synthetic tasks; {data!r} is none: leave them out")
        return None
    unknown = [name for name in options if name not in found.__dataclass_fields__]
    if unknown:
        known = [*found.__dataclass_fields__]
        raise ValueError(
            f"synthetic:{found.name} has no option {unknown[0]!r}; {did_you_mean(unknown[0], known)}options: "
            f"{', '.join(known)}"
        )
    for name, value in options.items():
        if isinstance(value, int):
            check_most(f"--task.{name.replace('_', '-')}", value, MOST)
    return found(**options)


__all__ = ["TASKS", "Task", "answer_accuracy", "task_class", "task_of"]
