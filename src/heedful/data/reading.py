"""From a path to documents: which files are read, how they are decoded and where they split."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

SUFFIXES = (".txt", ".md")

_SEPARATOR = re.compile(
    r"\n(?:[ \t]*\n){2,}"  # two or more blank lines
    r"|^[ \t]*<\|endoftext\|>[ \t]*$",  # or a line holding only the end-of-text marker
    re.MULTILINE,
)


def find_text_files(path: str | Path) -> list[Path]:
    """The files that `path` stands for: itself, or every *.txt and *.md below a folder, sorted.

    Hidden files and folders (`.git`, `.venv`, ...) inside a folder are left out.

    Raises:
        FileNotFoundError: nothing is at `path`; near misses are suggested.
        ValueError: the path is empty, or the folder holds no text file.
    """
    if not str(path):
        raise ValueError('the data path is empty: give "austen", a text file or a folder')
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(_missing(path))
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise ValueError(f"the folder {path} holds no text: expected *.txt or *.md files in it or below it")
    return found


def read_documents(file: Path) -> list[str]:
    """Documents of one UTF-8 file, without the white space around them; [] for a blank file.

    Raises:
        ValueError: the file is binary or not valid UTF-8.
    """
    text = _decode(file).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return split_documents(text)


def split_documents(text: str) -> list[str]:
    """Cut `text` at two or more blank lines and at lines holding only `<|endoftext|>`."""
    documents = (document.strip() for document in _SEPARATOR.split(text))
    return [document for document in documents if document]


def _decode(file: Path) -> str:
    raw = file.read_bytes()
    # UTF-8 decodes NUL happily, but no text has one: it is the mark of a binary or UTF-16 file.
    if (nul := raw.find(0)) >= 0:
        raise ValueError(
            f"{file} is not a text file: zero byte at offset {nul}; "
            "expected UTF-8 text (UTF-16 must be converted first)"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start} "
            f"({error.reason}); convert the file to UTF-8 or choose another one"
        ) from None


def _missing(path: Path) -> str:
    """One line about a path that does not exist, with the nearest names that do."""
    message = f"there is no file or folder {path}"
    folder = path.parent
    if not folder.is_dir():
        return f"{message} (its folder {folder} does not exist either); check the path"
    names = {entry.name: str(folder / entry.name) for entry in folder.iterdir()}
    if len(path.parts) == 1:  # a bare name may have been meant for the bundled corpus
        names["austen"] = '"austen" (bundled)'
    if near := difflib.get_close_matches(path.name, names, n=3):
        return f"{message}; did you mean {' or '.join(names[name] for name in near)}?"
    return f'{message}; expected "austen" (bundled), a text file or a folder of *.txt and *.md'
