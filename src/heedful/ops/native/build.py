"""Compile the C++ of this package once per machine, compiler and version of the source, into a private folder."""

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
TIMEOUT = 300.0
"""Seconds a compilation may take."""


class Unavailable(RuntimeError):
    """The native operator cannot be had here; the message says why, and what to do."""


@dataclass(frozen=True)
class Built:
    """A compiled library in the cache."""

    path: Path
    note: Path
    """What is known of it: its checksum, and what its check found."""
    compiler: str
    seconds: float
    """How long compiling took; 0 if it was there."""

    def read_note(self) -> dict[str, Any]:
        """An empty one if there is none, or it belongs to another file."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            whole = note.get("sha256") == _sha256(self.path.read_bytes())
        except (OSError, ValueError, AttributeError):
            return {}
        return note if whole else {}

    def write_note(self, **found: Any) -> None:
        """Replace what is known; the checksum is added."""
        note = {"sha256": _sha256(self.path.read_bytes()), "compiler": self.compiler, **found}
        _replace(self.note, json.dumps(note, indent=1).encode())


def build(scalar: str) -> Built:
    """Compile for one scalar type, or find it compiled.

    Args:
        scalar: "float" or "double".

    Raises:
        Unavailable: if there is no compiler, it fails, or there is no safe folder to keep the result in.
    """
    if os.name != "posix":
        raise Unavailable(f"it is built on Linux and macOS only, this is {platform.system()}")
    command = find_compiler()
    version = compiler_version(command)
    sources = sorted(SOURCE.glob("*"))
    key = _sha256(
        *(part for path in sources for part in (path.name.encode(), path.read_bytes())),
        repr((FLAGS, version, scalar, cpu())).encode(),
    )[:32]
    folder = cache_folder()
    built = Built(folder / f"{key}.so", folder / f"{key}.json", version, 0.0)
    if built.read_note():
        return built
    with _locked(folder / "lock"):
        if built.read_note():  # another process was faster
            return built
        return _compile(command, scalar, built)


def find_compiler() -> list[str]:
    """The command of the C++ compiler: `CXX`, or the first of c++, g++, clang++."""
    wanted = os.environ.get("CXX", "")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        parts = shlex.split(name)
        path = shutil.which(parts[0]) if parts else None
        if path:
            return [path, *parts[1:]]
    tried = f"CXX={wanted!r} was not found" if wanted else "no c++, g++ or clang++ was found"
    raise Unavailable(f"{tried}; install a C++ compiler, for instance with `apt install g++`")


def compiler_version(command: list[str]) -> str:
    """Its own words, the first line."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0 or not done.stdout:
        raise Unavailable(f"{command[0]} --version failed: {done.stderr.strip()[-300:]}")
    return done.stdout.splitlines()[0]


@cache
def cpu() -> str:
    """What a build for this processor must not be shared beyond."""
    wanted = ("flags", "Features", "model name", "CPU part", "CPU implementer")
    try:
        lines = (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        )
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = [" ".join(line.split()) for line in lines if line.startswith(wanted)]
    return "\n".join([platform.machine(), *found])


def cache_folder() -> Path:
    """`HEEDFUL_CACHE`, or heedful/ in the user's cache folder; nobody else may write there."""
    given = os.environ.get("HEEDFUL_CACHE")
    base = (
        Path(given)
        if given
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "heedful"
    )
    folder = base / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        raise Unavailable(
            f"cannot make the folder {folder}: {error}; set HEEDFUL_CACHE to another"
        ) from error
    if found.st_uid != os.getuid():
        raise Unavailable(f"{folder} belongs to another user; set HEEDFUL_CACHE to a folder of your own")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"others may write to {folder}; `chmod go-w` it, or set HEEDFUL_CACHE to another")
    return folder


def _compile(command: list[str], scalar: str, built: Built) -> Built:
    import time

    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(dir=built.path.parent) as scratch:
            out = Path(scratch) / built.path.name
            line = [
                *command,
                *FLAGS,
                f"-DHEEDFUL_SCALAR={scalar}",
                "-o",
                str(out),
                str(SOURCE / "heedful.cpp"),
            ]
            done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT)
            if done.returncode != 0:
                raise Unavailable(f"{built.compiler} failed: {done.stderr.strip()[-1000:]}")
            os.replace(out, built.path)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"compiling failed: {error}") from error
    built.write_note()
    return Built(built.path, built.note, built.compiler, time.perf_counter() - started)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time."""
    if sys.platform == "win32":
        raise AssertionError
    import fcntl

    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise Unavailable(f"cannot lock {path}: {error}; set HEEDFUL_CACHE to another folder") from error


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _sha256(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()
