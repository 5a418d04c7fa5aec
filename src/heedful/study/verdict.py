"""What the runs of a study allow to say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
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
    found = row.get("accuracy_at") or {}
    if times not in found:
        raise ValueError(
            f"{row['run']} has no right answers at {times}x the length; its page needs another metric"
        )
    return float(found[times])


def verdicts(
    study: Study, rows: Sequence[Mapping[str, Any]], caches: Sequence[Mapping[str, Any]] = ()
) -> list[Verdict]:
    """One for each contrast of which two seeds are there; `caches` are the rows of small caches."""
    found = []
    for contrast in study.contrasts:
        if contrast.of_caches:
            one = _of_cache(study, caches, contrast.arm, contrast.smaller, contrast.policy)
            other = _of_cache(
                study, caches, contrast.against, contrast.against_smaller, contrast.against_policy
            )
        else:
            metric = contrast.metric or study.metric
            one, other = (
                {row["seed"]: value_of(row, metric) for row in rows if row["arm"] == arm}
                for arm in (contrast.arm, contrast.against)
            )
        seeds = sorted(one.keys() & other.keys())
        if len(seeds) < 2:
            continue
        difference = paired([one[seed] - other[seed] for seed in seeds])
        found.append(Verdict(contrast, difference, len(seeds), judge(contrast, difference, study.effect)))
    return found


def _of_cache(
    study: Study, rows: Sequence[Mapping[str, Any]], arm: str, smaller: int, policy: str | None
) -> dict[int, float]:
    """The metric of an arm with a small cache, by seed: under a policy, or the one that is best on average."""
    kept = "full" if smaller == 1 else study.arms[arm].context // smaller
    by_policy: dict[str | None, dict[int, float]] = {}
    for row in rows:
        if (
            row["arm"] == arm
            and row["kv_budget"] == kept
            and (smaller == 1 or policy in (None, row["policy"]))
        ):
            by_policy.setdefault(row["policy"], {})[row["seed"]] = row[study.metric]
    if not by_policy:
        return {}
    best = min if study.metric == "loss" else max
    return best(by_policy.values(), key=lambda found: mean(found.values()))


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
