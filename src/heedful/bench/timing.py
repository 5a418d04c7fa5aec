"""Timing things against each other: turn by turn in one process, so that noise hits all alike."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import Any

import torch

from heedful.bench.load import LoadMeter

WARMUP = 2
FEWEST, MOST = 7, 40  # turns of a case, where time decides
SLOW, FEWEST_SLOW = 1.5, 3  # seconds of one run from which on fewer turns will do


@dataclass(frozen=True)
class Timing:
    """One case over all its turns."""

    name: str
    seconds: float
    """Median."""
    low: float
    """First quartile, seconds."""
    high: float
    """Third quartile, seconds."""
    turns: int
    samples: tuple[float, ...] = field(default=(), repr=False)
    """Every measurement, seconds, in order."""
    disturbed: str | None = None
    """What else the machine was busy with meanwhile; such a time is not compared with others."""


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    *,
    turns: int | None = None,
    seconds: float = 10.0,
    warmup: int = WARMUP,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Run the cases turn by turn and return medians with quartiles.

    The garbage of a case is collected after it, outside its time; Python's collector is off while it runs.

    Args:
        cases: names and what to time.
        turns: times each case is measured, at least 2. If None, time decides: every case gets an equal share
            of `seconds`, but 7 to 40 turns, and 3 where a run takes 1.5 seconds or more; the turns that slow
            cases sit out are evenly spread.
        seconds: for all cases together, where time decides.
        warmup: turns before that do not count; where a run takes 1.5 seconds or more, the first is enough.
        device: waited for before the clock is read, where it is not the CPU.
        progress: called with runs done and runs in all.

    Raises:
        ValueError: for fewer than 2 turns or no cases.
    """
    if (turns is not None and turns < 2) or not cases:
        raise ValueError(f"expected 2 turns or more and at least one case, got {turns} and {len(cases)}")
    wait = _waiter(device)
    with _no_collector():
        cost = dict.fromkeys(cases, 0.0)
        done, total = 0, (warmup + (turns or FEWEST)) * len(cases)
        for turn in range(warmup):
            for name, run in cases.items():
                if turn == 0 or cost[name] < SLOW:
                    cost[name] = _time(run, wait)
                done += 1
                if progress is not None:
                    progress(done, total)
        wanted = {name: turns or _turns(seconds / len(cases), cost[name]) for name in cases}
        total = done + sum(wanted.values())
        samples: dict[str, list[float]] = {name: [] for name in cases}
        meter = LoadMeter(torch.get_num_threads() if device is None or device.type == "cpu" else 0)
        for name in _schedule(wanted):
            samples[name].append(_time(cases[name], wait))
            done += 1
            if progress is not None:
                progress(done, total)
        disturbed = meter.disturbance()
    return {name: replace(timing(name, values), disturbed=disturbed) for name, values in samples.items()}


def timing(name: str, samples: list[float]) -> Timing:
    """Median and quartiles of at least 2 measurements, in seconds."""
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return Timing(name, median(samples), low, high, len(samples), tuple(samples))


def _turns(share: float, cost: float) -> int:
    return min(MOST, max(FEWEST if cost < SLOW else FEWEST_SLOW, int(share / max(cost, 1e-9))))


def _schedule(wanted: Mapping[str, int]) -> Iterator[str]:
    """Names in turns, each as often as wanted, its runs spread over all turns."""
    last = max(wanted.values())
    for turn in range(last):
        for name, n in wanted.items():
            if (turn + 1) * n // last > turn * n // last:
                yield name


def _time(run: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    started = time.perf_counter()
    result = run()
    wait()
    took = time.perf_counter() - started
    del result
    gc.collect()
    return took


def _waiter(device: torch.device | None) -> Callable[[], None]:
    if device is None or device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


@contextmanager
def _no_collector() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # what is there already need not be looked at after every run
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
