"""How soon softmax and selective attention learn variable assignment, and how far it carries once both have.

    python benchmarks/variable_assignment.py                    # everything: hours on one core
    python benchmarks/variable_assignment.py --seeds 0          # a first look
    python benchmarks/variable_assignment.py --time             # seconds of a step alone, on a quiet machine

The setting is the demo's, but for the number of steps, which lets both learn, and the learning rate, which is
also tried at twice the demo's. Writes results/variable-assignment. Called again it goes on where it stopped;
two processes may share the work if their --seeds differ.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console

from heedful.data import TokenDataset, load_data
from heedful.data.tasks.variable_assignment import VariableAssignment
from heedful.demo import SELECTIVE, TASK
from heedful.evaluation import evaluate
from heedful.hf.load import load_model
from heedful.hf.modeling import HeedfulForCausalLM
from heedful.plotting import COLORS, new_figure, save, titled
from heedful.training import TrainSettings, train

STEPS = {"softmax": 2000, "selective": 500}
EVERY = 20  # steps between measurements of the curve
RATES = (2e-3, 4e-3)
STATEMENTS = (32, 64, 128)
LEARNED = 0.95


def runs(seeds: Sequence[int], rates: Sequence[float]) -> Iterator[TrainSettings]:
    """The settings of every run, rate by rate and seed by seed, so that a stop leaves whole pairs."""
    for lr in rates:
        for seed in seeds:
            for score, steps in STEPS.items():
                yield replace(
                    TASK,
                    score=score,
                    score_options=SELECTIVE if score == "selective" else {},
                    steps=steps,
                    evaluations=steps // EVERY,
                    checkpoints=5,
                    lr=lr,
                    seed=seed,
                )


def name(settings: TrainSettings) -> str:
    """A run's folder."""
    return f"{settings.score}-lr{settings.lr:g}-seed{settings.seed}"


def learn(settings: TrainSettings, out: Path, results: Path, console: Console) -> None:
    """One run: its curve, and its answers at every length, as a line of runs.jsonl."""
    path = results / "runs.jsonl"
    if name(settings) in {row["run"] for row in read(path)}:
        return
    console.print(f"training {name(settings)}")
    folder = out / name(settings)
    result = train(settings, folder, resume=(folder / "train.json").exists(), console=console)
    model = load_model(folder)
    accuracy = {
        n: evaluate(model, TokenDataset(VariableAssignment(statements=n).draw(256, seed=10_007 + n))).accuracy
        for n in STATEMENTS
    }
    curve = [(tokens * settings.steps // result.tokens, right) for tokens, _, right in result.curve]
    row = {"run": name(settings), "score": settings.score, "lr": settings.lr, "seed": settings.seed}
    row |= {"steps": settings.steps, "accuracy": accuracy, "curve": curve}
    append(path, [row])


def step_seconds(results: Path, repeats: int) -> None:
    """Seconds of a training step of both, taking turns, as lines of steps.jsonl, one per number of threads."""
    batch = VariableAssignment().draw(TASK.batch_size, seed=1)
    data = load_data(TASK.data, train_examples=1)
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        models, taken = {}, {score: [] for score in STEPS}
        for settings in runs([0], RATES[:1]):
            torch.manual_seed(0)
            model = HeedfulForCausalLM(settings.to_config(data.vocab_size, data.context, 0)).train()
            models[settings.score] = model, torch.optim.AdamW(model.parameters(), lr=TASK.lr)
        for _ in range(repeats):
            for score, (model, optimizer) in models.items():
                begun = time.perf_counter()
                optimizer.zero_grad()
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                taken[score].append(time.perf_counter() - begun)
        for score, seconds in taken.items():
            kept = sorted(seconds[3:])  # the first steps warm up
            quarter = len(kept) // 4
            row = {"score": score, "threads": threads, "repeats": len(kept), "seconds": median(kept)}
            rows.append(row | {"quartiles": [kept[quarter], kept[-1 - quarter]], "torch": torch.__version__})
    (results / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps_to(curve: Sequence[tuple[int, float]], wanted: float = LEARNED) -> int | None:
    """The first measured step from which on two measurements in a row reach `wanted`."""
    for (step, right), (_, after) in zip(curve, [*curve[1:], curve[-1]], strict=True):
        if min(right, after) >= wanted:
            return step
    return None


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def plot(results: Path) -> None:
    """variable-assignment.png: answers against steps with the seeds as a band, and at greater lengths."""
    rows = [row for row in read(results / "runs.jsonl") if row["lr"] == TASK.lr]
    figure, (left, right) = new_figure(2, (11.5, 4.6), gridspec_kw={"width_ratios": (1.5, 1)})
    for axes in (left, right):
        axes.set_ylim(0, 1.12)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    left.axhline(LEARNED, color="#999999", linewidth=1, linestyle=(0, (4, 3)))
    seeds = ", ".join(f"{sum(row['score'] == score for row in rows)} {score}" for score in STEPS)
    for number, score in enumerate(STEPS):
        same = [row for row in rows if row["score"] == score]
        steps = [step for step, _ in same[0]["curve"]]
        right_ones = [[row["curve"][i][1] for row in same] for i in range(len(steps))]
        left.plot(steps, [mean(values) for values in right_ones], color=COLORS[score], linewidth=2.2)
        low, high = [min(v) for v in right_ones], [max(v) for v in right_ones]
        left.fill_between(steps, low, high, color=COLORS[score], alpha=0.18, linewidth=0)
        reached = [steps_to(row["curve"]) for row in same]
        known = sorted(step for step in reached if step is not None)
        note = f"{known[0]} to {known[-1]} steps" if len(known) > 1 else f"{known[0]} steps" if known else ""
        note += f", {len(reached) - len(known)} not yet" if len(known) < len(reached) else ""
        x, side = (90, "left") if score == "selective" else (steps[-1], "right")
        left.text(x, 1.035, f"{score}: {note}", color=COLORS[score], ha=side, fontsize=10)
        learned = [row for row in same if steps_to(row["curve"]) is not None]
        for place, n in enumerate(STATEMENTS):
            values = [row["accuracy"][str(n)] for row in learned]
            if not values:
                continue
            x = place + (0.5 - number) * -0.38
            bar = right.bar(x, mean(values), 0.36, color=COLORS[score], label=score if place == 0 else None)
            right.bar_label(
                bar, [f"{mean(values):.1%}"], label_type="center", color="white", fontsize=10, rotation=90
            )
            right.vlines(x, min(values), max(values), color="#222222", linewidth=1)
    left.set_xlabel("training steps, each score with a schedule of its own length")
    titled(
        left,
        "Variable assignment: when it is learned",
        f"right answers; mean and range of seeds: {seeds}",
    )
    right.set_xticks(range(len(STATEMENTS)), [f"{n}\nstatements" for n in STATEMENTS])
    right.tick_params(axis="x", length=0)
    titled(right, "Then, at greater lengths", "models that learned it, never trained beyond 32")
    save(figure, results / "variable-assignment.png")


def tables(results: Path) -> str:
    """Markdown: steps and seconds to 95 %, and answers at every length, run by run."""
    cost = {(row["score"], row["threads"]): row["seconds"] for row in read(results / "steps.jsonl")}
    lines = ["| score | lr | seed | steps to 95 % | seconds, 1 thread | 2 threads |"]
    lines[0] += "".join(f" {n} statements |" for n in STATEMENTS)
    lines.append("|---" * (6 + len(STATEMENTS)) + "|")
    for row in sorted(read(results / "runs.jsonl"), key=lambda r: (r["lr"], r["score"], r["seed"])):
        step = steps_to(row["curve"])
        cells = [row["score"], f"{row['lr']:g}", str(row["seed"])]
        cells.append(f"not in {row['steps']}" if step is None else str(step))
        for threads in (1, 2):
            seconds = cost.get((row["score"], threads))
            cells.append(f"{step * seconds:.0f}" if step is not None and seconds else "")
        cells += [f"{row['accuracy'][str(n)]:.1%}" for n in STATEMENTS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def report(results: Path) -> None:
    """The figure and tables.md, from the raw data."""
    plot(results)
    (results / "tables.md").write_text(tables(results))
    print(tables(results))


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/variable-assignment"), help="for the models")
    parser.add_argument("--results", type=Path, default=Path("results/variable-assignment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--report", action="store_true", help="draw and tabulate what there is")
    parser.add_argument("--time", action="store_true", help="time the steps, train nothing")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    if arguments.time:
        step_seconds(arguments.results, repeats=60)
        return
    if arguments.report:
        report(arguments.results)
        return
    for settings in runs(arguments.seeds, arguments.rates):
        learn(settings, arguments.out, arguments.results, Console())
    report(arguments.results)


if __name__ == "__main__":
    main()
