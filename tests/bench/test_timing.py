"""Timing: turns, medians, spread, and what decides how often a case runs."""

import gc
import itertools
import time

import pytest
import torch

from heedful.bench import interleaved
from heedful.bench.timing import FEWEST, FEWEST_SLOW, MOST, timing


def test_cases_take_turns():
    order = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert [t.turns for t in timings.values()] == [3, 3]
    assert all(0 <= t.low <= t.seconds <= t.high for t in timings.values())


def test_median_and_quartiles():
    result = timing("a", [5.0, 1.0, 2.0, 3.0, 4.0])
    assert (result.low, result.seconds, result.high, result.turns) == (2.0, 3.0, 4.0, 5)
    assert result.samples == (5.0, 1.0, 2.0, 3.0, 4.0)


def test_time_decides_how_often_a_case_runs():
    runs = []

    def slow():
        runs.append("slow")
        time.sleep(0.02)

    timings = interleaved({"fast": lambda: runs.append("fast"), "slow": slow}, seconds=0.2, warmup=1)
    assert timings["fast"].turns == MOST
    assert timings["slow"].turns == FEWEST  # 0.1 s would be 5 runs
    # those of the slow case are spread over all turns, not bunched
    turns = [i for i, name in enumerate(runs[2:]) if name == "slow"]
    gaps = [b - a for a, b in itertools.pairwise(turns)]
    assert max(gaps) - min(gaps) <= 1


def test_very_slow_cases_run_three_times(monkeypatch):
    monkeypatch.setattr("heedful.bench.timing.SLOW", 0.01)
    timings = interleaved({"slow": lambda: time.sleep(0.02)}, seconds=0.01, warmup=1)
    assert timings["slow"].turns == FEWEST_SLOW == 3


def test_the_garbage_of_one_case_is_not_left_to_the_next():
    alive = []

    class Node:
        def __init__(self):
            self.me = self

        def __del__(self):
            alive.remove(id(self))

    def make():
        alive.append(id(Node()))

    assert gc.isenabled()
    seen = []
    interleaved({"a": make, "b": lambda: seen.append((len(alive), gc.isenabled()))}, turns=3)
    assert seen == [(0, False)] * 5
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_progress_counts_every_run():
    calls = []
    cases = {"a": lambda: None, "b": lambda: None}
    interleaved(cases, turns=3, warmup=2, progress=lambda *done: calls.append(done))
    assert calls == [(i, 10) for i in range(1, 11)]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="2 turns or more"):
        interleaved({"a": lambda: None}, turns=1)
    with pytest.raises(ValueError, match="at least one case"):
        interleaved({})


def test_a_device_without_a_queue_is_not_waited_for():
    assert interleaved({"a": lambda: None}, turns=2, device=torch.device("cpu"))["a"].turns == 2


def test_slow_cases_warm_up_once(monkeypatch):
    monkeypatch.setattr("heedful.bench.timing.SLOW", 0.01)
    runs = []
    cases = {"fast": lambda: runs.append("fast"), "slow": lambda: (runs.append("slow"), time.sleep(0.02))}
    interleaved(cases, turns=2, warmup=2)
    assert runs == ["fast", "slow", "fast", *["fast", "slow"] * 2]
