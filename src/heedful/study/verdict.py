"""What the runs of a study allow to say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heedful.comparison.statistics import Interval, paired
from heedful.study.plan import Contrast, Study

HOLDS, FAILS, OPEN = "holds", "does not hold", "not resolved at this scale"


@dataclass(frozen=True)
class Verdict:
    """One contrast, tried."""

    contrast: Contrast
    difference: Interval
    """Of the metric, `arm` minus `against`, seed by seed; 95 %."""
    seeds: int
    says: str
    """Holds, does not hold, or not resolved at this scale."""


def value_of(row: Mapping[str, Any], metric: str) -> float:
    """The metric of a run."""
    if metric == "loss":
        return float(row["val_loss"])
    times = metric.rpartition(" ")[2].removesuffix("x") if "at" in metric.split() else "1"
    return float(row["accuracy_at"][times])


def verdicts(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """One for each contrast of which two seeds are there."""
    found = []
    for contrast in study.contrasts:
        one, other = (
            {row["seed"]: value_of(row, study.metric) for row in rows if row["arm"] == arm}
            for arm in (contrast.arm, contrast.against)
        )
        seeds = sorted(one.keys() & other.keys())
        if len(seeds) < 2:
            continue
        difference = paired([one[seed] - other[seed] for seed in seeds])
        found.append(Verdict(contrast, difference, len(seeds), judge(contrast, difference, study.effect)))
    return found


def judge(contrast: Contrast, difference: Interval, effect: float) -> str:
    """What an interval says of a claim.

    A difference that is claimed holds if the interval lies on its side of 0, and does not hold if the interval
    leaves out the whole effect that was looked for. Equality holds if the interval lies within the effect, and does
    not if it lies outside.
    """
    low, high = difference.low, difference.high
    if contrast.claims == "equal":
        if -effect < low and high < effect:
            return HOLDS
        return FAILS if low > effect or high < -effect else OPEN
    if contrast.claims == "higher":
        low, high = -high, -low
    if high < 0:
        small = "" if low <= -effect else f", by less than {effect:g}"
        return HOLDS + small
    return FAILS if low > -effect else OPEN
