"""From a path to documents: which files are read, how they are decoded and where they split."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from heedful.data import tables
from heedful.machine import memory_bytes

TEXT_ENDINGS = (".txt", ".md")
ENDINGS = (*TEXT_ENDINGS, *tables.ENDINGS)
EXPECTED = ", ".join(f"*{ending}" for ending in ENDINGS)
TEXT_COLUMN = "text"

_SEPARATOR = re.compile(
    r"\n(?:[ \t]*\n){2,}"  # two or more blank lines
    r"|^[ \t]*<\|endoftext\|>[ \t]*$",  # or a line holding only the end-of-text marker
    re.MULTILINE,
)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One place that documents are read from."""

    path: Path
    """A file, or a folder saved by `datasets`."""
    split: str | None = None
    """Which split of a saved `DatasetDict`."""

    @property
    def is_table(self) -> bool:
        """Whether texts are in a column here."""
        return self.path.is_dir() or self.path.suffix.lower() in tables.ENDINGS

    @property
    def identity(self) -> tuple[Path, str | None]:
        """Equal for two names of the same place."""
        return self.path.resolve(), self.split

    def read(self, column: str = TEXT_COLUMN) -> list[str]:
        """Documents, without the white space around them; [] for a blank file.

        Args:
            column: where the texts of a table are; one row is one document.

        Raises:
            ValueError: the file is binary, not valid UTF-8 or damaged, or has no such column.
            ImportError: a table, and `datasets` is missing.
        """
        if self.path.is_dir():
            return tables.read_saved(self.path, self.split, column)
        if not self.is_table:
            text = (
                "".join(_decoded(self.path)).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
            )
            return split_documents(text)
        if self.path.suffix.lower() != ".parquet":
            blank = [not piece.strip("\ufeff \t\r\n") for piece in _decoded(self.path)]
            if all(blank):
                return []
        return tables.read_table(self.path, column)


def find_sources(path: str | Path, *, held_out: bool = False) -> list[Source]:
    """What `path` stands for: a file, a folder that `datasets` saved, or every text below a folder, sorted.

    Hidden files and folders (`.git`, `.venv`, ...) inside a folder are left out, and files of other endings.

    Args:
        path: a file or a folder.
        held_out: of a saved `DatasetDict` take the validation split instead of the training split.

    Raises:
        FileNotFoundError: nothing is at `path`; near misses are suggested.
        ValueError: the path is empty, is a device or a pipe, has an unknown ending, is a folder without text, or is
            larger than the memory.
    """
    if not str(path):
        raise ValueError('the data path is empty: give "austen", a text file or a folder')
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(_missing(path))
    if path.is_file():
        if path.suffix and path.suffix.lower() not in ENDINGS:
            raise ValueError(
                f"{path} has the unknown ending {path.suffix}; expected a folder or one of {EXPECTED} "
                "(plain text of another name: copy it to a .txt)"
            )
        check_size(path, [Source(path)])
        return [Source(path)]
    if not path.is_dir():
        raise ValueError(
            f"{path} is a device or a pipe, which may never end; expected a file or a folder: write the text "
            "to a file first"
        )
    if tables.is_saved(path):
        return [_saved(path, held_out)]
    found = sorted(_below(path), key=lambda source: source.path)
    if not found:
        raise ValueError(f"the folder {path} holds no text: expected {EXPECTED} in it or below it")
    check_size(path, found)
    return found


def check_size(path: str | Path, sources: list[Source]) -> None:
    """Raise for a text that this machine cannot hold, before any of it is read.

    Raises:
        ValueError: if its files are larger than the memory.
    """
    size = sum(source.path.stat().st_size for source in sources if source.path.is_file())
    if size > (most := memory_bytes()):
        raise ValueError(
            f"{path} has {size:,} bytes, more than this machine's memory of {most:,}; give a part of it"
        )


def _below(folder: Path) -> Iterator[Source]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if tables.is_saved(entry):
                yield _saved(entry, held_out=False)
            elif not entry.is_symlink():  # a link may lead back up
                yield from _below(entry)
        elif entry.is_file() and entry.suffix.lower() in ENDINGS:
            yield Source(entry)


def _saved(folder: Path, held_out: bool) -> Source:
    split = tables.validation_split(folder) if held_out else None
    return Source(folder, split or tables.training_split(folder))


def split_documents(text: str) -> list[str]:
    """Cut `text` at two or more blank lines and at lines holding only `<|endoftext|>`."""
    documents = (document.strip() for document in _SEPARATOR.split(text))
    return [document for document in documents if document]


def _decoded(file: Path) -> Iterator[str]:
    """The text of a UTF-8 file, a piece at a time; raises at the first byte that is none.

    Of a file that grows meanwhile, what was there at the start.
    """
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    most = max(file.stat().st_size, _CHUNK)  # those of the system have no size
    with file.open("rb") as opened:
        while True:
            raw = opened.read(min(_CHUNK, most - offset))
            # UTF-8 decodes NUL happily, but no text has one: it is the mark of a binary or UTF-16 file.
            if (nul := raw.find(0)) >= 0:
                raise ValueError(
                    f"{file} is not a text file: zero byte at offset {offset + nul}; "
                    "expected UTF-8 text (UTF-16 must be converted first)"
                )
            waiting = len(decoder.getstate()[0])  # the beginning of a character from the piece before
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
                    f"{offset - waiting + error.start} ({error.reason}); convert the file to UTF-8 or choose "
                    "another one"
                ) from None
            offset += len(raw)
            if not raw:
                return


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
    return f'{message}; expected "austen" (bundled), a text file or a folder of {EXPECTED}'
