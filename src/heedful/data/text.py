"""Text to train on and text to measure on: two lists of documents that never overlap."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from heedful.data import tables
from heedful.data.austen import load_austen
from heedful.data.reading import TEXT_COLUMN, Source, find_sources

VALIDATION_SHARE = 0.1
MIN_CHARACTERS = 100

# Where one long document may be cut, best first.
_BREAKS = ("\n\n", "\n", " ")


@dataclass(frozen=True)
class Text:
    """Documents of one data source, split for training and validation."""

    name: str
    """What the text is called: `austen`, or the name of the file or folder."""
    train: list[str]
    """Documents to train on."""
    validation: list[str]
    """Documents to measure on; no file position is in both."""


def load_text(
    data: str | Path = "austen", validation: str | Path | None = None, *, column: str = TEXT_COLUMN
) -> Text:
    """Read documents and hold some out.

    Args:
        data: `"austen"` (bundled), a file, a folder whose files are read recursively in sorted order, or
            one that `datasets` saved. In text (.txt, .md, no ending) two blank lines, or a line holding only
            `<|endoftext|>`, end a document. In tables (.jsonl, .json, .csv, .tsv, .parquet, saved datasets)
            one row is one document. A path of the name austen is written `./austen`.
        validation: the same forms. Files also found under `data` are left out of training.
            When None: the bundled corpus holds out its last novel, a saved `DatasetDict` its validation (or
            test) split, a folder its last files that make at least 10 % of the characters, and a file its
            last 10 %, cut at the nearest document, paragraph, line, word or character boundary. A folder
            whose last file is more than half of the text is cut like one file.
        column: which column of a table holds the texts.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no text, an empty, binary, badly encoded or too short one, or a table without `column`.
        ImportError: a table, and `datasets` is missing.
    """
    _check_column(column, data, validation)
    if data == "austen":
        train, held_out = load_austen()
        if validation is not None:
            held_out = read_validation(validation, column=column)
        return Text("austen", train, held_out)

    sources = find_sources(data)
    name = Path(data).expanduser().resolve().name
    if validation is None and find_sources(data, held_out=True) != sources:
        validation = data  # a split of its own
    if validation is not None:
        train, held_out = _keep_apart(sources, validation, column)
        _check_length(data, train)
        return Text(name, train, held_out)
    by_source = [documents for source in sources if (documents := source.read(column))]
    _check_length(data, [document for documents in by_source for document in documents])
    return Text(name, *_hold_out_sources(by_source))


def _check_column(column: str, *places: str | Path | None) -> None:
    """Raise for a column where nothing has columns."""
    if column == TEXT_COLUMN:
        return
    paths = [place for place in places if place not in (None, "austen")]
    if not any(source.is_table for path in paths for source in find_sources(str(path))):
        raise ValueError(
            f"--text-column {column} is for tables ({', '.join(tables.ENDINGS)}, a saved dataset), but "
            f"{places[0]} is plain text; leave it out"
        )


def _keep_apart(sources: list[Source], validation: str | Path, column: str) -> tuple[list[str], list[str]]:
    """Documents of the training files that are no validation files, and those of the latter."""
    held_out = read_validation(validation, column=column)
    taken = set()
    if validation != "austen":
        taken = {source.identity for source in find_sources(validation, held_out=True)}
    kept = [source for source in sources if source.identity not in taken]
    if not kept:
        raise ValueError(
            f"the validation text {validation} takes every training file, so that nothing is left "
            "to train on; give another validation text, or none to hold out the last 10 %"
        )
    return [document for source in kept for document in source.read(column)], held_out


def read_validation(source: str | Path, *, column: str = TEXT_COLUMN) -> list[str]:
    """Every document of a text to measure on.

    Args:
        source: `"austen"` (the novel that training never sees), a file or a folder as for `load_text`; of a
            saved `DatasetDict` its validation (or test) split, or the only one.
        column: which column of a table holds the texts.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no text, an empty, binary or badly encoded one, or a table without `column`.
        ImportError: a table, and `datasets` is missing.
    """
    if source == "austen":
        return load_austen()[1]
    documents = [d for place in find_sources(source, held_out=True) for d in place.read(column)]
    if not documents:
        raise ValueError(f"the validation text {source} is empty; give one with text in it")
    return documents


def _check_length(source: str | Path, documents: list[str]) -> None:
    characters = _length(documents)
    if characters == 0:
        raise ValueError(f"{source} is empty; give a file or a folder with text in it")
    if characters < MIN_CHARACTERS:
        raise ValueError(
            f"{source} is too short to train on: expected at least {MIN_CHARACTERS} characters, "
            f"got {characters}; give a longer text"
        )


def _hold_out_sources(by_source: list[list[str]]) -> tuple[list[str], list[str]]:
    """Hold out the last files, or the tail of the text when whole files will not do."""
    lengths = [_length(documents) for documents in by_source]
    total = sum(lengths)
    first = len(by_source) - 1
    held_length = lengths[first]
    while first > 1 and held_length < VALIDATION_SHARE * total:
        first -= 1
        held_length += lengths[first]
    train = [document for documents in by_source[:first] for document in documents]
    held_out = [document for documents in by_source[first:] for document in documents]
    # One huge last file (or the only file) would leave too little to train on.
    if held_length > total / 2:
        return _hold_out_tail(train + held_out)
    return train, held_out


def _hold_out_tail(documents: list[str]) -> tuple[list[str], list[str]]:
    """Cut off the last 10 % between two documents, or inside one that is longer than 5 % on either side."""
    total = _length(documents)
    target, slack = round(total * (1 - VALIDATION_SHARE)), round(total * VALIDATION_SHARE / 2)
    starts = list(accumulate(map(len, documents), initial=0))[:-1]
    between = [i for i, start in enumerate(starts) if i and abs(start - target) <= slack]
    if between:
        first = min(between, key=lambda i: abs(starts[i] - target))
        return documents[:first], documents[first:]
    i = bisect_right(starts, target) - 1
    before, after = _cut(documents[i], target - starts[i], slack)
    return [*documents[:i], before], [after, *documents[i + 1 :]]


def _cut(text: str, target: int, slack: int) -> tuple[str, str]:
    """Cut one document at the best boundary within `slack` characters of `target`."""
    cut = target
    for mark in _BREAKS:
        before = text.rfind(mark, max(target - slack, 0), target + len(mark) - 1)
        after = text.find(mark, target, target + slack)
        found = [start + len(mark) for start in (before, after) if start >= 0]
        if found:
            cut = min(found, key=lambda end: abs(end - target))
            break
    return text[:cut].rstrip(), text[cut:].lstrip()


def _length(documents: list[str]) -> int:
    """Characters in all documents."""
    return sum(map(len, documents))
