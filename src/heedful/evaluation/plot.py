"""eval.png: loss, or answers, against the tokens that the cache of each layer keeps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from heedful.evaluation.kv_budget import BudgetResult
from heedful.plotting import colors, label_ends, new_figure, save, titled


def plot_budgets(
    results: Sequence[BudgetResult],
    path: Path,
    title: str,
    subtitle: str,
    measure: Literal["loss", "accuracy"] = "loss",
) -> None:
    """Draw a line per policy, labelled at its end, and the full cache as a dashed line.

    Args:
        results: what `evaluate_budgets` returned, one budget with a policy at least.
        path: the PNG to write.
        title: what the figure shows.
        subtitle: on what it was measured.
        measure: "loss" in nats per token, or "accuracy" for tasks with right answers.

    Raises:
        ValueError: if no result has a policy: there is no line to draw.
        OSError: if `path` cannot be written.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        if r.policy is not None:
            lines.setdefault(r.policy, []).append((r.kept, getattr(r, measure)))
    if not lines:
        raise ValueError("expected a budget with a policy to draw, got the full cache only")
    figure, axes = new_figure(size=(9, 4.6))
    axes.set_xscale("log", base=2)
    kept = sorted({x for points in lines.values() for x, _ in points})
    _ticks(axes, kept)
    ends = []
    for color, (policy, points) in zip(colors(list(lines)), lines.items(), strict=True):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color=color, linewidth=2, marker="o", markersize=4)
        ends.append((ys[-1], policy, color))
    full = [r for r in results if r.policy is None]
    values = [y for points in lines.values() for _, y in points] + [getattr(r, measure) for r in full]
    low, high = min(values), max(values)
    if measure == "accuracy":
        axes.set_ylim(0, 1.12)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    else:
        reach = (high - low) or 0.1
        axes.set_ylim(low - 0.1 * reach, high + 0.06 * reach)
    for r in full:
        value = getattr(r, measure)
        axes.axhline(value, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
        # On the better side of the line, where no policy gets to.
        axes.annotate(
            f"full cache, {r.kept:g} tokens",
            (kept[0], value),
            xytext=(0, -5 if measure == "loss" else 5),
            textcoords="offset points",
            va="top" if measure == "loss" else "bottom",
            color="#777777",
            fontsize=9,
        )
    axes.margins(x=0.04)
    label_ends(axes, ends)
    axes.set_xlabel("tokens kept per layer")
    if measure == "loss":
        axes.set_ylabel("loss (nats per token)")
    titled(axes, title, subtitle)
    save(figure, path)


def _ticks(axes: Any, kept: Sequence[float]) -> None:
    """The budgets measured, as many as can be told apart."""
    reach = math.log2(kept[-1] / kept[0]) or 1.0
    shown: list[float] = []
    for x in reversed(kept):  # the largest is always shown
        if not shown or math.log2(shown[-1] / x) > 0.04 * reach:
            shown.append(x)
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.minorticks_off()
