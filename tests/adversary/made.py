"""What commands are tried on: a text, a trained model, a stopped run, a stock checkpoint and a converted one."""

import os
import random
import signal
from pathlib import Path

from tests.adversary.commands import forked, heedful

TRAIN = ["--tokenizer", "bytes", "--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--context", "32"]
TRAIN += ["--batch-size", "4"]
"""Flags of a run that takes a fraction of a second."""
STEPS = ["--steps", "12", "--checkpoints", "4", "--evaluations", "2"]
COMPARE = ["--steps", "3", "--attention", "mha", "--score", "softmax", "--seeds", "2"]

STUDY = """title = "Votes"
claim = "votes help"
source = "nobody"
metric = "loss"
effect = 0.1
spread = 0.1
seeds = 2
rates = [1e-3, 1e-2]
train = {data = "words.txt", tokenizer = "bytes", d_model = 16, n_layers = 1, n_heads = 2, context = 32, \
batch_size = 4, steps = 4, evaluations = 2, checkpoints = 1}
arms = {mha = {}, selective = {score = "selective"}}
contrasts = [{arm = "selective", against = "mha", claims = "lower", says = "votes help"}]
"""


def text(folder: Path, name: str = "words.txt") -> Path:
    """A text of 3 kB that is easy to learn."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run"]
    path = folder / name
    path.write_text(
        "\n\n".join(" ".join(draw.choices(words, k=60)) + "." for _ in range(12)), encoding="utf-8"
    )
    return path


def trained(folder: Path, name: str = "trained") -> Path:
    """A model that `heedful train` left."""
    return _made(folder, name, ["train", "--data", text(folder), *TRAIN, *STEPS, "--score", "selective"])


def stopped(folder: Path, name: str = "stopped") -> Path:
    """A run that was stopped in its tenth step, with two checkpoints."""
    data = text(folder)

    def command() -> int:
        from heedful.cli import main
        from heedful.training import run

        class Pressed(run.StepTimer):
            def on_step_begin(self, args, state, control, **kwargs):
                super().on_step_begin(args, state, control, **kwargs)
                if state.global_step == 9:
                    os.kill(os.getpid(), signal.SIGINT)

        run.StepTimer = Pressed
        return main(["train", "--data", str(data), *TRAIN, *STEPS, "--out", name])

    done = forked(command, folder)
    assert done.code == 130, done.err
    return folder / name


def stock(folder: Path, name: str = "stock") -> Path:
    """A stock llama of two layers."""
    from tests.stock import save_stock_model

    def save() -> int:
        save_stock_model(folder / name, [text(folder).read_text(encoding="utf-8")], std=0.3)
        return 0

    done = forked(save, folder)
    assert done.code == 0, done.err
    return folder / name


def converted(folder: Path, name: str = "converted") -> Path:
    """The same, converted."""
    return _made(folder, name, ["convert", stock(folder), folder / name, "--kv-budget", "8"], out=False)


def compared(folder: Path, name: str = "compared") -> Path:
    """What `heedful compare` left of one form and two seeds."""
    return _made(folder, name, ["compare", "--data", "words.txt", *TRAIN, *COMPARE])


def study(folder: Path) -> None:
    """The file of a study of a few steps."""
    (folder / "small.toml").write_text(STUDY, encoding="utf-8")


def _made(folder: Path, name: str, words: list[object], out: bool = True) -> Path:
    done = heedful([*words, *(["--out", name] if out else [])], folder, limit=120)
    assert done.code == 0, done.err
    return folder / name
