"""compare.png: validation loss against tokens, a line per form, the seeds as a band."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from heedful.comparison.table import FormSummary
from heedful.plotting import colors, new_figure, save, spread_labels, titled


def plot_curves(summaries: Sequence[FormSummary], path: Path, title: str, subtitle: str) -> None:
    """Draw the curves; the label at the end of each line names the form."""
    figure, axes = new_figure()
    ends, names = [], []
    for color, s in zip(colors([s.name for s in summaries]), summaries, strict=True):
        n = min(len(run.curve) for run in s.runs)
        tokens = [s.runs[0].curve[i][0] / 1e6 for i in range(n)]
        losses = [[run.curve[i][1] for run in s.runs] for i in range(n)]
        middle = [mean(values) for values in losses]
        marker = "o" if n < 12 else None
        axes.plot(tokens, middle, color=color, linewidth=2, marker=marker, markersize=4)
        if len(s.runs) > 1:
            low, high = [min(v) for v in losses], [max(v) for v in losses]
            axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
        ends.append((tokens[-1], middle[-1], color))
        names.append(s.name)
    bottom, top = axes.get_ylim()
    heights = spread_labels([y for _, y, _ in ends], 0.055 * (top - bottom))
    for (x, _, color), y, name in zip(ends, heights, names, strict=True):
        axes.annotate(
            name, (x, y), xytext=(8, 0), textcoords="offset points", color=color, va="center", fontsize=10
        )
    axes.set_xlabel("million tokens trained on")
    axes.set_ylabel("validation loss (nats per token)")
    axes.margins(x=0.02)
    titled(axes, title, subtitle)
    save(figure, path)
