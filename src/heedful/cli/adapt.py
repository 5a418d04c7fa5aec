"""`heedful adapt`."""

import os
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path

from rich.console import Console

from heedful.adaptation.settings import SETTINGS, AdaptSettings
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, flag_fields, parse, positional
from heedful.cli.train import given_trainer_options
from heedful.errors import Interrupted
from heedful.screen import counted, spinner

DESCRIPTION = """Teach a converted model whom to forget.

    heedful convert SmolLM2-135M out
    heedful adapt out --data my.txt                        # selectors learn, forward passes only
    heedful adapt out --data my.txt --lora 16              # then LoRA, against the model as it was
    heedful adapt out --resume                             # after a stop: goes on
    heedful eval out --data other.txt

The first stage needs no pass backward through the network: each layer's selectors learn to rank tokens by the
attention that they will get. The second, with --lora, trains adapters on the attention projections to predict with
a small cache what the model predicts with a full one, and merges them. The folder is changed at the very end; its
default budget becomes --target-held of --context. Any field of transformers' TrainingArguments is handed through
as --trainer.*. On several processes: torchrun --nproc-per-node 2 -m heedful adapt ..., --batch-size per process"""


def run(arguments: Sequence[str]) -> int:
    """Adapt, or resume."""
    arguments, trainer = given_trainer_options(arguments)
    values = parse(
        "adapt",
        DESCRIPTION,
        [
            positional("folder", str, MISSING, "a converted model"),
            *(f for f in flag_fields(AdaptSettings) if f[0] != "trainer"),
            flag("resume", bool, False, "go on with the adaptation in the folder, with the settings it has"),
        ],
        arguments,
    )
    folder, resume = Path(values.pop("folder")), values.pop("resume")
    try:
        settings = AdaptSettings(**values, trainer=trainer)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0", highlight=False)
    with spinner(console, "loading transformers"):
        from heedful.adaptation.run import adapt

    try:
        result = adapt(folder, settings, resume=resume, console=console)
    except KeyboardInterrupt:
        if (folder / "adapt" / SETTINGS).exists():
            raise Interrupted(f"stopped; go on with: heedful adapt {folder} --resume") from None
        raise
    except Interrupted as stopped:
        raise Interrupted(
            f"{stopped}; the model is as it was; go on with: heedful adapt {folder} --resume"
        ) from None
    rows = counted(result.validation_rows, "row")
    minutes = counted(max(1, round(result.seconds / 60)), "minute")
    console.print(
        f"KL to the source with {result.held:,} of {result.context:,} tokens held: {result.kl_before:.4f} where "
        f"the oldest went, {result.kl:.4f} now (nats per token, {rows} of validation text); "
        f"{result.trained_parameters:,} parameters trained in {minutes}; saved in {folder}",
        soft_wrap=True,
    )
    if result.kl >= result.kl_before:
        console.print(
            "that is no better than letting the oldest go: read more, with --local-tokens", style="yellow"
        )
    source = " --source STOCK" if result.distill_tokens else ""
    console.print(
        f"it holds {result.held:,} tokens by default now; measure it on text of another kind: heedful eval "
        f"{folder}{source} --data other.txt",
        soft_wrap=True,
    )
    return 0
