"""budget.jsonl: what a search has decided so far, a line each, so that a stop loses nothing."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from heedful.evaluation.search import Move
from heedful.files import write_text
from heedful.hf.converted.checkpoint import Checkpoint

_DIGESTS = {
    "search_rows": "the rows to search on are others",
    "baseline": "the baseline is another",
    "model": "the weights of the model are others",
}


class SearchLog:
    """The decisions of one search: the first line holds its settings, every other line a move.

    Args:
        path: the file; nothing is written before the first `append`.
        settings: what the search depends on, as plain data.
        restart: forget what `path` holds.

    Raises:
        ValueError: if `path` is damaged or holds a search with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], restart: bool = False) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.moves: list[Move] = []
        """The moves so far."""
        self._begun = False
        if path.exists() and not restart:
            self._read()

    def append(self, move: Move) -> None:
        """Write a move at once, down to the disk."""
        if not self._begun:
            self._rewrite()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(move.to_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.moves.append(move)

    def _read(self) -> None:
        # A line without its end is one that a crash or a full disk cut off.
        whole = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        if not whole:
            return
        try:
            before, *moves = [json.loads(line) for line in whole]
            if not isinstance(before, dict) or "target" not in before:
                raise TypeError("its first line holds no settings")
            self._check(before)
            self.moves = [Move.from_dict(move) for move in moves]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); delete or rename it, or pass --restart"
            ) from None

    def _check(self, before: dict[str, Any]) -> None:
        changed = [
            _DIGESTS.get(name) or f"{name} was {_short(before.get(name))}, is {_short(value)}"
            for name, value in self.settings.items()
            if not _equal(before.get(name), value)
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds a search with other settings ({'; '.join(changed)}); repeat those to go on "
                f"with it, or delete or rename it, or pass --restart"
            )
        self.settings = before

    def _rewrite(self) -> None:
        """The settings and the moves so far, whole or not at all."""
        lines = [self.settings, *(move.to_dict() for move in self.moves)]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._begun = True


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's files of weights."""
    digest = hashlib.sha256()
    for name in Checkpoint.read(folder).files:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _equal(before: Any, now: Any) -> bool:
    if isinstance(before, float) and isinstance(now, float):
        # A loss measured again, perhaps with another number of threads.
        return math.isclose(before, now, rel_tol=0, abs_tol=1e-6)
    return before == now


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
