"""BLiMP: pairs of sentences of which one is good English (Warstadt et al., 2020); from a folder of the user's."""

import json
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset

FIELDS = "sentence_good", "sentence_bad", "UID"


def blimp(*, task_data: str | None = None, **rest: Any) -> dict[str, Dataset]:
    """All pairs, one of each paradigm in turn, so that the first few are of all kinds; as the split "test".

    Args:
        task_data: folder of a .jsonl file per paradigm, or one that holds it as `blimp` or `data`.
        **rest: what other tasks read.

    Raises:
        FileNotFoundError: without such a folder.
        ValueError: for a damaged file.
    """
    if task_data is None:
        raise FileNotFoundError(
            "the task 'blimp' reads a folder with the .jsonl files of BLiMP, and none was named: "
            """--task-data FOLDER (with lm_eval: --metadata '{"task_data": "FOLDER"}')"""
        )
    files = _files(Path(task_data))
    turns = zip_longest(*(_pairs(file) for file in files))
    return {"test": Dataset.from_list([pair for pair in chain.from_iterable(turns) if pair is not None])}


def _files(folder: Path) -> list[Path]:
    for place in (folder, folder / "blimp", folder / "data", folder / "blimp" / "data"):
        if files := sorted(place.glob("*.jsonl")):
            return files
    raise FileNotFoundError(
        f"{folder} holds no .jsonl files, expected a folder with those of BLiMP, one per paradigm"
    )


def _pairs(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                good, bad, paradigm = (json.loads(line)[field] for field in FIELDS)
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{file}, line {number}: expected JSON with {', '.join(FIELDS)}; is it a file of BLiMP?"
                ) from None
            yield {"choices": [good, bad], "part": paradigm}
