"""The look of every figure: one palette, quiet axes, labels at the lines."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heedful.files import write_bytes

COLORS = {
    "softmax": "#4C6A92",
    "selective": "#C8553D",
    "sas x softmax": "#3F9C8F",
    "sas x selective": "#DB8F1F",
    "streaming": "#7B4B94",
    "h2o": "#7A5C3E",
    "tova": "#C2678F",
    "snapkv": "#4F8A3C",
    "keydiff": "#1F9BCF",
    "random": "#8A8A8A",
}
"""One colour per form and per policy, in every figure. A score alone is in standard attention, an attention alone
has softmax."""
OTHERS = ("#5B8C2A", "#2F7FC1", "#444444", "#A14D00", "#9A8FC4", "#B0A030")
"""For what has no colour of its own: other forms, baselines."""


def colors(names: Sequence[str]) -> list[str]:
    """A colour for each name: its own, or else one of `OTHERS`, in order of appearance."""
    own = [_own(name) or _own(f"{name} x softmax") for name in names]
    others = [name for name, color in zip(names, own, strict=True) if color is None]
    return [color or OTHERS[others.index(n) % len(OTHERS)] for n, color in zip(names, own, strict=True)]


def _own(name: str) -> str | None:
    return COLORS.get(name.removeprefix("mha x "))


def new_figure(panels: int = 1, size: tuple[float, float] = (8.0, 4.6), **layout: Any) -> tuple[Any, Any]:
    """A figure and its axes (an array of them for more than one panel), drawn without a display."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", **layout)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(color="#888888", labelcolor="#444444")
    return figure, axes


def titled(axes: Any, title: str, subtitle: str) -> None:
    """What the figure shows, above it, flush left."""
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold", color="#222222")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9.5, color="#666666")


def save(figure: Any, path: Path, description: str | None = None) -> None:
    """Write a PNG, with what it shows in words where that is given, and forget the figure."""
    import matplotlib.pyplot as plt

    png = io.BytesIO()
    figure.savefig(png, dpi=160, format="png", metadata={"Description": description} if description else None)
    write_bytes(path, png.getvalue())
    plt.close(figure)


def label_ends(axes: Any, ends: Sequence[tuple[float, str, str]], gap: float = 0.055) -> None:
    """Name lines at the right edge: (height, label, color) each, kept `gap` of the axis apart."""
    bottom, top = axes.get_ylim()
    heights = spread_labels([height for height, _, _ in ends], gap * (top - bottom))
    for (_, label, color), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=10,
            annotation_clip=False,
        )


def spread_labels(values: list[float], gap: float) -> list[float]:
    """Heights for labels at the ends of lines, `gap` apart at least, as near to `values` as can be."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [values[i] for i in order]
    for _ in range(200):
        for i in range(1, len(placed)):
            overlap = gap - (placed[i] - placed[i - 1])
            if overlap > 1e-12:
                placed[i] += overlap / 2
                placed[i - 1] -= overlap / 2
    result = [0.0] * len(values)
    for height, i in zip(placed, order, strict=True):
        result[i] = height
    return result
