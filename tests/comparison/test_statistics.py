"""Intervals, seeds and the compute multiplier against what is known of them."""

import math
from typing import Any

import numpy as np
import pytest

from heedful.comparison.multiplier import cost_at, multiplier, training_flops, written
from heedful.comparison.statistics import Interval, bootstrapped, paired, seeds_needed
from heedful.training import RunResult


def test_the_interval_of_a_paired_t_test():
    """By hand: mean 2, standard deviation 1, n = 4, t(0.975, 3) = 3.182."""
    found = paired([1.0, 2.0, 2.0, 3.0])
    half = 3.182446 * math.sqrt(2 / 3) / 2
    assert found.estimate == 2.0
    assert found.low == pytest.approx(2 - half, abs=1e-5) and found.high == pytest.approx(2 + half, abs=1e-5)
    assert found.excludes(0.0) and not found.excludes(1.0)


def test_it_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum(not paired(list(rng.normal(0.3, 1.0, 5))).excludes(0.3) for _ in range(1000))
    assert 930 <= hits <= 968


def test_too_few_seeds_say_so():
    assert paired([0.5]) == Interval(0.5, -math.inf, math.inf)
    assert paired([0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    assert bootstrapped(lambda drawn: 1.0, 1) == Interval(1.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="no seed is common"):
        paired([])


def test_seeds_that_an_effect_needs():
    """Cohen's d of 0.5, 1 and 2 need 34, 10 and 5 pairs at 80 % power (any table of the paired t test)."""
    assert [seeds_needed(d, 1.0) for d in (0.5, 1.0, 2.0)] == [34, 10, 5]
    rng = np.random.default_rng(0)
    found = sum(paired(list(rng.normal(1.0, 1.0, 10))).excludes(0.0) for _ in range(1000))
    assert 770 <= found <= 850


def run(seed: int, loss: float, tokens: int, flops: int = 100, per_second: float = 10.0) -> RunResult:
    fields: dict[str, Any] = {"attention": "mha", "score": "softmax", "seed": seed, "lr": 1e-3, "params": 1}
    fields |= {"flops_per_token": flops, "tokens": tokens, "val_loss": loss, "val_bpb": None}
    fields |= {"val_accuracy": 0.0, "seconds_per_step": 1.0, "tokens_per_second": per_second}
    return RunResult(**fields, cache_bytes_per_token=1, curve=[], config={})


def baseline(noise: float = 0.0) -> list[RunResult]:
    """Loss falls by 0.1 with every doubling."""
    rng = np.random.default_rng(1)
    shifts = rng.normal(0, noise, 6)
    return [run(seed, 5 - 0.1 * i + shifts[seed], 1000 * 2**i) for seed in range(6) for i in range(4)]


def test_twice_the_loss_of_compute():
    """A form at twice the FLOPs per token whose loss is that of the baseline at 4 times its tokens saves half."""
    form = [run(seed, 4.8, 1000, flops=200) for seed in range(6)]
    found = multiplier(form, baseline(), training_flops)
    assert found is not None
    assert found.estimate == pytest.approx(2.0) and found.low == pytest.approx(2.0)
    seconds = multiplier(form, baseline(), lambda r: r.tokens / r.tokens_per_second)
    assert seconds is not None and seconds.estimate == pytest.approx(4.0)


def test_its_interval_is_that_of_the_pairs():
    """What all forms of a seed share falls out; what they do not does not."""
    shared = multiplier(
        [run(r.seed, r.val_loss - 0.15, 1000) for r in baseline(0.3) if r.tokens == 1000],
        baseline(0.3),
        training_flops,
    )
    assert shared is not None
    assert shared.estimate == pytest.approx(2**1.5) and shared.high - shared.low < 1e-6
    rng = np.random.default_rng(2)
    apart = multiplier(
        [run(seed, 4.85 + rng.normal(0, 0.05), 1000) for seed in range(6)], baseline(), training_flops
    )
    assert apart is not None and apart.low < 2**1.5 < apart.high and apart.high - apart.low > 0.5


def test_beyond_what_was_run():
    better = multiplier([run(s, 4.0, 1000) for s in range(6)], baseline(), training_flops)
    worse = multiplier([run(s, 5.5, 1000) for s in range(6)], baseline(), training_flops)
    assert better is not None and better.estimate == math.inf and "beyond the longest run" in written(better)
    assert worse is not None and worse.estimate == 0 and "below the shortest run" in written(worse)
    assert multiplier([run(0, 4.8, 1000)], [run(0, 5.0, 1000)], training_flops) is None
    assert multiplier([run(9, 4.8, 1000)], baseline(), training_flops) is None
    assert written(None) == ""


def test_where_a_curve_reaches_a_loss():
    costs, losses = [1.0, 4.0, 16.0], [3.0, 2.0, 2.0]
    assert cost_at(3.0, costs, losses) == 1.0
    assert cost_at(2.5, costs, losses) == pytest.approx(2.0)  # half-way in the logarithm
    assert cost_at(2.0, costs, losses) == pytest.approx(4.0)
    assert cost_at(1.9, costs, losses) == math.inf
    assert cost_at(3.1, costs, losses) == 0.0
