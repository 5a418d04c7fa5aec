"""A budget for one call of `generate` of a stock model: what a `custom_generate` folder of transformers runs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from heedful.hf.budgeted import KV_NAMES, BudgetedGenerationMixin
from heedful.hf.converted.checkpoint import Checkpoint, tensors
from heedful.hf.converted.convert import is_added, patched
from heedful.hf.converted.known import family_of
from heedful.hf.converted.settings import FIELD, Conversion

_compared: "WeakKeyDictionary[Any, set[str]]" = WeakKeyDictionary()
"""The folders whose weights a model is known to have, each as it was then."""


@torch.no_grad()
def generate(
    model: Any, *, kv_from: str | Path | None = None, generation_config: Any = None, **arguments: Any
) -> Any:
    """`generate` under a budget, for a stock model too: it attends as a converted one until this returns.

        model.generate(**inputs, custom_generate="integrations/kv-budget", trust_remote_code=True, kv_budget=256)

    Not from several threads at once with one model.

    Args:
        model: a causal model of transformers of a family that `heedful.convert` knows, or one of heedful's.
        kv_from: folder of a converted model with the weights of this stock one: its selectors vote, and its
            saved budget holds where none is given. Without it nobody votes, and the policy is "streaming" unless
            `kv_policy` names another.
        generation_config: as in transformers.
        **arguments: those of transformers' `generate`, and `kv_budget` and all else that begins with `kv_`, as in a
            converted model's `generate`.

    Raises:
        ValueError: if no budget is given or saved, the model cannot be converted, or `kv_from` is a folder of
            another model.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None}
    asked = {name: arguments.get(name, getattr(generation_config, name, None)) for name in KV_NAMES}
    if generation_config is not None:
        arguments["generation_config"] = generation_config
    with _budgeted(model, kv_from):
        if kv_from is None and all(score.config.form == "softmax" for score in model.scores):
            usual = getattr(model.generation_config, "kv_policy", None)
            if asked["kv_policy"] is None and usual is None and not model.saved_eviction().evicts:
                asked["kv_policy"] = arguments["kv_policy"] = "streaming"
        budget = asked.pop("kv_budget")
        if budget is None and not model.resolve_eviction().evicts:
            raise ValueError(
                "no budget is given: kv_budget=256 has each layer hold 256 tokens; for all tokens leave out "
                "custom_generate"
            )
        return type(model).generate(model, **arguments)


@contextlib.contextmanager
def _budgeted(model: Any, kv_from: str | Path | None) -> Iterator[None]:
    """While it lasts the model generates under budgets."""
    if isinstance(model, BudgetedGenerationMixin):
        if kv_from is not None:
            raise ValueError(
                f"kv_from={str(kv_from)!r} gives a stock model selectors; this {type(model).__name__} has "
                f"its own: leave it out"
            )
        yield
    elif kv_from is None:
        with patched(model, Conversion("softmax")):
            yield
    else:
        checkpoint = Checkpoint.read(kv_from)
        conversion = _conversion(checkpoint, model)
        with patched(model, conversion):
            _check_same_weights(checkpoint, model)
            _load_heads(checkpoint, model)
            yield


def _conversion(checkpoint: Checkpoint, model: Any) -> Conversion:
    family = family_of(str(checkpoint.config.get("model_type")))
    settings = checkpoint.config.get(FIELD)
    if family is None or family != model.config.model_type or not isinstance(settings, dict):
        raise ValueError(
            f"kv_from={str(checkpoint.folder)!r} holds a {checkpoint.config.get('model_type')!r} model; expected "
            f"one that was converted from this {model.config.model_type!r} model"
        )
    return Conversion(**{**settings, "source": {}})


def _check_same_weights(checkpoint: Checkpoint, model: Any) -> None:
    """Raise a ValueError if the folder's weights are not the model's: its heads were trained beside others."""
    written = [(checkpoint.folder / name).stat().st_mtime_ns for name in checkpoint.files]
    changed = sum(p._version for p in model.parameters())  # counts what was written into a tensor
    stamp = f"{checkpoint.folder.resolve()} {written} {changed}"
    if stamp in _compared.setdefault(model, set()):
        return
    own = {name: value for name, value in model.state_dict().items() if not is_added(name)}
    for file in checkpoint.files:
        names = [name for name, home in checkpoint.home.items() if home == file and name in own]
        for name, value in tensors(checkpoint.folder / file, names):
            here = own.pop(name)
            if value.shape != here.shape or not torch.equal(value.to(here.device, here.dtype), here):
                raise ValueError(
                    f"{name} of {checkpoint.folder} differs from the model's: its selectors belong to other "
                    f"weights; load the converted model itself"
                )
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if left := sorted(set(own) - tied):
        raise ValueError(
            f"{checkpoint.folder} has no {left[0]}, so that its weights cannot be compared with the model's; load "
            f"the converted model itself"
        )
    _compared[model].add(stamp)


def _load_heads(checkpoint: Checkpoint, model: Any) -> None:
    own = {name: value for name, value in model.named_parameters() if is_added(name)}
    if missing := sorted(own.keys() - checkpoint.shapes.keys()):
        raise ValueError(f"{checkpoint.folder} lacks {missing[0]}; convert its source again")
    for file in checkpoint.files:
        names = [name for name, home in checkpoint.home.items() if home == file and name in own]
        for name, value in tensors(checkpoint.folder / file, names):
            own[name].data.copy_(value)
