"""Rows of raw data: JSON, one per line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heedful.study.plan import DEFAULT_DATA
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
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no table")
            rows.append(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error}); delete that line") from None
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One row more."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class OtherStudies:
    """What the studies beside one have trained: a run with the very same settings need not be trained again.

    A study whose rows are damaged lends none.
    """

    def __init__(self, out: Path) -> None:
        self._rows: dict[str, tuple[str, dict[str, Any]]] = {}
        self.damaged: list[str] = []
        """What is wrong with those that lend none."""
        for path in sorted(out.parent.glob("*/*.jsonl")):
            if path.parent == out or path.name not in ("runs.jsonl", "sweep.jsonl"):
                continue
            try:
                rows = read_rows(path)
            except ValueError as error:
                self.damaged.append(str(error))
                continue
            for row in rows:
                if "config" in row and "device" in row and "study" not in row:
                    self._rows.setdefault(_key(row["config"]["train"]), (path.parent.name, row))

    def find(self, settings: TrainSettings, digest: str) -> tuple[str, dict[str, Any]] | None:
        """The study that has such a run on the same data, and its row; None if there is none.

        Rows of before there were digests stand where the data comes with heedful.
        """
        found = self._rows.get(_key(settings.to_dict()))
        if found is None:
            return None
        ours = settings.data == DEFAULT_DATA or settings.data.startswith("synthetic:")
        return found if found[1].get("data_digest") in (digest, *([None] if ours else [])) else None


def _key(settings: Mapping[str, Any]) -> str:
    """Settings, with what is newer than a row at its default."""
    return json.dumps({**TrainSettings().to_dict(), **settings}, sort_keys=True)
