"""What an interval says of a claim."""

from collections.abc import Callable
from typing import Any

import pytest

from heedful.comparison.statistics import Interval
from heedful.study.plan import Contrast, Study
from heedful.study.verdict import FAILS, HOLDS, OPEN, judge, value_of, verdicts


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


def test_a_contrast_at_another_length(study: Callable[..., Study]):
    one = {"arm": "selective", "against": "mha", "claims": "higher"}
    task = {"data": "synthetic:mqar", "d_model": 16, "n_layers": 1, "n_heads": 2}
    s = study(metric="accuracy at 4x", train=task, contrasts=[one, {**one, "metric": "accuracy"}])
    right = {"mha": {"1": 0.5, "4": 0.4}, "selective": {"1": 0.8, "4": 0.5}}
    rows = [{"arm": arm, "seed": seed, "accuracy_at": at} for arm, at in right.items() for seed in (0, 1)]
    assert [v.difference.estimate for v in verdicts(s, rows)] == pytest.approx([0.1, 0.3])


def test_of_caches(study: Callable[..., Study]):
    """Of an arm that names no policy the one that is best on average counts, for all seeds."""
    contrasts = [
        {"arm": "selective", "smaller": 4, "against": "mha", "claims": "lower"},
        {"arm": "selective", "smaller": 4, "against": "mha", "against_smaller": 4, "claims": "lower"},
        {"arm": "mha", "against_smaller": 4, "against": "mha", "against_policy": "h2o", "claims": "equal"},
    ]
    policies = {"selective": ["selective"], "softmax": ["streaming", "h2o"]}
    s = study(contrasts=contrasts, budgets={"kept": [8], "policies": policies})
    losses = {  # arm, policy, kept: seed 0, seed 1
        ("mha", None, "full"): (4.0, 5.0),
        ("mha", "streaming", 8): (4.1, 5.9),
        ("mha", "h2o", 8): (4.5, 5.3),
        ("selective", None, "full"): (3.0, 4.0),
        ("selective", "selective", 8): (3.5, 4.3),
    }
    rows = [
        {"arm": arm, "policy": policy, "kv_budget": kept, "seed": seed, "loss": loss}
        for (arm, policy, kept), values in losses.items()
        for seed, loss in enumerate(values)
    ]
    assert [v.difference.estimate for v in verdicts(s, [], rows)] == pytest.approx([-0.6, -1.0, -0.4])
    assert [v.seeds for v in verdicts(s, [], rows)] == [2, 2, 2]
    assert verdicts(s, []) == []
