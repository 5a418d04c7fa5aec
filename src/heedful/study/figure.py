"""The figure of a study: every arm with its seeds and its interval, or the metric against a setting."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from heedful.comparison.statistics import Interval, paired
from heedful.plotting import colors, label_ends, new_figure, save, titled
from heedful.study.plan import Study
from heedful.study.verdict import value_of
from heedful.training.settings import TrainSettings

Row = Mapping[str, Any]
MARKERS = {"s": "■", "o": "●", "^": "▲", "D": "◆", "v": "▼"}
"""Of points, and as text."""


def draw(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Draw `figure.png`."""
    if study.x:
        _against(study, rows, path)
    else:
        _intervals(study, rows, path)


def _values(study: Study, rows: Sequence[Row], arm: str) -> dict[int, float]:
    return {row["seed"]: value_of(row, study.metric) for row in rows if row["arm"] == arm}


def _intervals(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Differences from the baseline, arm by arm: seeds as dots, their 95 % interval as a line."""
    base = _values(study, rows, study.baseline)
    arms = [name for name in study.arms if name != study.baseline and _values(study, rows, name)]
    figure, axes = new_figure(1, (8.0, 1.5 + 0.42 * len(arms)))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.axvspan(-study.effect, study.effect, color="#EEEEEE", zorder=0)
    for place, (name, color) in enumerate(zip(arms, colors(arms), strict=True)):
        own = _values(study, rows, name)
        pairs = [own[seed] - base[seed] for seed in own if seed in base]
        if not pairs:
            continue
        found = paired(pairs)
        axes.scatter(pairs, [place - 0.22] * len(pairs), s=16, color=color, alpha=0.6, linewidth=0)
        if math.isfinite(found.low):
            axes.plot(
                [found.low, found.high], [place, place], color=color, linewidth=2.4, solid_capstyle="round"
            )
        axes.scatter([found.estimate], [place], s=44, color=color, zorder=3)
    axes.set_yticks(range(len(arms)), arms, fontsize=10)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    better = "less is better" if study.metric == "loss" else "more is better"
    axes.set_xlabel(f"{study.metric}, difference from {study.baseline} ({better})")
    titled(axes, study.title, "dots: paired seeds; line: 95 % interval; grey: the effect looked for")
    save(figure, path)


def _against(study: Study, rows: Sequence[Row], path: Path) -> None:
    """The metric against a setting; a line for each form."""
    figure, axes = new_figure()
    groups: dict[str, dict[float, list[float]]] = {}
    for name, settings in study.arms.items():
        values = list(_values(study, rows, name).values())
        if values:
            groups.setdefault(_form(settings), {})[float(getattr(settings, study.x))] = values
    ends = []
    for number, (color, (group, points)) in enumerate(zip(colors(list(groups)), groups.items(), strict=True)):
        places = sorted(points)
        beside = [x * 1.02 ** (number - (len(groups) - 1) / 2) for x in places]  # bars would hide each other
        middle = [mean(points[x]) for x in places]
        spread = [
            paired(points[x]) if len(points[x]) > 1 else Interval(middle[0], math.nan, math.nan)
            for x in places
        ]
        errors = [
            [m - s.low for m, s in zip(middle, spread, strict=True)],
            [s.high - m for m, s in zip(middle, spread, strict=True)],
        ]
        axes.errorbar(beside, middle, yerr=errors, color=color, linewidth=2, marker="o", capsize=3)
        ends.append((middle[-1], group, color))
    axes.set_xscale("log", base=2)
    ticks = sorted({x for points in groups.values() for x in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(study.x)
    axes.set_ylabel(study.metric + (" (nats per token)" if study.metric == "loss" else ""))
    label_ends(axes, ends)
    titled(
        axes, study.title, f"mean of the seeds, bars: 95 % interval; {next(iter(study.arms.values())).data}"
    )
    save(figure, path)


def _form(settings: TrainSettings) -> str:
    """Attention x score, with what was said of them."""
    options = {**settings.attention_options, **settings.score_options}
    said = "".join(f", {name.replace('_', ' ')} {value}" for name, value in options.items())
    return f"{settings.attention} x {settings.score}{said}"


def draw_caches(study: Study, rows: Sequence[Row], runs: Sequence[Row], path: Path) -> None:
    """Loss against the bytes of the cache of a row: every arm under its best policy, and who leads at each size.

    A full cache has the loss of all held-out rows; a budget adds what it adds on the rows it was measured on.
    """
    figure, axes = new_figure()
    arms = [name for name in study.arms if any(row["arm"] == name for row in runs)]
    ends, everyone = [], list[tuple[float, float]]()
    for name, (color, marker) in zip(arms, _looks([study.arms[name] for name in arms]), strict=True):
        points = [_full_cache(study, runs, name), *_small_caches(rows, runs, name)]
        axes.plot(*points[0], color=color, marker=marker, markersize=8)
        axes.plot(*zip(*sorted(points), strict=True), color=color, linewidth=1.6, marker=marker, markersize=4)
        everyone += points
        ends.append((points[0][1], f"{MARKERS[marker]} {name}", color))
    leading = list[tuple[float, float]]()
    for size, loss in sorted(everyone):
        if not leading or loss < leading[-1][1]:
            leading.append((size, loss))
    axes.step(*zip(*leading, strict=True), where="post", color="#999999", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("KiB of the cache of one row, all layers")
    axes.set_ylabel("loss (nats per token)")
    label_ends(axes, ends)
    titled(
        axes,
        "Loss against memory",
        "large: full caches; small: budgets, under the arm's best policy; dashed: the least loss",
    )
    save(figure, path)


def _looks(arms: Sequence[TrainSettings]) -> list[tuple[str, str]]:
    """Colour and marker of each arm: attention and score, or form and context where there is one attention."""
    several = len({arm.attention for arm in arms}) > 1
    hues = [arm.attention if several else _form(arm) for arm in arms]
    shapes = [arm.score if several else str(arm.context) for arm in arms]
    kinds, markers = list(dict.fromkeys(hues)), list(dict.fromkeys(shapes))
    color_of = dict(zip(kinds, colors(kinds), strict=True))
    return [
        (color_of[hue], list(MARKERS)[markers.index(shape) % len(MARKERS)])
        for hue, shape in zip(hues, shapes, strict=True)
    ]


def _full_cache(study: Study, runs: Sequence[Row], arm: str) -> tuple[float, float]:
    """KiB of a full row, and the loss."""
    own = [row for row in runs if row["arm"] == arm]
    kib = own[0]["cache_bytes_per_token"] * study.arms[arm].context / 1024
    return kib, mean(row["val_loss"] for row in own)


def _small_caches(rows: Sequence[Row], runs: Sequence[Row], arm: str) -> list[tuple[float, float]]:
    """The same for each budget, under the policy that is best there."""
    loss = {row["run"]: row["val_loss"] for row in runs}
    full = {row["run"]: row["loss"] for row in rows if row["policy"] is None}
    by_size: dict[Any, dict[str, list[Row]]] = {}
    for row in rows:
        if row["arm"] == arm and row["policy"] is not None:
            by_size.setdefault(row["kv_budget"], {}).setdefault(row["policy"], []).append(row)
    points = []
    for policies in by_size.values():
        best = min(policies.values(), key=lambda found: mean(row["loss"] for row in found))
        added = mean(loss[row["run"]] + row["loss"] - full[row["run"]] for row in best)
        points.append((mean(row["cache_bytes"] for row in best) / 1024, added))
    return points
