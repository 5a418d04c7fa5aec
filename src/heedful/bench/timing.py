"""Timing things against each other: turn by turn in one process, so that noise hits all alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch


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


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    *,
    turns: int = 30,
    warmup: int = 3,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Run every case once per turn and return medians with quartiles.

    Args:
        cases: names and what to time.
        turns: times each case is measured, at least 2.
        warmup: turns before that do not count.
        device: waited for before the clock is read, where it is not the CPU.
        progress: called with turns done and turns in all.

    Raises:
        ValueError: for fewer than 2 turns or no cases.
    """
    if turns < 2 or not cases:
        raise ValueError(f"expected 2 turns or more and at least one case, got {turns} and {len(cases)}")
    waits = device is not None and device.type != "cpu"
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + turns):
        for name, run in cases.items():
            if waits:
                torch.accelerator.synchronize(device)
            started = time.perf_counter()
            run()
            if waits:
                torch.accelerator.synchronize(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
        if progress is not None:
            progress(turn + 1, warmup + turns)
    timings = {}
    for name, values in seconds.items():
        low, _, high = quantiles(values, n=4)
        timings[name] = Timing(name, median(values), low, high, turns)
    return timings
