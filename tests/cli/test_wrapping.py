"""Help fits the screen."""

from collections.abc import Callable
from typing import Any

import pytest

from heedful.cli import COMMANDS
from heedful.cli.bench import BENCHMARKS
from heedful.cli.wrapping import wrapped

TEXT = """A paragraph that is written
on two lines.

    heedful ls
    heedful train --steps 10 --out runs/a   # in a minute
    heedful show sas                        # its formula
    heedful doctor

  name    what it is, in more words than fit
  other   short"""


def test_wrapped():
    assert wrapped(TEXT, 200) == TEXT.replace("written\non", "written on")
    assert wrapped(TEXT, 40).splitlines() == [
        "A paragraph that is written on two",
        "lines.",
        "",
        "    heedful ls",
        "",
        "    # in a minute",
        "    heedful train --steps 10 --out runs/a",
        "",
        "    heedful show sas  # its formula",
        "    heedful doctor",
        "",
        "  name    what it is, in more words than",
        "          fit",
        "  other   short",
    ]
    assert wrapped(wrapped(TEXT, 40), 40) == wrapped(TEXT, 40)


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("command", ["", *COMMANDS, *(f"bench {name}" for name in BENCHMARKS)])
def test_help_fits(heedful: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: str, width: int):
    monkeypatch.setenv("COLUMNS", str(width))
    out = heedful(*command.split(), "--help").out
    commands = [line.strip() for line in out.splitlines() if line.startswith(("    heedful ", "    --"))]
    for line in out.splitlines():  # tyro writes the usage on one line
        assert len(line) <= width or line.strip() in commands or line.startswith("usage: "), line
    assert max(map(len, out.splitlines())) <= max(100, width)
