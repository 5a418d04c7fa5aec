"""What a sweep of learning rates says of a study: the best of each arm, and its part of the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from heedful.comparison.sweep import at_the_edge, best_of, rates_table
from heedful.study.plan import Study
from heedful.study.verdict import value_of

Row = Mapping[str, Any]


def best_rates(study: Study, rows: Sequence[Row]) -> dict[str, float]:
    """The learning rate of each arm with the lowest validation loss, for arms that have rows."""
    return best_of(_by_arm(study, rows, "loss"))


def sweep_section(study: Study, rows: Sequence[Row]) -> str:
    """The table of the page: every arm at every rate, and who is best at an edge; empty without rows."""
    rows = [row for row in rows if row["arm"] in study.arms and row["lr"] in study.rates]
    if not rows:
        return ""
    best = {f"`{name}`": lr for name, lr in best_rates(study, rows).items()}
    values = {f"`{name}`": of for name, of in _by_arm(study, rows, study.metric).items()}
    lines = [
        f"**Sweep of learning rates** ({study.metric}, one run each on a seed of its own; bold: the one taken)",
        rates_table("arm", values, best, study.rates, 4),
    ]
    if edge := at_the_edge(best, study.rates):
        lines.append(
            f"The best rate is at an edge of what was tried, so that there may be a better one: {', '.join(edge)}."
        )
    return "\n\n".join(lines)


def _by_arm(study: Study, rows: Sequence[Row], metric: str) -> dict[str, dict[float, float]]:
    """The metric by arm and rate, of arms that have rows, in their order."""
    found = {
        name: {row["lr"]: value_of(row, metric) for row in rows if row["arm"] == name} for name in study.arms
    }
    return {name: of for name, of in found.items() if of}
