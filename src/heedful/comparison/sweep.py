"""The sweep of learning rates of a comparison, so that no form is judged on the run that chose its rate."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from heedful.files import write_text

SWEEP_SEED = 1000
"""The sweep has a seed of its own: no seed that counts chose a learning rate."""
FILE = "sweep.jsonl"

Losses = Mapping[str, Mapping[float, float]]
"""The validation loss of each form at each rate."""


def write_sweep(out: Path, losses: Losses) -> None:
    """A row for each run of the sweep."""
    rows = [
        {"form": form, "lr": lr, "seed": SWEEP_SEED, "val_loss": loss}
        for form, tried in losses.items()
        for lr, loss in tried.items()
    ]
    write_text(out / FILE, "".join(json.dumps(row) + "\n" for row in rows))


def best_of(losses: Losses) -> dict[str, float]:
    """The rate of each form with the lowest loss."""
    return {form: min((loss, lr) for lr, loss in tried.items())[1] for form, tried in losses.items() if tried}


def at_the_edge(best: Mapping[str, float], rates: Sequence[float]) -> list[str]:
    """Who is best at the least or the greatest rate that was tried: there may be better ones."""
    return [name for name, lr in best.items() if lr in (min(rates), max(rates))]


def edge_note(losses: Losses, rates: Sequence[float]) -> str:
    """Which forms are best at an edge; empty if none is."""
    edge = at_the_edge(best_of(losses), rates)
    return (
        f"The best rate is at an edge of the sweep, there may be a better one: {', '.join(edge)}."
        if edge
        else ""
    )


def rates_table(
    who: str, values: Losses, best: Mapping[str, float], rates: Sequence[float], digits: int
) -> str:
    """In Markdown: everyone at every rate, the one taken in bold."""
    ordered = sorted(rates)
    lines = [
        f"| {who} | " + " | ".join(f"{lr:g}" for lr in ordered) + " |",
        "|---" * (len(ordered) + 1) + "|",
    ]
    for name, tried in values.items():
        cells = [f"{tried[lr]:.{digits}f}" if lr in tried else "" for lr in ordered]
        cells = [
            f"**{cell}**" if lr == best.get(name) else cell for lr, cell in zip(ordered, cells, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep_markdown(losses: Losses, rates: Sequence[float]) -> str:
    """For summary.md."""
    what = "**Sweep of learning rates**: validation loss of one run each, on a seed that counts nowhere else."
    table = rates_table("form", losses, best_of(losses), rates, 3)
    return "\n\n".join(part for part in (what, table, edge_note(losses, rates)) if part)
