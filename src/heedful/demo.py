"""`heedful demo`: both mechanisms beside standard attention, on real text and on a task of memory."""

import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from transformers import set_seed

from heedful.compare import CompareSettings, compare
from heedful.compare.run import replace_text
from heedful.data import TokenDataset, variable_assignment
from heedful.evaluation import evaluate
from heedful.hf.generation import continue_text
from heedful.hf.load import load_model, load_tokenizer
from heedful.plotting import PALETTE, new_figure, save, spread_labels, titled
from heedful.training import RunResult, TrainSettings, train

# The small preset: what four forms can learn in some two minutes on two cores.
TEXT = TrainSettings(d_model=64, n_layers=3, n_heads=4, context=256, batch_size=4, steps=320, lr=5e-3)

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

    Leaves `results.jsonl`, `summary.md`, `compare.png`, `variable-assignment.png`, `kv-budget.png` and the models.

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
    forms = CompareSettings(attention=("mha", "sas"), score=SCORES, seeds=1, train=TEXT)
    results = compare(forms, out, console=console)

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

    console.rule("[bold]3 of 3  Text from the best language model[/bold]", align="left")
    best = min(results, key=lambda r: r.val_loss)
    sample = _sample(out / "runs" / f"{best.attention}-{best.score}-seed{best.seed}-lr{best.lr:g}")
    console.print(
        Panel(sample, title=f"{best.attention} x {best.score}", title_align="left"), highlight=False
    )

    summary = (out / "summary.md").read_text(encoding="utf-8")
    replace_text(out / "summary.md", summary + _report(answers, kept, best, sample))
    minutes = (time.perf_counter() - started) / 60
    names = ("summary.md", "results.jsonl", "compare.png", "variable-assignment.png", "kv-budget.png")
    console.print(f"{minutes:.1f} minutes. In {out}: {', '.join(names)}", highlight=False)


def _learn_task(score: str, out: Path, console: Console) -> tuple[RunResult, dict[int, float]]:
    """Train one form on variable assignment and test it at every length."""
    folder = out / "variable-assignment" / score
    settings = TrainSettings(**{**TASK.to_dict(), "score": score})
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
    """`characters` of text, the prompt included."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    set_seed(0)
    text = "She was"
    while len(text) < characters:  # an end of text ends a continuation early
        text, _ = continue_text(model, tokenizer, text, max_new_tokens=characters)
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
    answers: dict[str, tuple[RunResult, dict[int, float]]],
    kept: dict[str, dict[int, float]],
    best: RunResult,
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
            f"# Text from {best.attention} x {best.score}",
            "",
            textwrap.indent(textwrap.fill(sample, 100), "> "),
            "",
        ]
    )
