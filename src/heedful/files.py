"""Writing files whole or not at all, so that a crash or a full disk never leaves half of one."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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


def holds_something(folder: Path) -> bool:
    """Whether a folder is not empty; what `write_bytes` had not finished when it was killed is nothing."""
    return any(not re.search(r"\.\d+\.new$", path.name) for path in folder.iterdir())


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


class Locked(RuntimeError):
    """Another process works in the same folder; the message says in which."""


@contextlib.contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder; nothing is left in it, and a killed process holds nothing.

    Raises:
        Locked: if one works there already.
    """
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"another process works in {folder}; wait for it, or use another --out") from None
        except OSError:  # file systems that know no locks
            pass
        yield
    finally:
        os.close(held)
