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
    return {form: min(tried, key=tried.__getitem__) for form, tried in losses.items() if tried}


def edge_note(losses: Losses, rates: Sequence[float]) -> str:
    """Which forms are best at the least or the greatest rate that was tried; empty if none is."""
    edge = [form for form, lr in best_of(losses).items() if lr in (min(rates), max(rates))]
    if not edge:
        return ""
    return f"The best rate is at an edge of the sweep, there may be a better one: {', '.join(edge)}."


def sweep_markdown(losses: Losses, rates: Sequence[float]) -> str:
    """For summary.md: every form at every rate, the best in bold."""
    best, ordered = best_of(losses), sorted(rates)
    lines = ["| form | " + " | ".join(f"{lr:g}" for lr in ordered) + " |", "|---" * (len(ordered) + 1) + "|"]
    for form, tried in losses.items():
        cells = [f"{tried[lr]:.3f}" if lr in tried else "" for lr in ordered]
        cells = [
            f"**{cell}**" if lr == best.get(form) else cell for lr, cell in zip(ordered, cells, strict=True)
        ]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    what = "**Sweep of learning rates**: validation loss of one run each, on a seed that counts nowhere else."
    return "\n\n".join(part for part in (what, "\n".join(lines), edge_note(losses, rates)) if part)
