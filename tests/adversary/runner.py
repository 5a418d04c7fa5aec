"""Tries the cases of an attack in a process of its own: what crashes or hangs is a failure, and they go on."""

import itertools
import multiprocessing
import os
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from tests.adversary.attack import Attack, Broken, Outcome, source_of

STARTING = 240.0
"""Seconds to make what the cases need."""


def run(
    attack: Attack, seed: int, seconds: float, folder: Path, first: int = 0, most: int | None = None
) -> Iterator[Outcome]:
    """The outcomes of the cases from `first` on, until the time is used up or `most` were tried."""
    deadline, number = time.monotonic() + seconds, first
    end = None if most is None else first + most
    while time.monotonic() < deadline and number != end:
        here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
        worker = multiprocessing.get_context("fork").Process(
            target=_work, args=(attack, seed, number, end, deadline, folder, there)
        )
        worker.start()
        there.close()
        begun, limit = time.monotonic(), STARTING
        try:
            while True:
                message = here.recv() if here.poll(limit) else None
                if message is None:
                    os.kill(worker.pid or 0, signal.SIGKILL)
                    yield _lost(attack, number, f"took longer than {limit:g} seconds", begun)
                    break
                if isinstance(message, Outcome):
                    yield message
                    number += 1
                begun, limit = time.monotonic(), attack.limit
        except EOFError:
            worker.join()
            if worker.exitcode == 0:
                return
            yield _lost(attack, number, f"its process ended with code {worker.exitcode}", begun)
        finally:
            here.close()
            worker.join()
        number += 1


def attempt(attack: Attack, case, seed: int, number: int, folder: Path) -> Outcome:
    """One case, in a folder that is empty before and gone after."""
    place = folder / f"case-{number}"
    place.mkdir(parents=True)
    begun, kind, failure = time.monotonic(), "", None
    try:
        kind = case(source_of(seed, attack.name, number), place)
    except Broken as broken:
        failure = str(broken)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    shutil.rmtree(place, ignore_errors=True)
    return Outcome(attack.name, number, kind, failure, round(time.monotonic() - begun, 3))


def _work(
    attack: Attack, seed: int, first: int, end: int | None, deadline: float, folder: Path, pipe: Connection
) -> None:
    """The cases, one after another."""
    shared = folder / attack.name
    shutil.rmtree(shared, ignore_errors=True)
    shared.mkdir(parents=True)
    case = attack.start(shared)
    pipe.send("started")
    for number in itertools.count(first):
        if number == end or time.monotonic() > deadline:
            return
        pipe.send(attempt(attack, case, seed, number, shared))


def _lost(attack: Attack, number: int, why: str, begun: float) -> Outcome:
    return Outcome(attack.name, number, "", why, round(time.monotonic() - begun, 3))
