"""How far a KV cache can shrink: small models, three seeds, whole curves of loss against kept tokens.

    python benchmarks/kv_budget.py --out runs/kv-budget            # about two hours on two cores
    python benchmarks/kv_budget.py --out runs/kv-budget --seeds 1

Trains softmax attention, selective attention, and selective attention with the memory loss, at contexts 256
and 512, on the bundled novels. Called again it goes on where it stopped.
"""

import argparse
from pathlib import Path

from rich.console import Console

from heedful.training import TrainSettings, train

FORMS = {
    "softmax": {"score": "softmax"},
    "selective": {"score": "selective"},
    "selective-memory": {"score": "selective", "score_options": {"memory_loss": 0.1}},
}
CONTEXTS = (256, 512)
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


def settings_of(form: str, context: int, seed: int) -> TrainSettings:
    """What one model is trained with."""
    return TrainSettings(
        **SIZE, **FORMS[form], context=context, batch_size=TOKENS_PER_STEP // context, seed=seed
    )


def train_all(out: Path, seeds: int, console: Console) -> None:
    """Every form at every context; seed by seed, so that a stop leaves whole seeds."""
    for seed in range(seeds):
        for context in CONTEXTS:
            for form in FORMS:
                folder = out / f"{form}-{context}-seed{seed}"
                console.print(f"{folder}")
                resume = (folder / "train.json").exists()
                train(settings_of(form, context, seed), folder, resume=resume, console=console)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/kv-budget"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    train_all(arguments.out, arguments.seeds, Console())


if __name__ == "__main__":
    main()
