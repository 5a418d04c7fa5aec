"""The commands as functions: `heedful.train`, `compare`, `convert`, `adapt`, and what loads their results, `load`.

Their options are those of the commands, the fields of their settings, declared there.
What they need beside torch is imported when they are called.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from heedful.adaptation.settings import AdaptSettings
from heedful.comparison.settings import CompareSettings
from heedful.ops.checks import nearest
from heedful.training.settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from heedful.adaptation.result import AdaptResult
    from heedful.attention.eviction.settings import AnyBudget
    from heedful.hf.modeling import HeedfulForCausalLM
    from heedful.training.result import RunResult

F = TypeVar("F", bound=Callable[..., Any])

_EACH_RUN_HAS_ITS_OWN = ("attention", "score", "seed")
_ADAPT_OPTIONS = dataclasses.fields(AdaptSettings)
_TRAIN_OPTIONS = dataclasses.fields(TrainSettings)
_COMPARE_OPTIONS = (
    *(f for f in dataclasses.fields(CompareSettings) if f.name != "train"),
    *(f for f in _TRAIN_OPTIONS if f.name not in _EACH_RUN_HAS_ITS_OWN),
)


class Loaded(NamedTuple):
    """What `load` finds in the folder of a run."""

    model: "HeedfulForCausalLM"
    """In evaluation mode; after a conversion that of its family."""
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


def convert(
    source: str | Path,
    out: str | Path,
    *,
    attention: str = "source",
    attention_options: Mapping[str, Any] | None = None,
    score: str = "selective",
    selector: str = "retention",
    per: str = "layer",
    select_dim: int = 32,
    subtract: bool | None = None,
    eviction: "AnyBudget" = None,
    back: bool = False,
    force: bool = False,
) -> Path:
    """Give a Hugging Face checkpoint heedful's attention, or take it back.

        heedful.convert("SmolLM2-135M", "out")
        model, tokenizer = heedful.load("out")

    The model's own blocks stay. With an added selector, which only says who is evicted, the converted model
    predicts what its source predicts as long as every token is held. Weights are copied as files.

    Args:
        source: folder of a checkpoint with safetensors, or a .gguf file.
        out: folder for the result.
        attention: "source", the source's own heads, or "sas", which simulates more of them; they start as copies,
            and take as many times the cache.
        attention_options: of "sas": sim_heads (3 times the heads), sim_head_dim (that of the source) and
            kernel_size (3), as in `heedful.train`.
        score: what happens to the logits: "selective", or "softmax", which evicts by other policies alone.
        selector: who says which tokens go: a "retention", by which each token says on arrival how long it will
            matter; "added" selection heads, by which later tokens vote; or attention "head" 0, as in the paper.
        per: an added selector per "layer", or per "kv_head", which then holds tokens of its own.
        select_dim: size of an added selection head; a retention has twice as many hidden features.
        subtract: whether votes are subtracted from the logits, or only say who is evicted; None: subtracted where
            head 0 casts them, as in the paper.
        eviction: what `generate` holds by default: a number of tokens, a list with one per layer, or an `Eviction`.
        back: the other way: `source` is a converted model, `out` becomes the stock one. Fine-tuned weights are
            kept, selectors and simulated heads are dropped: once simulated heads are trained, the stock
            model is another model. The options above do not matter then.
        force: replace `out` if it is there.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: if `source` is no checkpoint.
        FileExistsError: if `out` is there, without `force`.
        ValueError: if it cannot be converted, saying why; nothing is written then.
        ImportError: if the extras of `heedful[lm]` are missing.
    """
    _require("heedful.convert", "transformers", "safetensors")
    from heedful.attention.eviction import Eviction
    from heedful.hf.converted.convert import convert_back
    from heedful.hf.converted.request import convert_path

    if back:
        convert_back(source, out, force=force)
        return Path(out)
    options: dict[str, Any] = {"attention": attention, "attention_options": attention_options}
    options |= {"score": score, "selector": selector, "per": per, "select_dim": select_dim}
    return convert_path(
        source, out, force=force, eviction=Eviction.of(eviction), subtract=subtract, **options
    )


def patch(
    model: "PreTrainedModel",
    *,
    attention: str = "source",
    attention_options: Mapping[str, Any] | None = None,
    score: str = "selective",
    selector: str = "retention",
    per: str = "layer",
    select_dim: int = 32,
    subtract: bool | None = None,
    eviction: "AnyBudget" = None,
) -> Any:
    """Give a stock transformers model in memory heedful's attention, in place: `convert`, for experiments.

        model = heedful.patch(AutoModelForCausalLM.from_pretrained("SmolLM2-135M"), score="softmax")
        model.generate(**inputs, kv_budget=256, kv_policy="streaming")

    Its class becomes that of a converted model: what `save_pretrained` writes loads as one, never as a stock model.

    Args:
        model: a causal language model of a family that `convert` knows.
        attention: as in `convert`, as all options.
        attention_options: as in `convert`.
        score: as in `convert`.
        selector: as in `convert`.
        per: as in `convert`.
        select_dim: as in `convert`.
        subtract: as in `convert`.
        eviction: as in `convert`.

    Returns:
        The model.

    Raises:
        ValueError: if it cannot be converted, saying why; it is as it was then.
    """
    _require("heedful.patch", "transformers", "safetensors")
    from heedful.attention.eviction import Eviction
    from heedful.hf.converted.convert import patch as run
    from heedful.hf.converted.request import conversion_of

    options: dict[str, Any] = {"attention": attention, "attention_options": attention_options}
    options |= {"score": score, "selector": selector, "per": per, "select_dim": select_dim}
    options |= {"subtract": subtract, "eviction": Eviction.of(eviction)}
    return run(model, conversion_of(model.config.to_dict(), **options))


@_with_options(_ADAPT_OPTIONS)
def adapt(
    folder: str | Path, *, resume: bool = False, console: "Console | None" = None, **options: Any
) -> "AdaptResult":
    """Let a converted checkpoint learn whom to forget, and save it where it is.

        heedful.convert("SmolLM2-135M", "out")
        result = heedful.adapt("out", data="my.txt", target_held=0.25)

    Args:
        folder: what `convert` left.
        resume: go on with the adaptation in `folder`, with the options it has; they are left out then.
        console: where progress is shown; the terminal's stderr if None.
        **options: as in `heedful adapt`, see below.

    Returns:
        The figures, also in `folder/adapt/result.json`.

    Raises:
        TypeError: for an unknown option.
        ValueError: for an unsound option or unusable data, or if nothing in the model can learn.
        FileExistsError: if `folder` holds an adaptation already and `resume` is False.
        heedful.training.Interrupted: after Ctrl-C; `resume=True` goes on.
        ImportError: if the extras of `heedful[lm]`, for `lora` of `heedful[adapt]`, are missing.
    """
    given = _check_options("heedful.adapt", options, _ADAPT_OPTIONS)
    _require("heedful.adapt", "transformers", "accelerate", "tokenizers", "safetensors", "rich")
    from heedful.adaptation.run import adapt as run

    return run(folder, AdaptSettings(**given), resume=resume, console=console)


def load(run: str | Path) -> Loaded:
    """The model and the tokenizer that a training run, or a conversion, left in its folder.

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
