"""The commands as functions: `heedful.train`, `heedful.compare` and `heedful.load`.

Their options are those of the commands, the fields of `TrainSettings` and `CompareSettings`, declared there.
What they need beside torch is imported when they are called.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from heedful.comparison.settings import CompareSettings
from heedful.ops.checks import nearest
from heedful.training.settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerFast

    from heedful.hf.modeling import HeedfulForCausalLM
    from heedful.training.result import RunResult

F = TypeVar("F", bound=Callable[..., Any])

_EACH_RUN_HAS_ITS_OWN = ("attention", "score", "seed")
_TRAIN_OPTIONS = dataclasses.fields(TrainSettings)
_COMPARE_OPTIONS = (
    *(f for f in dataclasses.fields(CompareSettings) if f.name != "train"),
    *(f for f in _TRAIN_OPTIONS if f.name not in _EACH_RUN_HAS_ITS_OWN),
)


class Loaded(NamedTuple):
    """What `load` finds in the folder of a run."""

    model: "HeedfulForCausalLM"
    """In evaluation mode."""
    tokenizer: "PreTrainedTokenizerFast | None"
    """None where the model was not trained on text."""


def _with_options(options: Iterable[Any]) -> Callable[[F], F]:
    """Give a function with `**options` the signature and the help of these fields, and refuse other names."""
    options = tuple(options)

    def give(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=f.type)
            for f in options
        ]
        described: Any = function
        described.__signature__ = signature.replace(parameters=[*own, *added])
        described.__doc__ = f"{inspect.getdoc(function)}\n\nOptions:\n" + "\n".join(
            f"    {f.name}: {f.metadata['help']} (default: {_default(f)!r})." for f in options
        )
        return function

    return give


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _check_options(function: str, options: dict[str, Any], known: Iterable[Any]) -> dict[str, Any]:
    names = [f.name for f in known]
    for name in options:
        if name not in names:
            near = nearest(name, names)
            hint = f"; did you mean {near!r}?" if near else f"; it has: {', '.join(names)}"
            raise TypeError(f"{function} has no option {name!r}{hint}")
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def _require(function: str, *packages: str) -> None:
    """Raise one plain error where an extra is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{function} needs {", ".join(missing)}, not installed here; run: pip install "heedful[lm]"',
            name=missing[0],
        )


@_with_options(_TRAIN_OPTIONS)
def train(
    out: str | Path = "runs/train", *, resume: bool = False, console: "Console | None" = None, **options: Any
) -> "RunResult":
    """Train a language model and leave it, with its settings and figures, in a folder.

        result = heedful.train("runs/a", data="my.txt", attention="sas", score="selective", steps=500)

    Args:
        out: the folder; made if missing. `heedful.load(out)` loads what is in it.
        resume: go on with the run in `out`, with the options it has; they are given again, or left at that.
        console: where progress is shown; the terminal's stderr if None.
        **options: as in `heedful train`, see below.

    Returns:
        The figures of the run, also in `out/result.json`.

    Raises:
        TypeError: for an unknown option.
        ValueError: for an unsound option or unusable data.
        FileExistsError: if `out` holds a run and `resume` is False, or other files.
        heedful.training.Interrupted: after Ctrl-C; `resume=True` goes on.
        ImportError: if the extras of `heedful[lm]` are missing.
    """
    given = _check_options("heedful.train", options, _TRAIN_OPTIONS)
    _require("heedful.train", "transformers", "accelerate", "tokenizers", "safetensors", "rich")
    from heedful.training.run import train as run
    from heedful.training.settings import SETTINGS

    saved = Path(out) / SETTINGS
    if resume and saved.exists():
        settings = dataclasses.replace(TrainSettings.load(saved), **given)
    else:
        settings = TrainSettings(**given)
    return run(settings, out, resume=resume, console=console)


@_with_options(_COMPARE_OPTIONS)
def compare(
    out: str | Path = "runs/compare", *, console: "Console | None" = None, **options: Any
) -> "list[RunResult]":
    """Train every attention x score with the same data order and seeds, and write the comparison.

        results = heedful.compare("runs/cmp", attention=["mha", "sas"], score=["softmax"], seeds=3, data="my.txt")

    Args:
        out: the folder for table, figure, raw data and models; called again it goes on where it stopped.
        console: where progress and the table are shown; stdout if None.
        **options: as in `heedful compare`, see below.

    Returns:
        The finished runs, form by form.

    Raises:
        TypeError: for an unknown option.
        ValueError: for an unsound option, or if `out` holds a comparison with other settings.
        heedful.training.Interrupted: after Ctrl-C; the same call goes on.
        RuntimeError: if runs failed; the others are written.
        ImportError: if the extras of `heedful[lm]` are missing.
    """
    given = _check_options("heedful.compare", options, _COMPARE_OPTIONS)
    _require(
        "heedful.compare", "transformers", "accelerate", "tokenizers", "safetensors", "rich", "matplotlib"
    )
    from heedful.comparison.run import compare as run

    return run(CompareSettings.of(**given), out, console=console)


def load(run: str | Path) -> Loaded:
    """The model and the tokenizer that a training run left in its folder.

        model, tokenizer = heedful.load("runs/a")

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if it is damaged, or weights are missing or do not fit.
        ImportError: if the extras of `heedful[lm]` are missing.
    """
    _require("heedful.load", "transformers", "tokenizers", "safetensors")
    from heedful.hf.load import load_model, load_tokenizer

    model = load_model(run)
    has_tokenizer = (Path(run) / "tokenizer.json").exists()
    return Loaded(model, load_tokenizer(run) if has_tokenizer else None)
