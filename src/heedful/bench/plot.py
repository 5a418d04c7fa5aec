"""kernels.png, prefill.png and train.png: time as a ratio to plain attention."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heedful.bench.workload import Figures
from heedful.plotting import COLORS, colors, label_ends, new_figure, save


def plot_ratios(
    rows: Sequence[Figures],
    workloads: Sequence[str],
    path: Path,
    title: str,
    subtitle: str,
    highlight: str,
) -> None:
    """Draw a panel per workload and a line per case; plain attention, the first case, is the dashed line at 1.

    Args:
        rows: figures of one number of threads.
        workloads: names of the panels, from left to right.
        path: the PNG to write.
        title: what the figure shows.
        subtitle: on what it was measured.
        highlight: the case that it is about.
    """
    figure, _ = new_figure(len(workloads), size=(5.6 * len(workloads) + 1.2, 5.2), sharey=True)
    panels = figure.axes
    cases = list(dict.fromkeys(row.case for row in rows if row.workload in workloads))
    plain, others = cases[0], cases[1:]
    others.sort(key=lambda case: case == highlight)  # drawn last, on top
    names = ["selective" if case == highlight else case for case in others]
    of_case = dict(zip(others, colors(names), strict=True))
    heights, labels = [0.0], []
    for panel, workload in zip(panels, workloads, strict=True):
        ends = []
        lengths = sorted({row.length for row in rows if row.workload == workload})
        for case in others:
            points = sorted(
                (row.length, math.log2(row.ratios[plain]))
                for row in rows
                if (row.workload, row.case) == (workload, case)
            )
            if not points:
                continue
            xs, ys = zip(*points, strict=True)
            width = 3 if case == highlight else 1.5
            logs = [math.log2(x) for x in xs]
            panel.plot(logs, ys, color=of_case[case], linewidth=width, marker="o", markersize=width + 2)
            heights += ys
            ends.append((ys[-1], case, of_case[case]))
        panel.axhline(0, color=COLORS["softmax"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5)
        ends.append((0.0, plain, COLORS["softmax"]))
        panel.set_xticks([math.log2(x) for x in lengths], [f"{x:,}" for x in lengths])
        panel.margins(x=0.06)
        panel.set_xlabel("tokens")
        panel.set_title(workload, loc="left", fontsize=11, color="#444444")
        labels.append(ends)
    _log_axis(panels[0], min(heights), max(heights))
    for panel, ends in zip(panels, labels, strict=True):
        label_ends(panel, ends, gap=0.05)
    panels[0].set_ylabel(f"time, {plain} = 1")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color="#222222")
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=9.5, color="#666666")
    save(figure, path)


def plot_bars(rows: Sequence[Figures], path: Path, title: str, subtitle: str) -> None:
    """Draw a panel per T and a bar per case; the first case is 1.

    Args:
        rows: figures of one number of threads.
        path: the PNG to write.
        title: what the figure shows.
        subtitle: on what it was measured.
    """
    lengths = sorted({row.length for row in rows})
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, _ = new_figure(
        len(lengths), size=(max(7.0, 4.2 * len(lengths)), 0.55 * len(cases) + 1.9), sharey=True
    )
    ratios = {(row.length, row.case): row.ratios[cases[0]] for row in rows}
    for panel, length in zip(figure.axes, lengths, strict=True):
        values = [ratios[length, case] for case in cases]
        panel.grid(visible=False)
        panel.barh(cases, values, color=colors([_form(case) for case in cases]), height=0.62)
        panel.axvline(1, color=COLORS["softmax"], linewidth=1.2, linestyle=(0, (4, 3)))
        for case, value in zip(cases, values, strict=True):
            panel.annotate(
                f"{value:.2f}",
                (value, case),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
                color="#444444",
            )
        panel.set_xlim(0, 1.15 * max(values))
        panel.set_title(f"T = {length:,}", loc="left", fontsize=11, color="#444444")
    figure.axes[0].invert_yaxis()
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color="#222222")
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=9.5, color="#666666")
    save(figure, path)


def _form(case: str) -> str:
    """The form that a case is a way to compute."""
    known = {"MHA softmax": "softmax", "SAS x selective": "sas x selective", "SAS": "sas x softmax"}
    return known.get(case, "selective" if case.startswith("selective") else case)


def _log_axis(axes: Any, low: float, high: float) -> None:
    """Ticks at powers of two, on an axis of logarithms."""
    first, last = math.floor(low - 0.1), math.ceil(high + 0.1)
    axes.set_ylim(first if low - 0.1 < first + 0.6 else low - 0.4, last)
    ticks = range(first, last + 1)
    axes.set_yticks(ticks, [f"{2.0**t:g}x" for t in ticks])
