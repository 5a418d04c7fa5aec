"""`heedful demo`: both mechanisms beside standard attention, on real text and on a task of memory."""

import textwrap
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from transformers import set_seed

from heedful.comparison import CompareSettings, compare
from heedful.data import TokenDataset, variable_assignment
from heedful.evaluation import evaluate
from heedful.evaluation.kv_budget import BudgetResult, evaluate_budgets
from heedful.files import write_text
from heedful.hf.generation import continue_text
from heedful.hf.load import load_model, load_tokenizer
from heedful.plotting import PALETTE, new_figure, save, spread_labels, titled
from heedful.training import RunResult, TrainSettings, held_out, train

# Selective attention trains for a small cache.
SELECTIVE = {"memory_loss": 0.1}

# The small preset: what four forms can learn in some two minutes on two cores.
TEXT = TrainSettings(d_model=64, n_layers=3, n_heads=4, context=256, batch_size=4, steps=320, lr=5e-3)
TEXT_KEPT = (8, 16, 32, 64)
TEXT_UNDER_BUDGET = (
    ("mha", "softmax", "streaming"),
    ("mha", "selective", "selective"),
    ("sas", "selective", "selective"),
)
SAMPLE_KEPT = 32

# Variable assignment needs sharp attention soon: logits start at unit scale, and without QK-norm, which
# bounds them by gains that grow slowly. Neither setting lets softmax solve it in these steps.
TASK = TrainSettings(
    data="synthetic:variable-assignment",
    d_model=64,
    n_layers=2,
    n_heads=4,
    qk_norm=False,
    init_logit_std=1.0,
    batch_size=32,
    steps=240,
    lr=2e-3,
    evaluations=12,
    checkpoints=1,
)
STATEMENTS = (32, 64, 128)
KEPT = (6, 8, 12, 16, 24, 48)
BUDGETED = 64  # statements, 193 tokens, of which a cache keeps few
RUNS_UNDER_BUDGET = (
    ("selective", "selective", "selective attention, evicting by its votes"),
    ("selective", "h2o", "selective attention, evicting by H2O"),
    ("selective", "streaming", "selective attention, first and last tokens"),
    ("softmax", "h2o", "softmax attention, evicting by H2O"),
    ("softmax", "streaming", "softmax attention, first and last tokens"),
)
SCORES = ("softmax", "selective")


def demo(out: str | Path, console: Console | None = None) -> None:
    """Run the whole demonstration into `out`; what is finished there already is not trained again.

    Leaves `results.jsonl`, `summary.md`, four pictures and the models.

    Args:
        out: the folder; made if missing.
        console: where to show it.

    Raises:
        Interrupted: after Ctrl-C; the same call goes on.
        OSError: if `out` cannot be written.
    """
    out, console = Path(out), console or Console()
    started = time.perf_counter()
    console.rule("[bold]1 of 3  Language models on Jane Austen[/bold]", align="left")
    text = replace(TEXT, score="selective", score_options=SELECTIVE)
    forms = CompareSettings(attention=("mha", "sas"), score=SCORES, seeds=1, train=text)
    results = compare(forms, out, console=console)
    folders = {
        (r.attention, r.score): out / "runs" / f"{r.attention}-{r.score}-seed{r.seed}-lr{r.lr:g}"
        for r in results
    }
    with (
        console.status("the same models with a cache of few tokens") if console.is_terminal else nullcontext()
    ):
        held = _text_under_budget(folders)
    console.print(_held_table(held))
    plot_held(held, out / "kv-text.png")

    console.rule("[bold]2 of 3  Variable assignment[/bold]", align="left")
    console.print(
        "A program of statements  x = 3 · y = 7 · x = 1 · x ? 1 · ...  The model must give the current value "
        f"at every ?, trained on {STATEMENTS[0]} statements and tested on up to {STATEMENTS[-1]}.",
        highlight=False,
    )
    answers = {score: _learn_task(score, out, console) for score in SCORES}
    plot_task(answers, out / "variable-assignment.png")
    console.print(_answers_table(answers))
    with (
        console.status("the same models with a cache of few tokens") if console.is_terminal else nullcontext()
    ):
        kept = _answer_under_budget(out)
    console.print(_kept_table(kept))
    plot_kept(kept, {s: a[BUDGETED] for s, (_, a) in answers.items()}, out / "kv-budget.png")

    console.rule(f"[bold]3 of 3  Text, with a cache of {SAMPLE_KEPT} tokens[/bold]", align="left")
    best = min((r for r in results if r.score == "selective"), key=lambda r: r.val_loss)
    sample = _sample(folders[best.attention, best.score])
    title = f"{best.attention} x selective, {SAMPLE_KEPT} tokens kept per layer"
    console.print(Panel(sample, title=title, title_align="left"), highlight=False)

    summary = (out / "summary.md").read_text(encoding="utf-8")
    write_text(out / "summary.md", summary + _report(held, answers, kept, title, sample))
    minutes = (time.perf_counter() - started) / 60
    pictures = ("compare.png", "kv-text.png", "variable-assignment.png", "kv-budget.png")
    names = ("summary.md", "results.jsonl", *pictures)
    console.print(f"{minutes:.1f} minutes. In {out}: {', '.join(names)}", highlight=False)


Held = dict[str, list[BudgetResult]]
"""Per form, the full cache first."""


def _text_under_budget(folders: dict[tuple[str, str], Path]) -> Held:
    """Loss and bytes of language models with a full cache and with few tokens kept."""
    held: Held = {}
    for attention, score, policy in TEXT_UNDER_BUDGET:
        folder = folders[attention, score]
        rows = held_out(folder, load_tokenizer(folder)).rows
        some = TokenDataset(
            {name: tensor[:: max(1, len(rows) // 32)] for name, tensor in rows.tensors.items()}
        )
        held[f"{attention} x {score}"] = list(
            evaluate_budgets(load_model(folder), some, (*TEXT_KEPT, "full"), [policy], decoded=2)
        )
    return held


def _held_rows(held: Held) -> list[list[str]]:
    """Per form and budget: loss, bytes, and how they compare with standard attention's full cache."""
    first = next(iter(held.values()))[0]
    return [
        [
            label,
            "all" if r.policy is None else str(r.kv_budget),
            f"{r.loss:.3f}",
            f"{r.loss - first.loss:+.3f}",
        ]
        + [f"{r.cache_bytes:,}", f"{first.cache_bytes / r.cache_bytes:.1f}x"]
        for label, results in held.items()
        for r in results
    ]


HELD_COLUMNS = ("form", "kept", "loss", "vs standard", "bytes", "fewer bytes")


def _held_table(held: Held) -> Table:
    """Loss and bytes of the caches, for a terminal."""
    title = (
        f"loss, and bytes of one text's cache, by the tokens of {TEXT.context} kept per layer: those with\n"
        f"the fewest votes against them; in softmax attention, which has none, the first and the last"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, name in enumerate(HELD_COLUMNS):
        table.add_column(name, justify="right" if i else "left")
    for i, row in enumerate(_held_rows(held)):
        table.add_row(*row, end_section=(i + 1) % (len(TEXT_KEPT) + 1) == 0)
    return table


def plot_held(held: Held, path: Path) -> None:
    """Loss against the bytes of the cache, a line per form, the full cache as a ring."""
    figure, axes = new_figure(size=(9, 4.6))
    axes.set_xscale("log", base=2)
    ends = []
    for color, (label, results) in zip(PALETTE, held.items(), strict=False):
        points = sorted((r.cache_bytes / 1024, r.loss) for r in results)
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, linewidth=2, marker="o", markersize=4)
        axes.plot(xs[-1], ys[-1], "o", markersize=9, markerfacecolor="white", markeredgecolor=color)
        ends.append((xs[0], ys[0], label, color))
    bottom, top = axes.get_ylim()
    for (x, _, label, color), height in zip(
        ends, spread_labels([y for _, y, _, _ in ends], 0.06 * (top - bottom)), strict=True
    ):
        axes.annotate(
            label,
            (x, height),
            xytext=(-10, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=color,
        )
    ticks = [2.0**n for n in range(2, 13) if axes.get_xlim()[0] / 8 <= 2.0**n <= axes.get_xlim()[1] * 1.2]
    axes.set_xlim(axes.get_xlim()[0] / 7, axes.get_xlim()[1])
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("KiB of cache for one text; the ring is the full cache")
    axes.set_ylabel("loss (nats per token)")
    kept = ", ".join(map(str, TEXT_KEPT))
    titled(
        axes,
        "Loss against the memory of the cache",
        f"Jane Austen, one seed; {kept} and all {TEXT.context} tokens kept per layer (softmax: first and last)",
    )
    save(figure, path)


def _learn_task(score: str, out: Path, console: Console) -> tuple[RunResult, dict[int, float]]:
    """Train one form on variable assignment and test it at every length."""
    folder = out / "variable-assignment" / score
    options = SELECTIVE if score == "selective" else {}
    settings = replace(TASK, score=score, score_options=options)
    result = train(settings, folder, resume=(folder / "train.json").exists(), console=console)
    model = load_model(folder)
    accuracy = {
        n: evaluate(model, TokenDataset(variable_assignment(256, statements=n, seed=10_007 + n))).accuracy
        for n in STATEMENTS
    }
    return result, accuracy


def _answers_table(answers: dict[str, tuple[RunResult, dict[int, float]]]) -> Table:
    """Right answers per score and length, for a terminal."""
    table = Table(title="right answers", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("form")
    for n in STATEMENTS:
        table.add_column(f"{n} statements", justify="right")
    for score, (_, accuracy) in answers.items():
        table.add_row(f"mha x {score}", *(f"{accuracy[n]:.1%}" for n in STATEMENTS))
    return table


def _answer_under_budget(out: Path) -> dict[str, dict[int, float]]:
    """Right answers by model and policy, and by the tokens that the cache of each layer keeps."""
    rows = TokenDataset(variable_assignment(128, statements=BUDGETED, seed=10_007))
    accuracy: dict[str, dict[int, float]] = {}
    for score, policy, label in RUNS_UNDER_BUDGET:
        model = load_model(out / "variable-assignment" / score)
        accuracy[label] = {
            n: evaluate(model, rows, batch_size=128, kv_budget=n, policy=policy).accuracy for n in KEPT
        }
    return accuracy


def _kept_table(kept: dict[str, dict[int, float]]) -> Table:
    """Right answers under a budget, for a terminal."""
    title = f"right answers, {BUDGETED} statements ({3 * BUDGETED + 1} tokens), by tokens kept"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for n in KEPT:
        table.add_column(str(n), justify="right")
    for label, accuracy in kept.items():
        table.add_row(label, *(f"{accuracy[n]:.0%}" for n in KEPT))
    return table


def plot_kept(kept: dict[str, dict[int, float]], full: dict[str, float], path: Path) -> None:
    """Right answers against tokens kept, a line per model and policy."""
    figure, axes = new_figure(size=(9, 4.6))
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(KEPT, [str(n) for n in KEPT])
    axes.minorticks_off()
    axes.axhline(full["selective"], color="#999999", linewidth=1, linestyle=(0, (4, 3)))
    axes.text(
        KEPT[0], full["selective"] - 0.045, "selective attention, full cache", color="#777777", fontsize=9
    )
    heights = spread_labels([accuracy[KEPT[-1]] for accuracy in kept.values()], 0.055)
    for color, (label, accuracy), height in zip(PALETTE[1:], kept.items(), heights, strict=False):
        axes.plot(KEPT, [accuracy[n] for n in KEPT], color=color, linewidth=2, marker="o", markersize=4)
        axes.annotate(
            label.replace(" attention", ""),
            (KEPT[-1], height),
            xytext=(8, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=9.5,
        )
    axes.set_xlabel(f"tokens kept per layer, of {3 * BUDGETED + 1}")
    titled(
        axes,
        "Answers that are right with a small cache",
        "variable assignment, one seed; eviction while reading",
    )
    save(figure, path)


def _sample(folder: Path, characters: int = 200) -> str:
    """`characters` of text, the prompt included, from a cache of few tokens."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    set_seed(0)
    text = "She was"
    while len(text) < characters:  # an end of text ends a continuation early
        text, _ = continue_text(model, tokenizer, text, max_new_tokens=characters, kv_budget=SAMPLE_KEPT)
    return text[:characters]


def plot_task(answers: dict[str, tuple[RunResult, dict[int, float]]], path: Path) -> None:
    """How each score learns the task, and how far what it learned carries."""
    figure, (left, right) = new_figure(2, (10, 4.4), gridspec_kw={"width_ratios": (1.2, 1)})
    colors = {"softmax": PALETTE[0], "selective": PALETTE[1]}
    for axes in (left, right):
        axes.set_ylim(0, 1.08)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    for score, (result, _) in answers.items():
        per_step = result.tokens / TASK.steps
        steps = [tokens / per_step for tokens, _, _ in result.curve]
        left.plot(steps, [a for _, _, a in result.curve], color=colors[score], linewidth=2.2)
    ends = {score: result.curve[-1][2] for score, (result, _) in answers.items()}
    heights = spread_labels([accuracy - 0.06 for accuracy in ends.values()], 0.08)
    for score, height in zip(ends, heights, strict=True):
        left.text(TASK.steps, height, score, ha="right", va="center", color=colors[score], fontsize=11)
    left.set_xlabel("training steps")
    titled(
        left, "Answers that are right", f"while training on {STATEMENTS[0]} statements, width 64, 2 layers"
    )
    width = 0.36
    for i, (score, (_, accuracy)) in enumerate(answers.items()):
        places = [n + (i - 0.5) * width for n in range(len(STATEMENTS))]
        bars = right.bar(
            places, [accuracy[n] for n in STATEMENTS], width * 0.94, color=colors[score], label=score
        )
        right.bar_label(
            bars, [f"{accuracy[n]:.0%}" for n in STATEMENTS], padding=2, color="#444444", fontsize=10
        )
    right.set_xticks(range(len(STATEMENTS)), [f"{n} statements" for n in STATEMENTS])
    right.tick_params(axis="x", length=0)
    titled(right, "At greater lengths", "the same models, on longer programs than they ever saw")
    save(figure, path)


def _report(
    held: Held,
    answers: dict[str, tuple[RunResult, dict[int, float]]],
    kept: dict[str, dict[int, float]],
    sample_title: str,
    sample: str,
) -> str:
    header = "| score | " + " | ".join(f"{n} statements" for n in STATEMENTS) + " |"
    rows = [
        f"| {score} | " + " | ".join(f"{accuracy[n]:.1%}" for n in STATEMENTS) + " |"
        for score, (_, accuracy) in answers.items()
    ]
    return "\n".join(
        [
            "",
            f"The selective models are trained with the memory loss ({SELECTIVE['memory_loss']:g}). With caches "
            f"that keep few of {TEXT.context} tokens per layer (32 rows of the validation text; softmax attention "
            "keeps the first and the last tokens):",
            "",
            "| " + " | ".join(HELD_COLUMNS) + " |",
            "|---" * len(HELD_COLUMNS) + "|",
            *("| " + " | ".join(row) + " |" for row in _held_rows(held)),
            "",
            "![held](kv-text.png)",
            "",
            "# Variable assignment",
            "",
            f"Statements `[op, var, value]`; at every `?` the model gives the current value. Trained on "
            f"{STATEMENTS[0]} statements for {TASK.steps} steps, tested on longer programs (one seed).",
            "",
            header,
            "|---" * (len(STATEMENTS) + 1) + "|",
            *rows,
            "",
            "![answers](variable-assignment.png)",
            "",
            f"The same models on {BUDGETED} statements ({3 * BUDGETED + 1} tokens), with caches that keep few "
            "tokens per layer:",
            "",
            "| tokens kept | " + " | ".join(map(str, KEPT)) + " |",
            "|---" * (len(KEPT) + 1) + "|",
            *(f"| {label} | " + " | ".join(f"{a[n]:.1%}" for n in KEPT) + " |" for label, a in kept.items()),
            "",
            "![kept](kv-budget.png)",
            "",
            f"# Text from {sample_title}",
            "",
            textwrap.indent(textwrap.fill(sample, 100), "> "),
            "",
        ]
    )
