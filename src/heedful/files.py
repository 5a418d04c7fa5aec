"""Writing files whole or not at all, so that a crash or a full disk never leaves half of one."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Replace the file by `text`, UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any, *, sort_keys: bool = False) -> None:
    """Replace the file by `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the file by `content`, whole or not at all.

    Raises:
        OSError: if it cannot be written; the file is then as it was before.
    """
    path = Path(path)
    new = path.with_name(
        f"{path.name}.{os.getpid()}.new"
    )  # in the same folder, so that replacing is one step
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; if what follows fails, those that were made and are empty go again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()
        raise
