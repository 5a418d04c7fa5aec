"""Text to train on and text to measure on: two lists of documents that never overlap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from heedful.data.austen import load_austen
from heedful.data.reading import find_text_files, read_documents

VALIDATION_SHARE = 0.1
MIN_CHARACTERS = 100

# Where a text may be cut, best first; a document separator is written as two blank lines.
_DOCUMENT_BREAK = "\n\n\n"
_BREAKS = (_DOCUMENT_BREAK, "\n\n", "\n", " ")


@dataclass(frozen=True)
class Text:
    """Documents of one data source, split for training and validation."""

    name: str
    """What the text is called: `austen`, or the name of the file or folder."""
    train: list[str]
    """Documents to train on."""
    validation: list[str]
    """Documents to measure on; no file position is in both."""


def load_text(data: str | Path = "austen", validation: str | Path | None = None) -> Text:
    """Read documents and hold some out.

    Args:
        data: `"austen"` (bundled), a UTF-8 file, or a folder whose *.txt and *.md files are read
            recursively in sorted order. Two blank lines, or a line holding only
            `<|endoftext|>`, end a document inside a file. A path of the name austen is
            written `./austen`.
        validation: the same forms. Files also found under `data` are left out of training.
            When None: the bundled corpus holds out its last novel, a folder its last files that
            make at least 10 % of the characters, and a file its last 10 %, cut at the nearest
            document, paragraph, line, word or character boundary. A folder whose last file is
            more than half of the text is cut like one file.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no text files, an empty, binary, badly encoded or too short text.
    """
    if data == "austen":
        train, held_out = load_austen()
        return Text("austen", train, held_out if validation is None else read_validation(validation))

    files = find_text_files(data)
    name = Path(data).expanduser().resolve().name
    if validation is not None:
        train, held_out = _keep_apart(files, validation)
        _check_length(data, train)
        return Text(name, train, held_out)
    by_file = [documents for file in files if (documents := read_documents(file))]
    _check_length(data, [document for documents in by_file for document in documents])
    return Text(name, *_hold_out_files(by_file))


def _keep_apart(files: list[Path], validation: str | Path) -> tuple[list[str], list[str]]:
    """Documents of the training files that are no validation files, and those of the latter."""
    held_out = read_validation(validation)
    taken: set[Path] = set()
    if validation != "austen":
        taken = {file.resolve() for file in find_text_files(validation)}
    kept = [file for file in files if file.resolve() not in taken]
    if not kept:
        raise ValueError(
            f"the validation text {validation} takes every training file, so that nothing is left "
            "to train on; give another validation text, or none to hold out the last 10 %"
        )
    return [document for file in kept for document in read_documents(file)], held_out


def read_validation(source: str | Path) -> list[str]:
    """Every document of a text to measure on.

    Args:
        source: `"austen"` (the novel that training never sees), a UTF-8 file or a folder.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no text files, or an empty, binary or badly encoded one.
    """
    if source == "austen":
        return load_austen()[1]
    documents = [document for file in find_text_files(source) for document in read_documents(file)]
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


def _hold_out_files(by_file: list[list[str]]) -> tuple[list[str], list[str]]:
    """Hold out the last files, or the tail of the text when whole files will not do."""
    lengths = [_length(documents) for documents in by_file]
    total = sum(lengths)
    first = len(by_file) - 1
    held_length = lengths[first]
    while first > 1 and held_length < VALIDATION_SHARE * total:
        first -= 1
        held_length += lengths[first]
    train = [document for documents in by_file[:first] for document in documents]
    held_out = [document for documents in by_file[first:] for document in documents]
    # One huge last file (or the only file) would leave too little to train on.
    if held_length > total / 2:
        return _hold_out_tail(train + held_out)
    return train, held_out


def _hold_out_tail(documents: list[str]) -> tuple[list[str], list[str]]:
    """Cut off the last 10 % at the best boundary within 5 % of the text on either side."""
    text = _DOCUMENT_BREAK.join(documents)
    target = round(len(text) * (1 - VALIDATION_SHARE))
    slack = round(len(text) * VALIDATION_SHARE / 2)
    cut = target
    for mark in _BREAKS:
        before = text.rfind(mark, target - slack, target + len(mark) - 1)
        after = text.find(mark, target, target + slack)
        found = [start + len(mark) for start in (before, after) if start >= 0]
        if found:
            cut = min(found, key=lambda end: abs(end - target))
            break
    return _split_again(text[:cut]), _split_again(text[cut:])


def _split_again(text: str) -> list[str]:
    # Only at the breaks that the join put in: an inline end-of-text marker that the cut happened
    # to move to a line of its own is still ordinary text.
    return [piece.strip() for piece in text.split(_DOCUMENT_BREAK) if piece.strip()]


def _length(documents: list[str]) -> int:
    """Characters in all documents."""
    return sum(map(len, documents))
