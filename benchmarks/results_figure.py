"""The verdicts of all studies in one picture: how far each first contrast is from 0, in effects looked for."""

import math
from collections.abc import Sequence
from pathlib import Path

from heedful.plotting import label_ends, new_figure, save, titled
from heedful.study.plan import Study
from heedful.study.verdict import HOLDS, OPEN, Verdict

HOLDS_COLOR, FAILS_COLOR, OPEN_COLOR = "#3F9C8F", "#C8553D", "#8A8A8A"
FARTHEST = 6.0
"""Effects; what lies beyond ends in an arrow."""


def draw_verdicts(found: Sequence[tuple[str, Study, Verdict]], path: Path) -> None:
    """Draw the first contrast of each study, its 95 % interval divided by the effect that was looked for.

    Args:
        found: the study's letter, the study and the verdict of its first contrast.
        path: the PNG; what it shows is in its metadata, so that a picture of other data is noticed.
    """
    figure, axes = new_figure(1, (10.0, 1.4 + 0.36 * len(found)))
    axes.grid(axis="y", visible=False)
    axes.axvspan(-1, 1, color="#EEEEEE", zorder=0)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_xlim(-FARTHEST, FARTHEST)
    ends = []
    for place, (_, study, verdict) in enumerate(found):
        estimate, low, high = in_effects(study, verdict)
        color = _color(verdict.says)
        axes.plot(
            [_inside(low), _inside(high)], [place, place], color=color, linewidth=2.4, solid_capstyle="butt"
        )
        for end in (low, high):
            if abs(end) > FARTHEST:
                axes.scatter(
                    [_inside(end)], [place], s=60, color=color, marker="<" if end < 0 else ">", clip_on=False
                )
        if abs(estimate) <= FARTHEST:
            axes.scatter([estimate], [place], s=44, color=color, zorder=3)
        said = {HOLDS: "holds", OPEN: "not resolved"}.get(verdict.says, verdict.says.partition(",")[0])
        ends.append((float(place), f"{said}, {verdict.seeds} seeds", color))
    axes.set_yticks(range(len(found)), [_label(*row) for row in found], fontsize=9.5)
    axes.set_ylim(len(found) - 0.5, -0.5)
    label_ends(axes, ends, gap=0.0)
    axes.set_xticks([-5, -3, -1, 0, 1, 3, 5])
    axes.set_xlabel("against the claim  ←  difference, in effects looked for  →  as claimed")
    titled(
        axes,
        "What was claimed, and what came out",
        "each study's first contrast: mean and 95 %; grey: less than the effect",
    )
    save(figure, path, shown(found))


def in_effects(study: Study, verdict: Verdict) -> tuple[float, float, float]:
    """Estimate and ends of the interval, in effects; above 0 is as claimed, or, where equality is, higher."""
    d = verdict.difference
    estimate, low, high = (x / study.effect for x in (d.estimate, d.low, d.high))
    return (-estimate, -high, -low) if verdict.contrast.claims == "lower" else (estimate, low, high)


def shown(found: Sequence[tuple[str, Study, Verdict]]) -> str:
    """What a picture of these says, as text."""
    lines = []
    for letter, study, verdict in found:
        numbers = " ".join(f"{x:.4f}" for x in in_effects(study, verdict))
        lines.append(f"{letter} {study.title}: {numbers}, {verdict.seeds}, {verdict.says}")
    return "\n".join(lines)


def text_of(path: Path) -> str:
    """What a picture says that it shows."""
    from PIL import Image

    with Image.open(path) as picture:
        return str(picture.info.get("Description", ""))


def _label(letter: str, study: Study, verdict: Verdict) -> str:
    alike = ", alike" if verdict.contrast.claims == "equal" else ""
    return f"{letter}. {study.title.partition(':')[0]}{alike}"


def _inside(x: float) -> float:
    return math.copysign(min(abs(x), FARTHEST), x)


def _color(says: str) -> str:
    if says.startswith(HOLDS):
        return HOLDS_COLOR
    return OPEN_COLOR if says == OPEN else FAILS_COLOR
