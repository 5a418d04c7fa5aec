"""What a sweep of learning rates says."""

from collections.abc import Callable
from typing import Any

import pytest

from heedful.comparison.sweep import at_the_edge
from heedful.study.plan import Study
from heedful.study.sweep import best_rates, sweep_section

Make = Callable[..., Study]


def row(arm: str, lr: float, loss: float) -> dict[str, Any]:
    return {"arm": arm, "lr": lr, "val_loss": loss, "role": "sweep"}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    inside = [row("mha", 0.001, 3.0), row("mha", 0.01, 2.5), row("mha", 0.1, 2.75)]
    return [*inside, row("selective", 0.01, 2.5), row("selective", 0.1, 2.25)]


def test_the_best_and_the_edge(study: Make, rows: list[dict[str, Any]]):
    s = study(rates=[0.001, 0.01, 0.1])
    best = best_rates(s, rows)
    assert best == {"mha": 0.01, "selective": 0.1}
    assert at_the_edge(best, s.rates) == ["selective"]
    assert at_the_edge({"mha": 0.001}, s.rates) == ["mha"]


def test_the_section(study: Make, rows: list[dict[str, Any]]):
    s = study(rates=[0.1, 0.001, 0.01])
    said = sweep_section(s, [*rows, row("gone", 0.1, 1.0), row("mha", 0.5, 1.0)])
    assert "| arm | 0.001 | 0.01 | 0.1 |\n|---|---|---|---|\n" in said
    assert "| `mha` | 3.0000 | **2.5000** | 2.7500 |\n| `selective` |  | 2.5000 | **2.2500** |" in said
    assert said.endswith("there may be a better one: `selective`.") and "gone" not in said
    assert sweep_section(s, []) == ""
    assert "edge" not in sweep_section(s, rows[:3])
