"""What the parts share: where results go, and timing by turns."""

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch


@dataclass
class Run:
    """One run of a part."""

    out: Path
    device: str
    tiny: bool
    limit: float
    """Seconds from its start until it is stopped."""
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that may still be used, with a tenth in reserve."""
        return 0.9 * self.limit - (time.monotonic() - self.started)

    def rows(self, name: str) -> Callable[[dict[str, Any]], None]:
        """A function that adds a JSON line to a new file, at once, so that a later failure loses nothing."""
        file = (self.out / name).open("w", encoding="utf-8")

        def add(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row, flush=True)

        return add

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def interleaved(
    run: Run, cases: Mapping[str, Callable[[], Any]], turns: int, inner: int = 1
) -> tuple[dict[str, tuple[float, float, float]], dict[str, str]]:
    """Milliseconds of each case, (first quartile, median, third), by turns; and why some cannot run."""
    samples: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for name, case in cases.items():
        try:
            for _ in range(2):
                case()
            run.wait()
            samples[name] = []
        except Exception as error:  # a backend that is missing says so in its own way
            reasons[name] = f"{type(error).__name__}: {error}"[:300]
            gc.collect()
    for _ in range(turns):
        for name, found in samples.items():
            found.append(_milliseconds(run, cases[name], inner))
    timings = {name: tuple(quantiles(found, n=4)) for name, found in samples.items()}
    return timings, reasons  # type: ignore[return-value]


def _milliseconds(run: Run, case: Callable[[], Any], inner: int) -> float:
    if run.device != "cuda":
        start = time.perf_counter()
        for _ in range(inner):
            case()
        return (time.perf_counter() - start) * 1e3 / inner
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(inner):
        case()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / inner
