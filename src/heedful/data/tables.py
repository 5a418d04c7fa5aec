"""Tables of texts, read through the `datasets` library: one row is one document."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TRAIN = "train"
VALIDATION = ("validation", "valid", "val", "dev", "eval", "test")

_DICT, _INFO, _STATE = "dataset_dict.json", "dataset_info.json", "state.json"


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` made this folder."""
    return (folder / _DICT).is_file() or ((folder / _INFO).is_file() and (folder / _STATE).is_file())


def splits(folder: Path) -> list[str]:
    """The splits of a saved `DatasetDict`; [] for one saved `Dataset`."""
    if not (folder / _DICT).is_file():
        return []
    try:
        return list(json.loads((folder / _DICT).read_text(encoding="utf-8"))["splits"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / _DICT} is damaged; save the dataset again") from None


def training_split(folder: Path) -> str | None:
    """The split of a saved folder to train on: `train`, or the only one; None where it has no splits.

    Raises:
        ValueError: there are several, none of them called train.
    """
    names = splits(folder)
    if len(names) > 1 and TRAIN not in names:
        raise ValueError(
            f"{folder} has the splits {', '.join(names)}, expected one of the name {TRAIN}; save that one alone"
        )
    return TRAIN if TRAIN in names else next(iter(names), None)


def validation_split(folder: Path) -> str | None:
    """The split of a saved folder that was made to measure on, beside its `train`; None where it has none."""
    names = splits(folder)
    return next((name for name in VALIDATION if name in names), None) if TRAIN in names else None


def read_table(file: Path, column: str) -> list[str]:
    """The texts of one .jsonl, .json, .csv, .tsv or .parquet file; rows without text are left out.

    Args:
        file: a JSON file has an object per line, or is one list of objects; CSV and TSV have a header.
        column: which column holds the text.

    Raises:
        ValueError: there is no such column, it holds no text, or the file cannot be read.
        ImportError: `datasets` is missing.
    """
    kind = file.suffix.lower()
    if not file.stat().st_size:
        return []
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        _quiet_datasets(file) as datasets,
    ):
        if kind == ".parquet":
            table = datasets.Dataset.from_parquet(str(file), cache_dir=scratch)
        elif kind in (".csv", ".tsv"):
            # A text may be the word NA or a number.
            options = {"keep_default_na": False, "converters": {column: str}}
            separator = "\t" if kind == ".tsv" else ","
            table = datasets.Dataset.from_csv(str(file), cache_dir=scratch, sep=separator, **options)
        else:
            table = datasets.Dataset.from_json(str(file), cache_dir=scratch)
        return _texts(table, column, str(file))


def read_saved(folder: Path, split: str | None, column: str) -> list[str]:
    """The texts of a folder that `save_to_disk` made, or of one split of it; as `read_table`."""
    with _quiet_datasets(folder) as datasets:
        table = datasets.load_from_disk(str(folder))
        return _texts(
            table if split is None else table[split], column, f"{folder}{f' ({split})' if split else ''}"
        )


class _WrongColumn(ValueError):
    """Said already as plainly as can be."""


def _texts(table: Any, column: str, name: str) -> list[str]:
    if column not in table.column_names:
        raise _WrongColumn(
            f"{name} has no column {column!r}, expected the texts there; it has "
            f"{', '.join(table.column_names) or 'none'}: name one with --text-column"
        )
    dtype = getattr(table.features[column], "dtype", str(table.features[column]))
    if dtype not in ("string", "large_string", "string_view", "null"):
        raise _WrongColumn(
            f"the column {column!r} of {name} holds {dtype}, expected text; name another with --text-column"
        )
    texts = (text.replace("\r\n", "\n").replace("\r", "\n").strip() for text in table[column] if text)
    return [text for text in texts if text]


@contextmanager
def _quiet_datasets(source: Path) -> Iterator[Any]:
    """`datasets` without its bars and logs, its errors as one line about `source`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'reading {source.name} needs datasets (no module {error.name}); run: pip install "heedful[lm]"'
        ) from error
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield datasets
    except (_WrongColumn, MemoryError):
        raise
    except Exception as error:  # of every library below it
        cause = error.__cause__ or error
        if "corresponds to no data" in str(error):
            raise ValueError(f"{source} is empty: it has no rows; give one with text in it") from None
        reason = (str(cause) or type(cause).__name__).strip().splitlines()[0]
        what = "saved dataset" if source.is_dir() else f"{source.suffix.lower()} file"
        raise ValueError(
            f"{source} cannot be read as a {what} ({reason}); check it or save it again"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
