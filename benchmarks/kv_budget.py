"""How far a KV cache can shrink: small models, three seeds, whole curves of loss against kept tokens.

    python benchmarks/kv_budget.py                    # everything: about three hours on two cores
    python benchmarks/kv_budget.py --seeds 1          # a first look

Trains softmax attention, selective attention, and selective attention with the memory loss at contexts 256 and
512, and SAS x selective with the memory loss at 256, on the bundled novels; measures every model under
budgets; searches budgets per layer; and writes results/kv-budget. Called again it goes on where it stopped.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from heedful.data import TokenDataset
from heedful.evaluation import evaluate
from heedful.evaluation.kv_budget import evaluate_budgets
from heedful.evaluation.search import BudgetSearch, split_rows
from heedful.hf.load import load_model, load_tokenizer
from heedful.plotting import COLORS, label_ends, new_figure, save, titled
from heedful.training import TrainSettings, held_out, train

FORMS: dict[str, dict[str, Any]] = {
    "softmax": {"score": "softmax"},
    "selective": {"score": "selective"},
    "selective-memory": {"score": "selective", "score_options": {"memory_loss": 0.1}},
    "sas-selective-memory": {
        "attention": "sas",
        "score": "selective",
        "score_options": {"memory_loss": 0.1},
    },
}
CONTEXTS = {form: (256,) if form.startswith("sas") else (256, 512) for form in FORMS}
TOKENS_PER_STEP = 1024
SIZE = {
    "d_model": 96,
    "n_layers": 4,
    "n_heads": 4,
    "lr": 3e-3,
    "steps": 1250,
    "evaluations": 5,
    "checkpoints": 2,
}

BUDGETS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
H2O_BUDGETS = (4, 8, 16, 32, 64, 128)  # query by query, so fewer of them
POLICIES = {"softmax": ("streaming", "h2o")}
MEASURED_TOKENS, SEARCH_ROWS = 32_768, 48

LINES = {
    ("softmax", "streaming"): "softmax, first and last tokens",
    ("softmax", "h2o"): "softmax, H2O",
    ("selective", "streaming"): "selective, first and last tokens",
    ("selective", "selective"): "selective, by its votes",
    ("selective-memory", "selective"): "selective with memory loss, by its votes",
}


def runs(out: Path, seeds: int) -> Iterator[tuple[str, int, int, Path]]:
    """Form, context, seed and folder of every model; seed by seed, so that a stop leaves whole seeds."""
    for seed in range(seeds):
        for form in FORMS:
            for context in CONTEXTS[form]:
                yield form, context, seed, out / f"{form}-{context}-seed{seed}"


def train_all(out: Path, seeds: int, console: Console) -> None:
    """Every model that is not there yet."""
    for form, context, seed, folder in runs(out, seeds):
        batch_size = TOKENS_PER_STEP // context
        settings = TrainSettings(**SIZE, **FORMS[form], context=context, batch_size=batch_size, seed=seed)
        if not (folder / "result.json").exists():
            console.print(f"training {folder.name}")
        train(settings, folder, resume=(folder / "train.json").exists(), console=console)


def spread(rows: TokenDataset, n: int) -> TokenDataset:
    """n rows, evenly spread."""
    chosen = [i * len(rows) // n for i in range(min(n, len(rows)))]
    return TokenDataset({name: tensor[chosen] for name, tensor in rows.tensors.items()})


def measure_all(out: Path, results: Path, seeds: int, console: Console) -> None:
    """curves.jsonl: every model, policy and budget."""
    path = results / "curves.jsonl"
    done = {row["run"] for row in read(path)}
    for form, context, seed, folder in runs(out, seeds):
        if folder.name in done:
            continue
        console.print(f"measuring {folder.name}")
        model = load_model(folder)
        held = held_out(folder, load_tokenizer(folder))
        rows = spread(held.rows, MEASURED_TOKENS // context)
        lines = []
        for policy in POLICIES.get(form, ("selective", "streaming")):
            budgets = H2O_BUDGETS if policy == "h2o" else BUDGETS
            budgets = ("full", *budgets) if not lines else budgets
            for r in evaluate_budgets(model, rows, budgets, [policy]):
                row = {"run": folder.name, "form": form, "context": context, "seed": seed, "policy": r.policy}
                row |= {"kv_budget": r.kv_budget, "loss": r.loss, "kl": r.kl, "cache_bytes": r.cache_bytes}
                lines.append({**row, "tokens_per_second": round(r.tokens_per_second)})
        append(path, lines)


def search_all(out: Path, results: Path, seeds: int, console: Console) -> None:
    """searches.jsonl: budgets per layer at the loss of softmax attention with its full cache, same seed."""
    path = results / "searches.jsonl"
    done = {row["run"] for row in read(path)}
    for form, context, seed, folder in runs(out, seeds):
        if form == "softmax" or folder.name in done:
            continue
        console.print(f"searching {folder.name}")
        model = load_model(folder)
        baseline_folder = out / f"softmax-{context}-seed{seed}"
        baseline = load_model(baseline_folder)
        search_rows, report_rows = split_rows(held_out(folder, load_tokenizer(folder)).rows, SEARCH_ROWS)
        target = evaluate(baseline, search_rows).loss
        search = BudgetSearch(model, search_rows, target)
        moves = list(search.moves())
        budgets = list(search.budgets)
        full = cache_bytes(baseline, report_rows, "full")
        own = cache_bytes(model, report_rows, budgets)
        row = {"run": folder.name, "form": form, "context": context, "seed": seed, "budgets": budgets}
        row |= {"memory_factor": search.memory_factor, "measured": sum(m.measured for m in moves)}
        row |= {"search_loss": search.loss, "search_target": target}
        row |= {"report_loss": evaluate(model, report_rows, kv_budget=budgets).loss}
        row |= {"report_full_cache": evaluate(model, report_rows).loss}
        row |= {"report_recency": evaluate(model, report_rows, kv_budget=budgets, kv_policy="streaming").loss}
        row |= {"report_softmax": evaluate(baseline, report_rows).loss}
        row |= {"cache_bytes": own, "softmax_cache_bytes": full, "bytes_factor": full / own}
        append(path, [row])


def cache_bytes(model: Any, rows: TokenDataset, kv_budget: Any) -> int:
    """Bytes held for one row of a whole context."""
    one = TokenDataset({name: tensor[:1] for name, tensor in rows.tensors.items()})
    policy = "streaming" if kv_budget == "full" else "selective"
    return next(evaluate_budgets(model, one, [kv_budget], [policy], decoded=2)).cache_bytes


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def plot(results: Path) -> None:
    """curves.png: loss against kept tokens at both contexts, the seeds as a band."""
    rows = read(results / "curves.jsonl")
    contexts = sorted({row["context"] for row in rows})
    figure, axes = new_figure(len(contexts), (6.6 * len(contexts), 5.2), sharey=True)
    looks = dict(zip(LINES, ("-", ":", ":", "--", "-"), strict=True))  # the colour is the form's
    for panel, context in zip(axes if len(contexts) > 1 else [axes], contexts, strict=True):
        of_context = [row for row in rows if row["context"] == context]
        ends = []
        for (form, policy), label in LINES.items():
            points: dict[int, list[float]] = {}
            for row in of_context:
                if (row["form"], row["policy"]) == (form, policy):
                    points.setdefault(row["kv_budget"], []).append(row["loss"])
            if not points:
                continue
            color, xs = COLORS[form.removesuffix("-memory")], sorted(points)
            panel.plot(
                xs,
                [mean(points[x]) for x in xs],
                looks[form, policy],
                color=color,
                linewidth=2,
                marker="o",
                markersize=3.5,
            )
            low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
            panel.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
            style = {"-": "", "--": " (dashed)", ":": " (dotted)"}[looks[form, policy]]
            ends.append((mean(points[xs[-1]]), label + style, color))
        for form, x, side in (("softmax", BUDGETS[-1], "right"), ("selective", BUDGETS[0], "left")):
            full = [row["loss"] for row in of_context if row["form"] == form and row["policy"] is None]
            if full:
                panel.axhline(mean(full), color="#999999", linewidth=1, linestyle=(0, (4, 3)))
                panel.annotate(
                    f"{form}, full cache of {context}",
                    (x, mean(full)),
                    xytext=(0, -4),
                    textcoords="offset points",
                    ha=side,
                    va="top",
                    color="#777777",
                    fontsize=8.5,
                )
        panel.set_xscale("log", base=2)
        shown = [b for b in BUDGETS if b not in (3, 6, 12, 24, 48, 96)]
        panel.set_xticks(shown, [str(b) for b in shown])
        panel.minorticks_off()
        panel.set_xlabel(f"tokens kept per layer, of {context}")
        titled(panel, f"Context {context}", "validation loss; mean and range of the seeds")
        if context == contexts[-1]:
            label_ends(panel, ends, gap=0.05)
    (axes[0] if len(contexts) > 1 else axes).set_ylabel("loss (nats per token)")
    save(figure, results / "curves.png")


def needed(
    rows: list[dict[str, Any]], form: str, policy: str, context: int, slack: float, rival: str = "softmax"
) -> str:
    """The kept tokens with which a form is no worse than the full cache of its rival, seed by seed."""
    found = []
    for seed in sorted({row["seed"] for row in rows if (row["form"], row["context"]) == (form, context)}):
        same = [row for row in rows if row["context"] == context and row["seed"] == seed]
        target = next(r["loss"] for r in same if r["form"] == rival and r["policy"] is None) + slack
        good = [
            r["kv_budget"] for r in same if (r["form"], r["policy"]) == (form, policy) and r["loss"] <= target
        ]
        found.append(str(min(good)) if good else f">{BUDGETS[-1]}")
    return ", ".join(found)


def tables(results: Path) -> str:
    """Markdown of what the curves and the searches say."""
    rows = read(results / "curves.jsonl")
    searches = sorted(read(results / "searches.jsonl"), key=lambda s: s["run"])
    lines = [
        "| context | form | evicting by | softmax + 0 | softmax + 0.01 | itself + 0.01 | itself + 0.05 |"
    ]
    lines += ["|---" * 7 + "|"]
    pairs = [*LINES, ("selective-memory", "streaming"), ("sas-selective-memory", "selective")]
    for context in sorted({row["context"] for row in rows}):
        for form, policy in pairs:
            if any((r["form"], r["policy"], r["context"]) == (form, policy, context) for r in rows):
                cells = [needed(rows, form, policy, context, slack) for slack in (0.0, 0.01)]
                cells += [needed(rows, form, policy, context, slack, form) for slack in (0.01, 0.05)]
                lines.append(f"| {context} | {form} | {policy} | " + " | ".join(cells) + " |")
    lines += ["", "| run | budgets | fewer tokens | fewer bytes | loss | by recency | full cache | softmax |"]
    lines += ["|---" * 8 + "|"]
    for s in searches:
        lines.append(
            f"| {s['run']} | {' '.join(map(str, s['budgets']))} | {s['memory_factor']:.1f}x | "
            f"{s['bytes_factor']:.1f}x | {s['report_loss']:.4f} | {s['report_recency']:.4f} | "
            f"{s['report_full_cache']:.4f} | {s['report_softmax']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/kv-budget"), help="folder for the models")
    parser.add_argument(
        "--results", type=Path, default=Path("results/kv-budget"), help="folder for the figures"
    )
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    console = Console()
    train_all(arguments.out, arguments.seeds, console)
    measure_all(arguments.out, arguments.results, arguments.seeds, console)
    search_all(arguments.out, arguments.results, arguments.seeds, console)
    plot(arguments.results)
    (arguments.results / "tables.md").write_text(tables(arguments.results))
    console.print(tables(arguments.results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
