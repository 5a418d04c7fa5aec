"""KL against tokens physically held, from tables of `heedful eval`, a panel for each context.

    python studies/conversion/curves.py results/conversion

reads results/conversion/CONTEXT-NAME.csv: a table measured with --context CONTEXT of the model NAME.
"""

import csv
import sys
from pathlib import Path

from heedful.plotting import COLORS, OTHERS, new_figure, save, titled

MODELS = {
    "retention": "retention",
    "per-kv-head": "retention per KV head",
    "lora": "retention, then LoRA",
    "recency-lora": "recency, LoRA alike",
}
POLICIES = {"h2o": "H2O", "tova": "TOVA", "snapkv": "SnapKV", "streaming": "recency (StreamingLLM)"}


def lines(folder: Path) -> dict[int, dict[str, list[tuple[int, float]]]]:
    """Context -> what is drawn -> (tokens held, KL), by tokens."""
    found: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for path in sorted(folder.glob("*-*.csv")):
        context, _, model = path.stem.partition("-")
        with path.open() as file:
            for row in csv.DictReader(file):
                if row["kv_budget"] == "full":
                    continue
                own = row["policy"] == "selective" or model == "recency-lora"
                name = MODELS[model] if own else POLICIES[row["policy"]]
                point = int(row["kv_budget"]), float(row["kl"])
                found.setdefault(int(context), {}).setdefault(name, []).append(point)
    return {context: {n: sorted(points) for n, points in found[context].items()} for context in sorted(found)}


def main(folder: Path) -> None:
    """Draw."""
    found = lines(folder)
    palette = dict(zip(MODELS.values(), (COLORS["selective"], OTHERS[3], OTHERS[1], OTHERS[2]), strict=True))
    palette |= {label: COLORS[policy] for policy, label in POLICIES.items()}
    figure, _ = new_figure(len(found), (5.4 * len(found), 4.6))
    for axes, (context, curves) in zip(figure.axes, found.items(), strict=True):
        for name, color in palette.items():
            if name in curves:
                own = name in MODELS.values()
                style = {"linewidth": 2.2 if own else 1.4, "linestyle": "-" if own else "--"}
                axes.plot(*zip(*curves[name], strict=True), marker="o", color=color, label=name, **style)
        held = sorted({tokens for points in curves.values() for tokens, _ in points})
        axes.set(xscale="log", yscale="log", xlabel="tokens held by each layer")
        axes.set_xticks(held, [f"{tokens:,}" for tokens in held])
        axes.minorticks_off()
        titled(axes, f"{context:,} tokens read", "KL to the source, nats per token; lower is better")
    figure.axes[0].legend(frameon=False, fontsize=9)
    save(figure, folder / "curves.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
