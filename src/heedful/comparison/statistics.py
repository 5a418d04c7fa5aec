"""What seeds allow to say: paired differences with their intervals, by scipy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float
    """Both infinite where there are too few values."""

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside."""
        return not self.low <= value <= self.high


def paired(differences: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of paired differences, with the interval of the paired t test.

    Args:
        differences: one number per seed.
        confidence: of the interval.

    Raises:
        ValueError: if there are none.
    """
    if not differences:
        raise ValueError("no seed is common to both: there is nothing to pair")
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return Interval(mean, -math.inf, math.inf)
    if len(set(differences)) == 1:
        return Interval(mean, mean, mean)
    found = stats.ttest_1samp(differences, 0.0).confidence_interval(confidence)
    return Interval(mean, float(found.low), float(found.high))


def bootstrapped(
    statistic: Callable[[list[int]], float], n: int, confidence: float = CONFIDENCE, resamples: int = 2000
) -> Interval:
    """A statistic of seeds, with its percentile bootstrap interval.

    Args:
        statistic: from the numbers of the seeds drawn, with repetitions, to a number; it may be infinite.
        n: seeds there are.
        confidence: of the interval.
        resamples: how often seeds are drawn.
    """
    estimate = statistic(list(range(n)))
    if n < 2:
        return Interval(estimate, -math.inf, math.inf)

    def of_numbers(drawn: np.ndarray) -> float:
        return statistic([int(i) for i in drawn])

    with np.errstate(invalid="ignore"):  # scipy's standard error, where a value is infinite
        found = stats.bootstrap(
            (np.arange(n),),
            of_numbers,
            vectorized=False,
            n_resamples=resamples,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high))


def seeds_needed(effect: float, spread: float, confidence: float = CONFIDENCE, power: float = 0.8) -> int:
    """Seeds with which a paired t test finds a difference of `effect` in `power` of all cases.

    Args:
        effect: the difference looked for.
        spread: standard deviation of the paired differences.
        confidence: of the test, two-sided.
        power: how surely it has to be found.
    """
    for n in range(2, 10_000):
        edge = stats.t.ppf((1 + confidence) / 2, n - 1)
        shift = abs(effect) / spread * math.sqrt(n)
        if 1 - stats.nct.cdf(edge, n - 1, shift) >= power:
            return n
    return 10_000
