"""Rows of raw data: JSON, one per line."""

import json
import os
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


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The rows of runs, each run once.

    Raises:
        ValueError: for a row that is none of a run, naming it.
    """
    runs: dict[str, dict[str, Any]] = {}
    for row in read_rows(path):
        if missing := [name for name in ("run", "arm", "role", "seed", "val_loss") if name not in row]:
            raise ValueError(
                f"{path} has a row that is none of a run: {', '.join(missing)} missing; delete it"
            )
        runs.setdefault(row["run"], row)
    return list(runs.values())


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One row more, on a line of its own whatever the file ends with."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def read_table(path: Path, *names: str) -> dict[str, Any]:
    """A JSON file with these names in it.

    Raises:
        ValueError: if it has not, or is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if missing := [name for name in names if not isinstance(found, dict) or name not in found]:
            raise ValueError(f"no {', '.join(missing)}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away, or use another --out") from None
    return dict(found)


def same_settings(row: Mapping[str, Any], settings: TrainSettings) -> bool:
    """Whether a run had these settings, but for where its data lie: of those its digest tells."""
    before, now = ({**s, "data": ""} for s in (row["config"]["train"], settings.to_dict()))
    return _key(before) == _key(now)


class OtherStudies:
    """What the studies beside one have trained: a run with the very same settings need not be trained again.

    A study whose rows are damaged lends none.
    """

    def __init__(self, out: Path, lend: bool = True) -> None:
        self._rows: dict[str, tuple[str, dict[str, Any]]] = {}
        self.damaged: list[str] = []
        """What is wrong with those that lend none."""
        for path in sorted(out.parent.glob("*/*.jsonl")) if lend else ():
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
