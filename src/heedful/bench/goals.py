"""What the figures should be, and under which conditions that was said."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from heedful.bench.forms import TWIN, X_TRANSFORMERS
from heedful.bench.kernels import EVERY_KEY, SAS_OURS, SAS_PUBLISHED, Sizes
from heedful.bench.workload import Figures


@dataclass(frozen=True)
class Goal:
    """A ratio that should not be exceeded."""

    workload: str
    lengths: Sequence[int]
    against: str
    """Name of a case; "" is the first one, the plain form."""
    limit: float
    case: str = ""
    """Name of a case; "" is the one that `impl="auto"` picks."""
    measure: Literal["time", "extra memory"] = "time"


LONG = (1024, 2048, 4096)

CPU = (
    Goal("prefill", LONG, "", 1.00),
    Goal("prefill", LONG, "", 1.00, EVERY_KEY),
    Goal("prefill", LONG, TWIN, 1.30, EVERY_KEY),
    Goal("train", LONG, "", 1.05),
    Goal("train", LONG, "", 1.05, EVERY_KEY),
    Goal("train", LONG, TWIN, 1.20, EVERY_KEY),
    Goal("train", (2048,), X_TRANSFORMERS, 1 / 5),
    Goal("train", (4096,), X_TRANSFORMERS, 1 / 20, measure="extra memory"),
    Goal("SAS prefill", (2048,), SAS_PUBLISHED, 0.25, SAS_OURS),
    Goal("SAS train", (2048,), SAS_PUBLISHED, 0.35, SAS_OURS),
    Goal("SAS prefill", (2048,), SAS_PUBLISHED, 0.25, SAS_OURS, "extra memory"),
    Goal("SAS train", (2048,), SAS_PUBLISHED, 0.25, SAS_OURS, "extra memory"),
)
GPU = (
    Goal("prefill", (2048, 4096, 8192, 16384), "", 1.40),
    Goal("train", (2048, 4096, 8192, 16384), "", 1.55),
)
CONDITIONS = "the CPU, fp32, 1 thread, 8 heads of 64; or CUDA, bf16, 16 heads of 64 or 128"


@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured."""

    goal: Goal
    length: int
    case: str
    against: str
    ratio: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.goal.limit


def kernel_goals(device: torch.device, dtype: torch.dtype, threads: int, sizes: Sizes) -> Sequence[Goal]:
    """The goals that were stated for these conditions."""
    plain = sizes.n_kv_heads == sizes.n_heads and sizes.value_dim == sizes.head_dim and sizes.batch == 1
    if device.type == "cuda" and dtype == torch.bfloat16 and plain:
        return GPU if sizes.n_heads == 16 and sizes.head_dim in (64, 128) else ()
    on_cpu = device.type == "cpu" and dtype == torch.float32 and threads == 1
    return CPU if on_cpu and plain and (sizes.n_heads, sizes.head_dim) == (8, 64) else ()


def judge(
    goals: Iterable[Goal], rows: Sequence[Figures], picked: dict[tuple[str, int], str]
) -> list[Verdict]:
    """Compare goals with figures; a goal whose cases were not measured gives no verdict.

    Args:
        goals: what to look for.
        rows: of one number of threads; of each workload the plain form comes first.
        picked: (workload, T) -> the case that stands for ours.
    """
    verdicts = []
    groups: dict[tuple[str, int], dict[str, Figures]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.length), {})[row.case] = row
    for goal in goals:
        for length in goal.lengths:
            group = groups.get((goal.workload, length), {})
            case = goal.case or picked.get((goal.workload, length), "")
            against = goal.against or next(iter(group), "")
            ratio = _ratio(group.get(case), group.get(against), goal.measure)
            if ratio is not None:
                verdicts.append(Verdict(goal, length, case, against, ratio))
    return verdicts


def _ratio(case: Figures | None, against: Figures | None, measure: str) -> float | None:
    if case is None or against is None:
        return None
    if measure == "time":
        return case.timing.seconds / against.timing.seconds
    if case.extra_bytes is None or not against.extra_bytes:
        return None
    return case.extra_bytes / against.extra_bytes
