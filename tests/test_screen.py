"""Tables of any width, and how wide a screen is."""

import io

import pytest
from rich.console import Console

from heedful.screen import FILE_WIDTH, Column, counted, progress_bar, screen_width, spinner, table, text

COLUMNS = [text("case"), Column("time"), Column("spread", optional=True), Column("copy", optional=True)]
ROWS = [("one name of some words", "12.5 ms", "3%", "40%"), ("two", "1.0 ms", "10%", "4%")]


def shown(width: int, **options: object) -> str:
    """What a screen of `width` columns shows."""
    screen = io.StringIO()
    made = table(COLUMNS, ROWS, width=width, **options)  # type: ignore[arg-type]
    Console(file=screen, width=width).print(made)
    return screen.getvalue()


@pytest.mark.parametrize("width", [24, 40, 50, 60, 200])
def test_nothing_is_cut_off(width: int):
    out = shown(width, title="a title that is longer than the table of the figures")
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    words = " ".join(out.split())
    for cell in ("12.5 ms", "1.0 ms", "two", "case", "time"):
        assert cell in words


def test_the_last_optional_column_goes_first_and_is_named():
    whole = shown(100)
    assert "narrow screen" not in whole
    natural = max(len(line.rstrip()) for line in whole.splitlines())
    narrower = shown(natural - 1)
    assert "narrow screen, left out: copy" in narrower
    assert "spread" in narrower.partition("too narrow")[0]
    assert "narrow screen, left out: spread, copy" in " ".join(shown(36).split())


def test_without_a_width_all_columns_stay():
    made = table(COLUMNS, ROWS)
    assert [column.header for column in made.columns] == ["case", "time", "spread", "copy"]


def test_width_of_the_screen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert screen_width(Console(file=io.StringIO())) == FILE_WIDTH
    assert screen_width(Console(file=io.StringIO(), force_terminal=True, width=70)) == 70
    monkeypatch.setenv("COLUMNS", "60")
    assert screen_width(Console(file=io.StringIO())) == 60


def test_one_of_something():
    assert [counted(n, "layer") for n in (0, 1, 2000)] == ["0 layers", "1 layer", "2,000 layers"]


def test_nothing_moves_where_there_is_no_terminal():
    screen = io.StringIO()
    console = Console(file=screen)
    with spinner(console, "working"), progress_bar(console) as bar:
        bar.update(bar.add_task("steps", total=2), completed=1)
    assert screen.getvalue().strip() == ""
    terminal = io.StringIO()
    with progress_bar(Console(file=terminal, force_terminal=True, width=80), transient=False) as bar:
        bar.update(bar.add_task("steps", total=2), completed=1)
    assert "1/2" in terminal.getvalue()
