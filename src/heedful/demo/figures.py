"""The demo's figures: one colour per form, as everywhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heedful.evaluation.kv_budget import BudgetResult
from heedful.plotting import COLORS, colors, label_ends, new_figure, save, spread_labels, titled
from heedful.training import RunResult

Held = Mapping[str, Sequence[BudgetResult]]
"""Per form, the full cache first."""


def percents(axes: Any, top: float = 1.08) -> None:
    """An axis of shares."""
    axes.set_ylim(0, top)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def plot_held(held: Held, context: int, path: Path) -> None:
    """Loss against the bytes of the cache, a line per form, the full cache as a ring."""
    figure, axes = new_figure(size=(9, 4.6))
    axes.set_xscale("log", base=2)
    ends, kept = [], set[int]()
    for color, (label, results) in zip(colors(list(held)), held.items(), strict=True):
        points = sorted((r.cache_bytes / 1024, r.loss) for r in results)
        kept |= {r.kv_budget for r in results if isinstance(r.kv_budget, int)}
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, linewidth=2, marker="o", markersize=4)
        axes.plot(xs[-1], ys[-1], "o", markersize=9, markerfacecolor="white", markeredgecolor=color)
        ends.append((xs[0], ys[0], label, color))
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    heights = spread_labels([y for _, y, _, _ in ends], 0.06 * (top - bottom))
    for (x, _, label, color), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            (x, height),
            xytext=(-10, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=color,
            # a line of another form may pass behind
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            zorder=5,
        )
    ticks = [2.0**n for n in range(-4, 20) if left / 8 <= 2.0**n <= right * 1.2]
    axes.set_xlim(left / 7, right)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("KiB of cache for one text; the ring is the full cache")
    axes.set_ylabel("loss (nats per token)")
    named = ", ".join(map(str, sorted(kept)))
    titled(
        axes,
        "Loss against the memory of the cache",
        f"Jane Austen, one seed; {named} and all {context} tokens kept per layer (softmax: first and last)",
    )
    save(figure, path)


def plot_learning(results: Mapping[str, RunResult], statements: int, path: Path) -> None:
    """Right answers on variable assignment while the demo trains, a line per score."""
    figure, axes = new_figure(size=(9, 4.4))
    percents(axes)
    ends = []
    for score, result in results.items():
        steps = result.config["train"]["steps"]
        curve = [(tokens * steps / result.tokens, right) for tokens, _, right in result.curve]
        axes.plot(*zip(*curve, strict=True), color=COLORS[score], linewidth=2.2, marker="o", markersize=3)
        ends.append((curve[-1][1], score, COLORS[score]))
    axes.margins(x=0.02)
    label_ends(axes, ends)
    axes.set_xlabel("training steps")
    titled(
        axes,
        f"Variable assignment: the first {steps} steps",
        f"answers that are right, {statements} statements, one seed; softmax attention learns it later",
    )
    save(figure, path)


def plot_kept(
    kept: Mapping[str, Mapping[int, float]], full: float, statements: int, tokens: int, path: Path
) -> None:
    """Right answers of the selective model against tokens kept, a line per policy."""
    figure, axes = new_figure(size=(9, 4.6))
    percents(axes, 1.12)
    axes.set_xscale("log", base=2)
    budgets = sorted(next(iter(kept.values())))
    axes.set_xticks(budgets, [str(n) for n in budgets])
    axes.minorticks_off()
    axes.axhline(full, color="#999999", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"full cache, {tokens} tokens",
        (budgets[0], full),
        xytext=(0, 4),
        textcoords="offset points",
        color="#777777",
        fontsize=9,
    )
    ends = []
    for color, (policy, accuracy) in zip(colors(list(kept)), kept.items(), strict=True):
        axes.plot(budgets, [accuracy[n] for n in budgets], color=color, linewidth=2, marker="o", markersize=4)
        ends.append((accuracy[budgets[-1]], POLICIES[policy], color))
    axes.margins(x=0.03)
    label_ends(axes, ends)
    axes.set_xlabel("tokens kept per layer")
    titled(
        axes,
        "Answers that are right with a small cache",
        f"the selective model on {statements} statements, one seed; evicting while it reads",
    )
    save(figure, path)


POLICIES = {"selective": "by its votes", "h2o": "by H2O", "streaming": "first and last tokens"}
"""How a policy is called in the demo."""
