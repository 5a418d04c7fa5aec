"""What a person sees: one look for all tables, one for all progress, for a screen of any width."""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

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
from rich.text import Text

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
    cells, after = [list(row) for row in rows], set(lines_after)
    shown, left_out = list(range(len(columns))), list[int]()
    while True:
        picked = [columns[i] for i in shown]
        made = _table(picked, [[row[i] for i in shown] for row in cells], title, after)
        optional = [i for i in shown if columns[i].optional]
        if width is None or not optional or _natural_width(made) <= width:
            break
        left_out.insert(0, optional[-1])
        shown.remove(optional[-1])
    if left_out:
        names = ", ".join(columns[i].name.replace("\n", " ") for i in left_out)
        made.caption = f"narrow screen, left out: {names}"
        made.caption_justify = "left"
    if width is not None:
        _break_cells(made, width)
    return made


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str, after: set[int]) -> Table:
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
        justify: Literal["left", "right"] = "right" if column.right else "left"
        made.add_column(column.name, justify=justify, no_wrap=not column.breaks, overflow="fold")
    for number, row in enumerate(rows):
        made.add_row(*row, end_section=number in after)
    return made


def _natural_width(made: Table) -> int:
    """Columns of the screen that the cells need if nothing is broken; a long title may be."""
    title, made.title = made.title, None
    try:
        return Console(width=10_000).measure(made).maximum
    finally:
        made.title = title


def _break_cells(made: Table, width: int) -> None:
    """Narrow the columns that may be broken, the widest first, none below its longest word."""
    plain = [[Text.from_markup(str(cell)).plain for cell in (c.header, *c.cells)] for c in made.columns]
    widths = [max(len(line) for cell in cells for line in cell.split("\n")) for cells in plain]
    longest = [max((len(word) for cell in cells for word in cell.split()), default=0) for cells in plain]
    excess = _natural_width(made) - width
    while excess > 0:
        can = [i for i, c in enumerate(made.columns) if not c.no_wrap and widths[i] > longest[i]]
        if not can:
            return  # words are longer than the screen is wide: rich folds them
        widest = max(can, key=widths.__getitem__)
        widths[widest] -= 1
        excess -= 1
    for column, wanted in zip(made.columns, widths, strict=True):
        column.width = wanted


def screen_width(console: Console | None = None) -> int:
    """The columns of the terminal or of COLUMNS; where there is neither, those of a file."""
    console = console or Console()
    return console.width if console.is_terminal or os.environ.get("COLUMNS") else FILE_WIDTH


def counted(n: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{n} {what}" if n == 1 else f"{n:,} {what}s"


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
