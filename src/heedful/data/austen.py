"""The bundled corpus: three public-domain novels by Jane Austen, 1.8 MB of plain ASCII text."""

from __future__ import annotations

import lzma
import re
from importlib.resources import files

_NOVEL = re.compile(r"(?<=\n\n\n)")
_CHAPTER = re.compile(r"^(?=chapter \d+$)", re.MULTILINE | re.IGNORECASE)
_VALIDATION_TITLE = "Persuasion\n\nby"


def load_austen() -> tuple[list[str], list[str]]:
    """Chapters of the training novels and chapters of the validation novel.

    *Pride and Prejudice* and *Sense and Sensibility* are for training; *Persuasion* is held out
    whole. Not a character is lost: joining the chapters gives the novels back, so that bits per
    byte is measured on the whole book.
    """
    packed = files("heedful.data").joinpath("austen3.txt.xz").read_bytes()
    novels = _NOVEL.split(lzma.decompress(packed).decode("utf-8"))
    train: list[str] = []
    validation: list[str] = []
    for novel in novels:
        target = validation if novel.startswith(_VALIDATION_TITLE) else train
        target.extend(_chapters(novel))
    return train, validation


def _chapters(novel: str) -> list[str]:
    """Split before every line 'Chapter N'; the title page stays with the first chapter."""
    title_page, first, *others = _CHAPTER.split(novel)
    return [title_page + first, *others]
