"""Rows of raw data: JSON, one per line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if there is no file.

    Raises:
        ValueError: for a line that is no JSON, naming it.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error}); delete that line") from None
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One row more."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
