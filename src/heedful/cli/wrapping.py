"""Help that fits the screen; without rich, so that it is there without the extras."""

import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

WIDEST, NARROWEST = 100, 40


def wrapped(text: str, width: int | None = None) -> str:
    """Break the lines of a help text.

    Paragraphs are filled. Of an indented line `  name  what it is`, what it is hangs below itself. An indented
    command is never broken, since it is there to be copied: a comment behind it moves closer, or above it, and
    blank lines set the two apart.

    Args:
        text: paragraphs, and indented lines.
        width: columns; those of the terminal, at most 100, if None.
    """
    width = width or max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
    lines: list[str] = []
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip() and not line.startswith(" "):
            paragraph.append(line)
            continue
        if paragraph:
            lines += textwrap.wrap(" ".join(paragraph), width, break_long_words=False, break_on_hyphens=False)
            paragraph = []
        made = _indented(line, width) if line.strip() else [""]
        if lines and lines[-1] and made != [""] and (_comment_above(made) or _comment_above(lines[-2:])):
            lines.append("")
        lines += made
    return "\n".join(lines[:-1])


def _comment_above(lines: Sequence[str]) -> bool:
    """Whether these are a comment and its command."""
    return len(lines) == 2 and lines[0].lstrip().startswith("# ")


def _indented(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = len(line) - len(line.lstrip())
    command = line.split("  # ")
    if len(command) == 2:
        closer = f"{command[0].rstrip()}  # {command[1].strip()}"
        return (
            [closer]
            if len(closer) <= width
            else [" " * indent + f"# {command[1].strip()}", command[0].rstrip()]
        )
    columns = re.match(r"( +\S+(?: \S+)* {2,})\S", line)
    if columns is None:
        return [line]
    hang = " " * len(columns[1])
    return textwrap.wrap(line, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)


def print_report(report: dict[str, Any], lines: Sequence[str] | None) -> None:
    """Print lines of one fact each, broken where the screen ends; the report as JSON where there are none."""
    if lines is None:
        print(json.dumps(report, indent=2))
        return
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    for line in lines:
        print(
            textwrap.fill(
                line, width, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
            )
        )
