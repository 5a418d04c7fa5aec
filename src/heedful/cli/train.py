"""`heedful train`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, flag_fields, form_options, parse, peek, task_options
from heedful.errors import Interrupted
from heedful.screen import spinner
from heedful.training.settings import SETTINGS, TrainSettings
from heedful.training.trainer_options import take_trainer_options

DESCRIPTION = """Train a language model and leave it in a folder that transformers loads.

    heedful train --attention sas --score selective --data my.txt --steps 500 --out runs/a
    heedful train --resume --out runs/a                  # after a stop: goes on exactly
    heedful generate runs/a "Once upon a time"

The options of the chosen attention and score are below as --attention.* and --score.*, those of a synthetic
task (--data synthetic:mqar) as --task.*: name them before --help. Any field of transformers' TrainingArguments
is handed through as --trainer.*:

    --trainer.adam-beta2 0.99 --trainer.max-grad-norm 0.5 --trainer.lr-scheduler-type linear
    --trainer.gradient-accumulation-steps 2

On several processes: torchrun --nproc-per-node 2 -m heedful train ... (--batch-size is per process)"""


def run(arguments: Sequence[str]) -> int:
    """Train, or resume."""
    saved = _saved(arguments)  # of a run to resume: what flags that are not given say
    attention = peek(arguments, "attention", saved.attention)
    score = peek(arguments, "score", saved.score)
    data = peek(arguments, "data", saved.data)
    arguments, trainer = given_trainer_options(arguments)
    kept = {
        "attention_options": saved.attention_options if attention == saved.attention else {},
        "score_options": saved.score_options if score == saved.score else {},
        "task_options": saved.task_options if data == saved.data else {},
    }
    values = parse(
        "train",
        DESCRIPTION,
        [
            *(f for f in flag_fields(TrainSettings, **saved.to_dict()) if f[0] != "trainer"),
            form_options("attention", ATTENTIONS, [attention], kept["attention_options"]),
            form_options("score", SCORES, [score], kept["score_options"]),
            task_options(data, kept["task_options"]),
            compile_flag(),
            flag("out", str, "runs/train", "folder for the model, its settings and figures"),
            flag("resume", bool, False, "go on with the run in --out, with the settings it has"),
        ],
        arguments,
    )
    out, resume = Path(values.pop("out")), values.pop("resume")
    for name, options in kept.items():
        values[name] = {**options, **values.get(name, {})}
    trainer = {**saved.trainer, **trainer, **compiled(values.pop("compile"))}
    settings = make_settings({**values, "trainer": trainer})
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    with spinner(console, "loading transformers"):
        from heedful.training.run import train

    try:
        result = train(settings, out, resume=resume, console=console)
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; go on with: heedful train --resume --out {out}") from None
    bpb = f", {result.val_bpb:.3f} bits per byte" if result.val_bpb is not None else ""
    console.print(
        f"validation loss {result.val_loss:.4f} nats per token{bpb}; {result.params:,} parameters, "
        f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s; saved in {out}",
        highlight=False,
    )
    return 0


def given_trainer_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The other words of a command line, and its `--trainer.*`; what is unsound is wrong usage."""
    try:
        return take_trainer_options(arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error


def compile_flag() -> Any:
    """`--compile`."""
    return flag(
        "compile", bool, False, "torch.compile the model (--trainer.torch-compile): a slow first step"
    )


def compiled(wanted: bool) -> dict[str, Any]:
    """What `--compile` says, in the terms of `--trainer.*`."""
    return {"torch_compile": True} if wanted else {}


def make_settings(values: dict[str, Any]) -> TrainSettings:
    """Settings from flags; what is unsound is wrong usage."""
    try:
        return TrainSettings(**values)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _saved(arguments: Sequence[str]) -> TrainSettings:
    """The settings of the run to resume; the defaults where there is none."""
    path = Path(peek(arguments, "out", "runs/train")) / SETTINGS
    return TrainSettings.load(path) if "--resume" in arguments and path.exists() else TrainSettings()
