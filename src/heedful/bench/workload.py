"""What is measured: cases that do the same work, timed against each other, and the figures of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from heedful.bench.ceilings import Ceilings
from heedful.bench.memory import peak_extra_bytes
from heedful.bench.timing import Timing, interleaved


@dataclass(frozen=True)
class Case:
    """One way to do the work."""

    name: str
    run: Callable[[], Any]
    flops: float
    """What the work needs at least, of one run: neither recomputed nor masked products count."""
    bytes: float
    """Read and written at least: what goes in and what comes out."""


@dataclass(frozen=True)
class Workload:
    """Cases that take turns."""

    name: str
    length: int
    """T."""
    tokens: int
    """Tokens that one run gets through."""
    cases: Sequence[Case]
    baselines: Mapping[str, str]
    """Heading of a column of ratios -> the case that it divides by."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Name -> why it is not measured."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one case."""

    workload: str
    length: int
    case: str
    timing: Timing
    tokens_per_second: float
    flops_per_second: float
    of_gemm: float
    """Share of the fastest matrix product that was measured in the same run."""
    bytes_per_second: float
    of_copy: float
    """Share of the fastest copy that was measured in the same run."""
    extra_bytes: int | None
    """The most memory that was in use at once beyond what was there before."""
    ratios: Mapping[str, float]
    """Median time over the median time of a baseline, by the name of that case."""


def measure(
    workload: Workload,
    ceilings: Ceilings,
    device: torch.device,
    *,
    turns: int | None = None,
    seconds: float = 10.0,
    memory: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Figures]:
    """Time the cases in turn, then look at the memory of each.

    Args:
        workload: what to measure.
        ceilings: of the machine, at the same number of threads.
        device: where the cases run.
        turns: as in `interleaved`.
        seconds: as in `interleaved`.
        memory: whether to measure memory, one more run of each case.
        progress: called with runs done and runs in all.
    """
    after = len(workload.cases) if memory else 0  # runs that follow
    runs = 0

    def report(done: int, total: int) -> None:
        nonlocal runs
        runs = total
        if progress is not None:
            progress(done, total + after)

    timings = interleaved(
        {case.name: case.run for case in workload.cases},
        turns=turns,
        seconds=seconds,
        device=device,
        progress=report,
    )
    extra: dict[str, int] = {}
    if memory:
        for number, case in enumerate(workload.cases, start=1):
            extra[case.name] = peak_extra_bytes(case.run, device)
            if progress is not None:
                progress(runs + number, runs + after)
    rows = []
    for case in workload.cases:
        timing = timings[case.name]
        flops, moved = case.flops / timing.seconds, case.bytes / timing.seconds
        rows.append(
            Figures(
                workload=workload.name,
                length=workload.length,
                case=case.name,
                timing=timing,
                tokens_per_second=workload.tokens / timing.seconds,
                flops_per_second=flops,
                of_gemm=flops / ceilings.gemm,
                bytes_per_second=moved,
                of_copy=moved / ceilings.copy,
                extra_bytes=extra.get(case.name),
                ratios={name: timing.seconds / timings[name].seconds for name in workload.baselines.values()},
            )
        )
    return rows
