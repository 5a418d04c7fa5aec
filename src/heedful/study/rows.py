"""Rows of raw data: JSON, one per line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heedful.training.settings import TrainSettings


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


class OtherStudies:
    """What the studies beside one have trained: a run with the very same settings need not be trained again."""

    def __init__(self, out: Path) -> None:
        self._rows: dict[str, tuple[str, dict[str, Any]]] = {}
        for path in sorted(out.parent.glob("*/*.jsonl")):
            if path.parent == out or path.name not in ("runs.jsonl", "sweep.jsonl"):
                continue
            for row in read_rows(path):
                if "config" in row and "device" in row and "study" not in row:
                    self._rows.setdefault(_key(row["config"]["train"]), (path.parent.name, row))

    def find(self, settings: TrainSettings) -> tuple[str, dict[str, Any]] | None:
        """The study that has such a run, and its row; None if there is none."""
        return self._rows.get(_key(settings.to_dict()))


def _key(settings: Mapping[str, Any]) -> str:
    """Settings, with what is newer than a row at its default."""
    return json.dumps({**TrainSettings().to_dict(), **settings}, sort_keys=True)
