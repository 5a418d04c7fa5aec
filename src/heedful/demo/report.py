"""The demo's tables, for a terminal and for summary.md."""

import textwrap
from collections.abc import Mapping

from rich.table import Table

from heedful.demo.figures import POLICIES, Held
from heedful.demo.jobs import Answers
from heedful.screen import Column, table, text

HELD_COLUMNS = ("form", "kept", "loss", "vs standard", "bytes", "fewer bytes")


def held_rows(held: Held) -> list[list[str]]:
    """Per form and budget: loss, bytes, and how they compare with standard attention's full cache."""
    first = next(iter(held.values()))[0]
    return [
        [
            label,
            "all" if r.policy is None else str(r.kv_budget),
            f"{r.loss:.3f}",
            f"{r.loss - first.loss:+.3f}",
            f"{r.cache_bytes:,}",
            f"{first.cache_bytes / r.cache_bytes:.1f}x",
        ]
        for label, results in held.items()
        for r in results
    ]


def held_table(held: Held, context: int, width: int) -> Table:
    """Loss and bytes of the caches, for a terminal."""
    title = (
        f"loss, and bytes of one text's cache, by the tokens of {context} kept per layer: those with the fewest "
        f"votes against them; in softmax attention, which has none, the first and the last"
    )
    columns = [text(HELD_COLUMNS[0]), *(Column(c, optional=c == "bytes") for c in HELD_COLUMNS[1:])]
    ends = [sum(len(r) for r in list(held.values())[: i + 1]) - 1 for i in range(len(held))]
    return table(columns, held_rows(held), title=title, width=width, lines_after=ends)


def answers_table(answers: Mapping[str, Answers], width: int) -> Table:
    """Right answers per score and length, for a terminal."""
    lengths = list(next(iter(answers.values())).by_length)
    rows = [[s, *(f"{a.by_length[n]:.1%}" for n in lengths)] for s, a in answers.items()]
    columns = [text("score"), *(Column(f"{n} statements") for n in lengths)]
    return table(columns, rows, title="right answers", width=width)


def kept_table(kept: Mapping[str, Mapping[int, float]], statements: int, width: int) -> Table:
    """Right answers of the selective model under a budget, for a terminal."""
    budgets = sorted(next(iter(kept.values())))
    rows = [[POLICIES[p], *(f"{a[n]:.0%}" for n in budgets)] for p, a in kept.items()]
    title = f"right answers of the selective model, {statements} statements, by tokens kept per layer"
    return table([text("evicting"), *(Column(str(n)) for n in budgets)], rows, title=title, width=width)


def markdown(
    held: Held,
    context: int,
    rows: int,
    memory_loss: float,
    answers: Mapping[str, Answers],
    statements: int,
    sample_title: str,
    sample: str,
) -> str:
    """What follows the comparison in summary.md."""
    lengths = list(next(iter(answers.values())).by_length)
    selective = answers["selective"]
    kept = selective.by_budget
    budgets = sorted(next(iter(kept.values())))
    steps = selective.result.config["train"]["steps"]
    parts = [
        "",
        "ms/step is that of one thread while another model trains beside it.",
        "",
        f"The selective models are trained with the memory loss ({memory_loss:g}). With caches that keep few of "
        f"{context} tokens per layer (the same {rows} rows; softmax attention keeps the first and the last "
        "tokens):",
        "",
        *_markdown_table(HELD_COLUMNS, held_rows(held)),
        "",
        "![held](kv-text.png)",
        "",
        "# Variable assignment",
        "",
        f"Statements `[op, var, value]`; at every `?` the model gives the current value. Trained on {lengths[0]} "
        f"statements for {steps} steps, tested on longer programs (one seed). **Softmax attention learns this "
        f"task too, later**: results/variable-assignment says when, and how both then do at greater lengths.",
        "",
        *_markdown_table(
            ("score", *(f"{n} statements" for n in lengths)),
            [[s, *(f"{a.by_length[n]:.1%}" for n in lengths)] for s, a in answers.items()],
        ),
        "",
        "![answers](variable-assignment.png)",
        "",
        f"The selective model on {statements} statements ({3 * statements + 1} tokens), with caches that keep "
        "few tokens per layer:",
        "",
        *_markdown_table(
            ("tokens kept", *map(str, budgets)),
            [[POLICIES[p], *(f"{a[n]:.1%}" for n in budgets)] for p, a in kept.items()],
        ),
        "",
        "![kept](kv-budget.png)",
        "",
        f"# Text from {sample_title}",
        "",
        textwrap.indent(textwrap.fill(sample, 100), "> "),
        "",
    ]
    return "\n".join(parts)


def _markdown_table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
