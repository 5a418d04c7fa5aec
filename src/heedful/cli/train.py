"""`heedful train`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, flag_fields, form_options, parse, peek
from heedful.training import Interrupted, TrainSettings, train
from heedful.training.run import SETTINGS, check_same_settings

DESCRIPTION = """Train a language model and leave it in a folder that transformers loads.

    heedful train --attention sas --score selective --data my.txt --steps 500 --out runs/a
    heedful train --resume --out runs/a                  # after a stop: goes on exactly
    heedful generate runs/a "Once upon a time"

The options of the chosen attention and score are below as --attention.* and --score.*. On several
processes: accelerate launch -m heedful train ..."""


def run(arguments: Sequence[str]) -> int:
    """Train, or resume."""
    attention, score = peek(arguments, "attention", "mha"), peek(arguments, "score", "softmax")
    if "--resume" in arguments:
        attention, score = _resumed_forms(arguments, attention, score)
    values = parse(
        "train",
        DESCRIPTION,
        [
            *flag_fields(TrainSettings),
            form_options("attention", ATTENTIONS, [attention]),
            form_options("score", SCORES, [score]),
            flag("out", str, "runs/train", "folder for the model, its settings and figures"),
            flag("resume", bool, False, "go on with the run in --out, with the settings it has"),
        ],
        arguments,
    )
    out, resume = Path(values.pop("out")), values.pop("resume")
    settings = make_settings(values)
    if resume:
        settings = _resume(settings, out)
    console = Console(stderr=True)
    console.print(f"training {settings.attention} x {settings.score} on {settings.data}, into {out}")
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


def make_settings(values: dict[str, Any]) -> TrainSettings:
    """Settings from flags; what is unsound is wrong usage."""
    try:
        return TrainSettings(**values)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _resumed_forms(arguments: Sequence[str], attention: str, score: str) -> tuple[str, str]:
    """The forms of the run to resume, whose options the flags may repeat."""
    path = Path(peek(arguments, "out", "runs/train")) / SETTINGS
    if not path.exists():
        return attention, score
    saved = TrainSettings.load(path)
    return peek(arguments, "attention", saved.attention), peek(arguments, "score", saved.score)


def _resume(settings: TrainSettings, out: Path) -> TrainSettings:
    """The saved settings; flags that were given must agree with them."""
    if not (out / SETTINGS).exists():
        raise FileNotFoundError(f"{out} holds no run to resume (no {SETTINGS})")
    saved = TrainSettings.load(out / SETTINGS)
    merged = dataclasses.replace(saved, **settings.given())
    check_same_settings(merged, out)
    return saved
