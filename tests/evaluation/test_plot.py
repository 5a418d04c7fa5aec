"""The figure of a measurement under budgets: what it draws, not how it looks."""

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

import heedful.evaluation.plot as plot_module
from heedful.evaluation import BudgetResult
from heedful.evaluation.plot import plot_budgets


def result(policy: str | None, kept: float, loss: float, accuracy: float = 0.5) -> BudgetResult:
    return BudgetResult(
        policy, "full" if policy is None else int(kept), kept, 10, loss, None, accuracy, 0.0, 1.0, 1, 1.0
    )


RESULTS = [
    result(None, 128, 2.0, 0.9),
    result("h2o", 16, 2.5, 0.6),
    result("h2o", 4, 3.0, 0.3),
    result("streaming", 4, 3.5, 0.2),
    result("streaming", 16, 2.6, 0.5),
]


@pytest.mark.parametrize("measure", ["loss", "accuracy"])
def test_lines_and_labels(measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures: list[Any] = []
    monkeypatch.setattr(plot_module, "save", lambda figure, path: figures.append(figure))
    plot_budgets(RESULTS, tmp_path / "eval.png", "a title", "a subtitle", measure)
    (axes,) = figures[0].axes
    h2o, streaming, full = axes.lines
    assert [tuple(p) for p in h2o.get_xydata()] == [
        (r.kept, getattr(r, measure)) for r in (RESULTS[2], RESULTS[1])
    ]
    assert [tuple(p) for p in streaming.get_xydata()] == [(r.kept, getattr(r, measure)) for r in RESULTS[3:]]
    assert set(full.get_ydata()) == {getattr(RESULTS[0], measure)}
    assert full.is_dashed()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["16", "4"]
    texts = {text.get_text(): text for text in axes.texts}
    assert {"h2o", "streaming", "full cache, 128 tokens", "a subtitle"} == set(texts)
    assert texts["h2o"].get_color() == h2o.get_color()
    low, high = axes.get_ylim()
    assert (
        low <= min(getattr(r, measure) for r in RESULTS) < max(getattr(r, measure) for r in RESULTS) <= high
    )


@pytest.mark.parametrize(
    "results", [RESULTS, RESULTS[1:], RESULTS[1:2], [result("h2o", 8, 2.0)] * 2], ids=len
)
def test_written(results: list[BudgetResult], tmp_path: Path):
    plot_budgets(results, tmp_path / "eval.png", "a title", "a subtitle")
    assert min(matplotlib.image.imread(tmp_path / "eval.png").shape[:2]) > 500


def test_ticks_that_would_overlap_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures: list[Any] = []
    monkeypatch.setattr(plot_module, "save", lambda figure, path: figures.append(figure))
    plot_budgets([result("h2o", n, 2.0) for n in range(2, 65)], tmp_path / "eval.png", "", "")
    ticks = sorted(figures[0].axes[0].get_xticks())
    assert ticks[-1] == 64
    assert 8 < len(ticks) < 27


def test_nothing_to_draw(tmp_path: Path):
    with pytest.raises(ValueError, match="got the full cache only"):
        plot_budgets(RESULTS[:1], tmp_path / "eval.png", "", "")
