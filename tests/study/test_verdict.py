"""What an interval says of a claim."""

from typing import Any

import pytest

from heedful.comparison.statistics import Interval
from heedful.study.plan import Contrast
from heedful.study.verdict import FAILS, HOLDS, OPEN, judge, value_of


@pytest.mark.parametrize(
    ("claims", "low", "high", "says"),
    [
        ("lower", -0.3, -0.2, HOLDS),
        ("lower", -0.3, -0.01, HOLDS),
        ("lower", -0.09, -0.01, HOLDS + ", by less than 0.1"),
        ("lower", -0.09, 0.01, FAILS),
        ("lower", -0.2, 0.01, OPEN),
        ("lower", 0.1, 0.3, FAILS),
        ("higher", 0.01, 0.3, HOLDS),
        ("higher", 0.01, 0.09, HOLDS + ", by less than 0.1"),
        ("higher", -0.3, 0.09, FAILS),
        ("higher", -0.3, 0.2, OPEN),
        ("equal", -0.09, 0.09, HOLDS),
        ("equal", -0.2, 0.05, OPEN),
        ("equal", 0.11, 0.2, FAILS),
        ("equal", -0.2, -0.11, FAILS),
    ],
)
def test_judge(claims: Any, low: float, high: float, says: str):
    found = judge(Contrast("a", "b", claims), Interval((low + high) / 2, low, high), effect=0.1)
    assert found == says


def test_values():
    row = {"val_loss": 2.0, "accuracy_at": {"1": 0.9, "2": 0.8, "4": 0.7}}
    metrics = ("loss", "accuracy", "accuracy at 2x", "accuracy at 4x")
    assert [value_of(row, metric) for metric in metrics] == [2.0, 0.9, 0.8, 0.7]
