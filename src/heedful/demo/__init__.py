"""`heedful demo`: both mechanisms beside standard attention, on real text and on a task of memory."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from transformers import set_seed

from heedful.comparison import CompareSettings, compare
from heedful.comparison.run import prepare, run_name
from heedful.demo.figures import plot_held, plot_kept, plot_learning
from heedful.demo.jobs import Answers, TaskModel, TextModel, text_data
from heedful.demo.report import answers_table, held_table, kept_table, markdown
from heedful.evaluation.kv_budget import BudgetResult
from heedful.files import write_text
from heedful.hf.generation import continue_text
from heedful.hf.load import load_model, load_tokenizer
from heedful.training import TrainSettings
from heedful.training.workers import Job, side_by_side

SCORES = ("softmax", "selective")
# Selective attention trains for a small cache.
SELECTIVE = {"memory_loss": 0.1}

# What four forms can learn in some minutes on two cores.
TEXT = TrainSettings(d_model=64, n_layers=3, n_heads=4, context=256, batch_size=4, steps=280, lr=5e-3)
TEXT_KEPT = (8, 16, 32, 64)
POLICY_OF = {
    ("mha", "softmax"): "streaming",
    ("mha", "selective"): "selective",
    ("sas", "softmax"): None,
    ("sas", "selective"): "selective",
}
SAMPLE_KEPT = 32

# Variable assignment needs sharp attention soon: logits start at unit scale, and without QK-norm, which
# bounds them by gains that grow slowly. Selective attention learns it in these steps, softmax attention in
# several times as many: benchmarks/variable_assignment.py.
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
BUDGETED = 64  # statements, 193 tokens, of which a cache keeps few
KEPT = (6, 8, 12, 16, 24, 48)
POLICIES = ("selective", "h2o", "streaming")


def demo(out: str | Path, console: Console | None = None, workers: int | None = None) -> None:
    """Run the whole demonstration into `out`; what is finished there already is not trained again.

    Leaves `results.jsonl`, `variable-assignment.jsonl`, `summary.md`, four pictures and the models.

    Args:
        out: the folder; made if missing.
        console: where to show it.
        workers: models that train at a time; default: one per core.

    Raises:
        Interrupted: after Ctrl-C; the same call goes on.
        OSError: if `out` cannot be written.
    """
    out, console = Path(out), console or Console()
    started = time.perf_counter()
    forms = CompareSettings(
        attention=("mha", "sas"),
        score=SCORES,
        seeds=1,
        train=replace(TEXT, score="selective", score_options=SELECTIVE),
    )
    prepare(forms, out)
    data = text_data(forms.train)
    settings = {(s.attention, s.score): s for s in forms.forms(data.vocab_size, data.context)}
    folders = {form: out / "runs" / run_name(s) for form, s in settings.items()}
    console.rule("[bold]1 of 4  Training six small models[/bold]", align="left")
    console.print(
        "Four language models on Jane Austen, and two that learn to remember: a program of statements "
        "x = 3 · y = 7 · x = 1 · x ? 1 · ...  where the model must give the current value at every ?. The "
        "selective models train for a small cache. Ctrl-C stops and keeps what is done.",
        highlight=False,
    )
    texts = [TextModel(s, folders[f], data, TEXT_KEPT, POLICY_OF[f]) for f, s in settings.items()]
    tasks = [_task(score, out) for score in SCORES]
    # The slowest first, so that the cores finish together.
    order: list[Job] = [*reversed(texts), *reversed(tasks)]
    done: dict[Any, Any] = dict(zip(map(id, order), side_by_side(order, console, workers), strict=True))
    answers: dict[str, Answers] = {score: done[id(t)] for score, t in zip(SCORES, tasks, strict=True)}
    held: dict[str, list[BudgetResult]] = {t.title: done[id(t)][1] for t in texts if done[id(t)][1]}

    console.rule("[bold]2 of 4  Language models on Jane Austen[/bold]", align="left")
    results = compare(forms, out, console=console, data=data)
    console.print(held_table(held, TEXT.context, console.width))
    plot_held(held, TEXT.context, out / "kv-text.png")

    console.rule("[bold]3 of 4  Variable assignment[/bold]", align="left")
    console.print(
        f"Trained on {STATEMENTS[0]} statements for {TASK.steps} steps, tested on up to {STATEMENTS[-1]}. Softmax "
        "attention learns this too, in several times as many steps: results/variable-assignment.",
        highlight=False,
    )
    plot_learning({s: a.result for s, a in answers.items()}, STATEMENTS[0], out / "variable-assignment.png")
    console.print(answers_table(answers, console.width))
    selective = answers["selective"]
    console.print(kept_table(selective.by_budget, BUDGETED, console.width))
    full = selective.by_length[BUDGETED]
    plot_kept(selective.by_budget, full, BUDGETED, 3 * BUDGETED + 1, out / "kv-budget.png")
    lines = [
        a.result.to_dict() | {"by_length": a.by_length, "by_budget": a.by_budget} for a in answers.values()
    ]
    write_text(out / "variable-assignment.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    console.rule(f"[bold]4 of 4  Text, with a cache of {SAMPLE_KEPT} tokens[/bold]", align="left")
    best = min((r for r in results if r.score == "selective"), key=lambda r: r.val_loss)
    sample = _sample(folders[best.attention, best.score])
    title = f"{best.attention} x selective, {SAMPLE_KEPT} tokens kept per layer"
    console.print(Panel(sample, title=title, title_align="left"), highlight=False)

    summary = (out / "summary.md").read_text(encoding="utf-8")
    rest = markdown(
        held, TEXT.context, len(data.validation), SELECTIVE["memory_loss"], answers, BUDGETED, title, sample
    )
    write_text(out / "summary.md", summary + rest)
    minutes = (time.perf_counter() - started) / 60
    names = ["summary.md", "results.jsonl", "variable-assignment.jsonl"]
    names += ["compare.png", "kv-text.png", "variable-assignment.png", "kv-budget.png"]
    console.print(f"{minutes:.1f} minutes. In {out}: {', '.join(names)}", highlight=False)


def _task(score: str, out: Path) -> TaskModel:
    options = SELECTIVE if score == "selective" else {}
    return TaskModel(
        replace(TASK, score=score, score_options=options),
        out / "variable-assignment" / score,
        STATEMENTS,
        BUDGETED,
        KEPT,
        POLICIES if score == "selective" else (),
    )


def _sample(folder: Path, characters: int = 200) -> str:
    """`characters` of text, the prompt included, from a cache of few tokens."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    set_seed(0)
    text = "She was"
    while len(text) < characters:  # an end of text ends a continuation early
        text, _ = continue_text(model, tokenizer, text, max_new_tokens=characters, kv_budget=SAMPLE_KEPT)
    return text[:characters]
