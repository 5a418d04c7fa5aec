"""Runs `heedful` in a process of its own, forked from one that has torch and transformers loaded: no imports."""

import importlib
import os
import pkgutil
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.adversary.attack import Broken

MEMORY = 2 * 2**30
"""Bytes that a command on a tiny model may take."""
CHANGES = (
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "shutil.copyfile",
)


@dataclass(frozen=True)
class Done:
    """What a command left; `code` is below 0 for a signal, `late` where it was ended for its time."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int
    late: bool
    changes: int
    """How often it opened a file to write, made, moved or removed one; 0 where it was ended."""

    def check(self, said: str) -> None:
        """It did what was asked, or says in one line why not; without a traceback, and in little memory."""
        tail = (self.out + self.err)[-600:]
        if "Traceback" in self.out + self.err:
            raise Broken(f"{said}: a traceback: {tail}")
        if self.memory > MEMORY:
            raise Broken(f"{said}: took {self.memory / 2**30:.1f} GB")
        if self.late:  # it has said nothing yet
            return
        if self.code not in (0, 1, 2):
            raise Broken(f"{said}: code {self.code}: {tail}")
        if self.code:
            lines = [line for line in self.err.splitlines() if line.strip()]
            if (
                not lines
                or not lines[-1].startswith("heedful")
                or re.match(r"heedful \w*: \w+Error\b", lines[-1])
            ):
                raise Broken(f"{said}: code {self.code} without a line that says why: {tail}")


def warm() -> None:
    """Import what commands import, once."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "200",
        "HEEDFUL_FORMS": "",
    }
    os.environ.pop("HEEDFUL_TRACEBACK", None)
    import torch

    import heedful

    torch.set_num_threads(1)  # a fork has no threads but its own
    for module in pkgutil.walk_packages(heedful.__path__, "heedful."):
        if not re.search(r"triton|__main__|on_ray|lm_eval|vllm", module.name):
            importlib.import_module(module.name)


def heedful(
    arguments: Sequence[object],
    folder: Path,
    *,
    limit: float = 60.0,
    kill_after: float | None = None,
    kill_at: int | None = None,
) -> Done:
    """Run a command in a folder.

    Args:
        arguments: its words.
        folder: where it runs.
        limit: seconds after which it is ended.
        kill_after: seconds after which it, and all that it started, gets kill -9.
        kill_at: the change on the disk before which it does.
    """
    words = [os.fsdecode(os.fsencode(str(word))) for word in arguments]

    def command() -> int:
        from heedful.cli import main

        return main(words)

    return forked(command, folder, limit=limit, kill_after=kill_after, kill_at=kill_at)


def forked(
    function: Callable[[], int],
    folder: Path,
    *,
    limit: float = 60.0,
    kill_after: float | None = None,
    kill_at: int | None = None,
) -> Done:
    """Run a function in a process group of its own; what it writes to the screen is caught."""
    files = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err", "changes")]
    sys.stdout.flush()
    sys.stderr.flush()
    for file in files:
        file.touch()
    begun = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(function, folder, files, kill_at)
    until = begun + (limit if kill_after is None else kill_after)
    late = False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() >= until and not late:
            late = True
            _kill(pid)
        time.sleep(0.002)
    seconds = time.monotonic() - begun
    _kill(pid)  # what it started and did not wait for
    out, err, changes = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    for file in files:
        file.unlink()
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = max(0, usage.ru_maxrss - here) * 1024
    return Done(
        os.waitstatus_to_exitcode(status),
        out,
        err,
        seconds,
        memory,
        late and kill_after is None,
        int(changes or 0),
    )


def _child(function: Callable[[], int], folder: Path, files: Sequence[Path], kill_at: int | None) -> NoReturn:
    """Never returns: what the parent has to do at its end is not for this one."""
    code, changes = 70, 0

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            changes += 1
            if changes == kill_at:
                os.killpg(0, signal.SIGKILL)

    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files[:2], 1):
            os.dup2(os.open(file, os.O_WRONLY), number)
        counted = os.open(files[2], os.O_WRONLY)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
        sys.addaudithook(watch)
        most = 3 * MEMORY  # beyond, allocating fails: the machine is spared
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)
        try:
            code = function()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(counted, str(changes).encode())
    finally:
        os._exit(code)


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
        return


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and folder below, to see that nothing was touched."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
        if not p.is_symlink()
    }
