"""What a person sees: one look for all tables, one for all progress, for a screen of any width."""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from rich import box
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

FILE_WIDTH = 100
"""Columns of text that goes into a file."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    right: bool = True
    """Numbers stand at the right."""
    breaks: bool = False
    """Whether a cell may be broken between words where the screen is narrow."""
    optional: bool = False
    """Left out on a screen that is too narrow, the last one first."""


def text(name: str, optional: bool = False) -> Column:
    """A column of words: at the left, broken between words where the screen is narrow."""
    return Column(name, right=False, breaks=True, optional=optional)


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    width: int | None = None,
    lines_after: Iterable[int] = (),
) -> Table:
    """A table in the one look that all of them have.

    Args:
        columns: what they are.
        rows: the cells, as text with rich's markup.
        title: above it, at the left.
        width: of the screen; if given, optional columns that do not fit are left out, and named below.
        lines_after: numbers of the rows below which a line is drawn.
    """
    rows, after = list(rows), set(lines_after)
    left_out: list[Column] = []
    shown = list(columns)
    while True:
        made = _table(shown, [[row[columns.index(c)] for c in shown] for row in rows], title, after)
        optional = [column for column in shown if column.optional]
        if width is None or not optional or _natural_width(made) <= width:
            break
        left_out.insert(0, optional[-1])
        shown.remove(optional[-1])
    if left_out:
        made.caption = f"too narrow for: {', '.join(column.name for column in left_out)}"
        made.caption_justify = "left"
    return made


def _table(columns: Sequence[Column], rows: Iterable[Sequence[str]], title: str, after: set[int]) -> Table:
    made = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="bold cyan",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in columns:
        made.add_column(column.name, justify="right" if column.right else "left", no_wrap=not column.breaks)
    for number, row in enumerate(rows):
        made.add_row(*row, end_section=number in after)
    return made


def _natural_width(made: Table) -> int:
    """Columns of the screen that the cells need if nothing is broken; a long title may be."""
    title, made.title = made.title, None
    try:
        wide = Console(width=10_000)
        return wide.measure(made).maximum
    finally:
        made.title = title


def screen_width(console: Console | None = None) -> int:
    """The columns of the terminal or of COLUMNS; where there is neither, those of a file."""
    console = console or Console()
    return console.width if console.is_terminal or os.environ.get("COLUMNS") else FILE_WIDTH


def spinner(console: Console, what: RenderableType) -> AbstractContextManager[object]:
    """Say what is being done while it is; nothing where the output is no terminal."""
    return console.status(what) if console.is_terminal else nullcontext()


def progress_bar(
    console: Console, *fields: str, counted: bool = True, remaining: bool = True, transient: bool = True
) -> Progress:
    """A bar over a known number of steps.

    Args:
        console: where to draw it.
        fields: of the task, shown behind the bar.
        counted: show the numbers of steps done and to do.
        remaining: show the time that is left instead of the time that has gone.
        transient: take it off the screen at the end.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=None)]
    columns += [MofNCompleteColumn()] * counted
    columns += [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    columns.append(TimeRemainingColumn() if remaining else TimeElapsedColumn())
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)
