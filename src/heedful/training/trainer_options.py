"""`--trainer.*`: fields of transformers' `TrainingArguments`, handed through with the types they have there."""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

_OURS = {
    "output_dir": "--out",
    "max_steps": "--steps",
    "num_train_epochs": "--steps",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--batch-size",
    "auto_find_batch_size": "--batch-size",
    "learning_rate": "--lr",
    "warmup_steps": "--warmup",
    "warmup_ratio": "--warmup",
    "weight_decay": "--weight-decay",
    "bf16": "--precision",
    "fp16": "--precision",
    "bf16_full_eval": "--precision",
    "fp16_full_eval": "--precision",
    "seed": "--seed",
    "data_seed": "--seed",
    "eval_strategy": "--evaluations",
    "eval_steps": "--evaluations",
    "save_strategy": "--checkpoints",
    "save_steps": "--checkpoints",
    "report_to": "--track",
    "resume_from_checkpoint": "--resume",
}
_REFUSED = {
    "do_train": "training is what heedful train does",
    "do_eval": "the validation loss is always measured",
    "do_predict": "there is nothing to predict",
    "disable_tqdm": "heedful draws its own progress",
    "label_smoothing_factor": "Trainer would then compute a loss of its own, without the memory loss",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed",
    "use_liger_kernel": "there are no such kernels for heedful's models",
}
_PREFIX = "--trainer."


def trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the types that `TrainingArguments` gives them.

    Args:
        options: values, or the words of a command line, by the name of a field.

    Raises:
        ValueError: a field that is unknown or that heedful sets itself, or a value of another type.
    """
    if not options:
        return {}
    from transformers import HfArgumentParser, TrainingArguments

    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    for name in options:
        _check_name(name, known)
    parser = HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]
    parser.error = _fail  # type: ignore[method-assign]
    return {name: _typed(parser, name, value) for name, value in options.items()}


def take_trainer_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split a command line into its other words and its `--trainer.name value` pairs.

    Raises:
        ValueError: as `trainer_options`.
    """
    rest: list[str] = []
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in arguments:
        if word.startswith(_PREFIX):
            name, given, value = word.removeprefix(_PREFIX).partition("=")
            current = found[name.replace("-", "_")] = [value] if given else []
        elif current is None or word.startswith("--") or word == "-h":
            current = None
            rest.append(word)
        else:
            current.append(word)
    return rest, trainer_options(found)


def _check_name(name: str, known: list[str]) -> None:
    flag = _PREFIX + name.replace("_", "-")
    if name in _OURS:
        raise ValueError(f"{flag} is set by heedful; use {_OURS[name]} instead")
    if name in _REFUSED:
        raise ValueError(f"{flag} is not handed through: {_REFUSED[name]}; leave it out")
    if name not in known:
        near = difflib.get_close_matches(name, [n for n in known if n not in _OURS | _REFUSED], 3)
        hint = f"; did you mean {' or '.join(_PREFIX + n.replace('_', '-') for n in near)}?" if near else ""
        raise ValueError(f"TrainingArguments of transformers has no field {name}, got {flag}{hint}")


def _typed(parser: Any, name: str, value: Any) -> Any:
    if value is None:
        return None
    words = (
        value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
    )
    return getattr(parser.parse_args([f"--{name}", *map(str, words)]), name)


def _fail(message: str) -> NoReturn:
    said = re.sub(
        r"argument --(\w+)(/--[\w-]+)?: ", lambda m: f"{_PREFIX}{m[1].replace('_', '-')}: ", message
    )
    raise ValueError(said)
