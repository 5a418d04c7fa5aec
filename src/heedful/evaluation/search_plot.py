"""budget.png: the loss on the search rows while the budgets shrink."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heedful.plotting import COLORS, new_figure, save, titled


def plot_search(
    path: Path,
    kept: Sequence[float],
    losses: Sequence[float],
    target: float,
    *,
    target_label: str,
    title: str,
    subtitle: str,
) -> None:
    """Draw loss against tokens held, with the target and the point where the search ended.

    Args:
        path: the PNG to write.
        kept: tokens held per layer on average, from the full cache to the end of the search.
        losses: the loss at each, nats per token.
        target: the highest loss allowed.
        target_label: what the target is.
        title: what the figure shows.
        subtitle: how it was measured.
    """
    figure, axes = new_figure()
    line, goal = COLORS["selective"], "#666666"
    axes.axhline(target, color=goal, linewidth=1.4, linestyle=(0, (5, 3)))
    axes.plot(kept, losses, color=line, linewidth=2, marker="o", markersize=3.5)
    axes.plot(kept[0], losses[0], "o", markersize=8, markerfacecolor="white", markeredgecolor=line)
    axes.plot(kept[-1], losses[-1], "o", markersize=9, color=line)
    low, high = min(*losses, target), max(*losses, target)
    room = max(high - low, 1e-3)
    axes.set_ylim(low - 0.22 * room, high + 0.22 * room)
    axes.set_xscale("log", base=2)
    _ticks(axes, kept)
    axes.annotate(
        target_label,
        (1, target),
        xycoords=("axes fraction", "data"),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        color=goal,
        fontsize=10,
    )
    axes.annotate(
        "full cache",
        (kept[0], losses[0]),
        xytext=(0, -9),
        textcoords="offset points",
        ha="center",
        va="top",
        color=line,
        fontsize=10,
    )
    if len(kept) > 1:
        axes.annotate(
            f"{kept[-1]:.1f} tokens\nper layer,\n{kept[0] / kept[-1]:.1f}x less",
            (kept[-1], losses[-1]),
            xytext=(-10, 4),
            textcoords="offset points",
            ha="right",
            va="top",
            color=line,
            fontsize=10,
        )
    axes.set_xlabel("tokens held per layer, on average (log scale)")
    axes.set_ylabel("loss on the search rows (nats per token)")
    titled(axes, title, subtitle)
    save(figure, path)


def _ticks(axes: Any, kept: Sequence[float]) -> None:
    """Powers of two, with room on the left for the label of the last point."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(kept), max(kept)
    axes.set_xlim(low / max(1.25, (high / low) ** 0.22), high * max(1.1, (high / low) ** 0.06))
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([2.0**n for n in range(30) if left <= 2.0**n <= right]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
