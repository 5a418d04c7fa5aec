"""What a sweep of learning rates says: the best of each arm, and whether it lies at an edge."""

from collections.abc import Mapping, Sequence
from typing import Any

from heedful.study.plan import Study
from heedful.study.verdict import value_of

Row = Mapping[str, Any]


def best_rates(study: Study, rows: Sequence[Row]) -> dict[str, float]:
    """The learning rate of each arm with the lowest validation loss, for arms that have rows."""
    best: dict[str, float] = {}
    for name in study.arms:
        if of_arm := [(row["val_loss"], row["lr"]) for row in rows if row["arm"] == name]:
            best[name] = min(of_arm)[1]
    return best


def at_the_edge(study: Study, best: Mapping[str, float]) -> list[str]:
    """Arms whose best rate is the least or the greatest that was tried: there may be better ones."""
    return [name for name, lr in best.items() if lr in (min(study.rates), max(study.rates))]


def sweep_section(study: Study, rows: Sequence[Row]) -> str:
    """The table of the page: every arm at every rate, and who is best at an edge; empty without rows."""
    rows = [row for row in rows if row["arm"] in study.arms and row["lr"] in study.rates]
    if not rows:
        return ""
    best, rates = best_rates(study, rows), sorted(study.rates)
    lines = [
        f"**Sweep of learning rates** ({study.metric}, one run each on a seed of its own; bold: the one taken)",
        "| arm | " + " | ".join(f"{lr:g}" for lr in rates) + " |\n" + "|---" * (len(rates) + 1) + "|",
    ]
    for name in best:
        values = {row["lr"]: value_of(row, study.metric) for row in rows if row["arm"] == name}
        cells = [_cell(values.get(lr), lr == best[name]) for lr in rates]
        lines[1] += f"\n| `{name}` | " + " | ".join(cells) + " |"
    if edge := at_the_edge(study, best):
        names = ", ".join(f"`{name}`" for name in edge)
        lines.append(
            f"The best rate is at an edge of what was tried, so that there may be a better one: {names}."
        )
    return "\n\n".join(lines)


def _cell(value: float | None, taken: bool) -> str:
    if value is None:
        return ""
    return f"**{value:.4f}**" if taken else f"{value:.4f}"
