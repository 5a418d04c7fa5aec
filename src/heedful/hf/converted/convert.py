"""A stock checkpoint into a converted one, and back. Weights are copied as files, or shard by shard."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from heedful.files import made_folder, write_json, write_text
from heedful.hf.converted.beside import SOURCE_CARD, auto_map, card, module_source
from heedful.hf.converted.checkpoint import CONFIG, INDEX, ONE, Checkpoint, copy, tensors
from heedful.hf.converted.families import config_class, model_class, renames
from heedful.hf.converted.known import FAMILIES, PREFIX, family_of
from heedful.hf.converted.model import install, start
from heedful.hf.converted.settings import FIELD, Conversion
from heedful.hf.saved import CARD, MODULE

OF_SCORES, OF_SAS = ".score.", ".sas."
"""What the names of parameters that conversion added have in common: of selectors, and of expansions."""
ADDED = OF_SCORES, OF_SAS
_DROPOUTS = "attention_dropout", "attn_pdrop"
_BYTES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DIFFERENT = {
    "deepseek_v2": "its latent attention (MLA) keeps no keys and values per head",
    "deepseek_v3": "its latent attention (MLA) keeps no keys and values per head",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "gpt_oss": "its attention has sinks, which take a share of the softmax",
    "gemma3": "it reads images too; convert the text model (gemma3_text)",
    "bert": "it is no causal language model",
}


def convert_folder(
    source: str | Path, out: str | Path, conversion: Conversion, *, force: bool = False
) -> Path:
    """Convert the checkpoint in `source` into the folder `out`; no weight is changed.

    Args:
        source: a folder with config.json and safetensors, of a family in `FAMILIES`.
        out: is made; one that is there is only replaced with `force`.
        conversion: what the attention becomes.
        force: replace `out`.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: if `source` is no checkpoint.
        FileExistsError: if `out` is there, without `force`.
        ValueError: if it cannot be converted; the message says why. Nothing is written then.
    """
    checkpoint = Checkpoint.read(source)
    family = _family(checkpoint)
    config = _converted_config(checkpoint.config, family, conversion)
    added = _added_weights(checkpoint, family, config)
    with _replaced(out, checkpoint.folder, force) as new:
        _write_weights(checkpoint, added, new)
        write_json(new / CONFIG, config)
        for path in checkpoint.others():
            if path.name not in (CARD, SOURCE_CARD):
                copy(path, new / path.name)
        source_card = next((path for path in checkpoint.others() if path.name == CARD), None)
        if source_card is not None:
            copy(source_card, new / SOURCE_CARD)
        names = config_class(family).__name__, model_class(family).__name__
        write_text(new / f"{MODULE}.py", module_source(*names))
        write_text(new / CARD, card(config, checkpoint.folder.resolve().name, source_card))
    return Path(out)


class Dropped(NamedTuple):
    """Parameters that the stock checkpoint of a converted one has not."""

    selection: int
    """Of selectors."""
    expansion: int
    """Of simulated heads: once these are trained, the stock model is another model."""


def convert_back(source: str | Path, out: str | Path, *, force: bool = False) -> Dropped:
    """Write the stock checkpoint of a converted one: fine-tuned weights are kept, what was added is dropped.

    Args:
        source: the folder of a converted model.
        out: is made; one that is there is only replaced with `force`.
        force: replace `out`.

    Returns:
        The numbers of parameters that were dropped.

    Raises:
        FileNotFoundError: if `source` is no checkpoint.
        FileExistsError: if `out` is there, without `force`.
        ValueError: if it is not a converted one.
    """
    checkpoint = Checkpoint.read(source)
    family = family_of(str(checkpoint.config.get("model_type")))
    original = (checkpoint.config.get(FIELD) or {}).get("source")
    if family is None or not isinstance(original, dict) or original.get("model_type") != family:
        raise ValueError(
            f"{source} is no converted model (model_type {checkpoint.config.get('model_type')!r}): nothing to "
            f"convert back"
        )
    ours = {"model_type", "architectures", "auto_map", *_DROPOUTS}
    config = {name: value for name, value in checkpoint.config.items() if name not in ours | {FIELD}}
    config |= {name: value for name, value in original.items() if name in ours}
    dropped = [name for name in checkpoint.shapes if is_added(name)]
    with _replaced(out, checkpoint.folder, force) as new:
        _write_without(checkpoint, set(dropped), new)
        write_json(new / CONFIG, config, sort_keys=True)
        for path in checkpoint.others():
            if path.name != CARD:  # ours; the source's has another name
                copy(path, new / (CARD if path.name == SOURCE_CARD else path.name))
    return Dropped(*map(checkpoint.parameters, ADDED))


def is_added(name: str) -> bool:
    """Whether a parameter of this name is one that conversion added."""
    return any(part in name for part in ADDED)


def patch(model: Any, conversion: Conversion) -> Any:
    """Give a stock model in memory heedful's attention, in place: the light way, for experiments.

    Its class and its config become those of a converted model, so that what is saved loads as one.

    Raises:
        ValueError: if it cannot be converted; it is as it was then.
    """
    family = str(getattr(model.config, "model_type", None))
    _check_family(family, "this model")
    source_class = model_class(family).__bases__[1]
    if type(model) is not source_class:
        raise ValueError(
            f"expected a {source_class.__name__}, the causal model of {family}, got a {type(model).__name__}"
        )
    undo = _undo(model)
    try:
        return _patched(model, family, conversion)
    except BaseException:
        undo()
        raise


@contextlib.contextmanager
def patched(model: Any, conversion: Conversion) -> Iterator[Any]:
    """`patch` until the block ends; the stock model is then what it was."""
    undo = _undo(model)
    try:
        yield patch(model, conversion)
    finally:
        undo()


def _undo(model: Any) -> Callable[[], None]:
    """What makes the model the one that it is now, whatever `_patched` does to it."""
    before = [(thing, thing.__class__, dict(thing.__dict__)) for thing in (model.config, *model.modules())]

    def undo() -> None:
        for thing, its_class, state in before:
            thing.__class__ = its_class
            thing.__dict__.clear()
            thing.__dict__.update(state)
            if isinstance(thing, torch.nn.Module):
                for name in ADDED:
                    thing._modules.pop(name.strip("."), None)

    return undo


def _patched(model: Any, family: str, conversion: Conversion) -> Any:
    source = model.config.to_dict()
    settings = asdict(conversion) | {"source": _plain(source)}
    model.config.__class__ = config_class(family)
    setattr(model.config, FIELD, settings)
    for name in _DROPOUTS:
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    model.__class__ = model_class(family)
    model.config._attn_implementation = model._check_and_adjust_attn_implementation(None)
    for module in model.modules():
        for name in _DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(getattr(module, "attn_dropout", None), torch.nn.Dropout):
            module.attn_dropout.p = 0.0
    install(model)
    return model


def _family(checkpoint: Checkpoint) -> str:
    family = checkpoint.config.get("model_type")
    _check_family(family, str(checkpoint.folder))
    if (checkpoint.folder / "adapter_config.json").exists():
        raise ValueError(
            f"{checkpoint.folder} has an adapter beside its weights, which loads with them; merge it first "
            f"(merge_and_unload), or move adapter_config.json away"
        )
    if checkpoint.config.get("quantization_config"):
        raise ValueError(f"{checkpoint.folder} is quantized; convert the checkpoint it was made from")
    return str(family)


def _check_family(family: Any, what: str) -> None:
    if not isinstance(family, str):
        raise ValueError(f"the config of {what} has no model_type; expected one of {', '.join(FAMILIES)}")
    if family_of(family) or family == "heedful":
        raise ValueError(f"{what} is a heedful model already (model_type {family!r})")
    if family not in FAMILIES:
        why = _DIFFERENT.get(family, "how its attention works is not known here")
        raise ValueError(
            f"{what} is a {family!r} model and cannot be converted: {why}; known are {', '.join(FAMILIES)}"
        )


def _converted_config(source: dict[str, Any], family: str, conversion: Conversion) -> dict[str, Any]:
    name = model_class(family).__name__
    config = {key: value for key, value in source.items() if key != "auto_map"}
    config |= {
        "model_type": PREFIX + family,
        "architectures": [name],
        "auto_map": auto_map(config_class(family).__name__, name),
        FIELD: asdict(conversion) | {"source": source},
    }
    for dropout in _DROPOUTS:
        if dropout in config:
            config[dropout] = 0.0
    return config


def _added_weights(checkpoint: Checkpoint, family: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The parameters that the converted model has more than the source, without effect at first.

    Raises:
        ValueError: if the weights do not fit the config.
    """
    if config.get("use_bidirectional_attention"):
        raise ValueError(f"{checkpoint.folder} attends in both directions; converted layers attend causally")
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if not isinstance(layers, int) or not 0 < layers <= len(checkpoint.shapes):
        raise ValueError(
            f"{checkpoint.folder / CONFIG} says {layers!r} layers, of {len(checkpoint.shapes)} tensors in all"
        )
    try:
        with torch.device("meta"):
            model = model_class(family)(config_class(family).from_dict(config))
    except ValueError:
        raise
    except Exception as error:  # transformers checks little of a config, and anything can come of the rest
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{checkpoint.folder / CONFIG} is unsound: {reason}") from None
    prefix = f"{model.base_model_prefix}."
    # saved as a base model, its weights have no prefix, and load as well
    bare = not any(name.startswith(prefix) for name in checkpoint.shapes)
    _check_weights(checkpoint, model, prefix if bare else "")
    dtype = _BYTES.get(max(set(checkpoint.dtypes.values()), key=list(checkpoint.dtypes.values()).count))
    if dtype is None:
        raise ValueError(
            f"{checkpoint.folder} holds weights in {set(checkpoint.dtypes.values())}; expected floats"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        added: dict[str, torch.Tensor] = {}
        for place, module in _added_modules(model):
            start(module.to_empty(device="cpu"))
            place = place.removeprefix(prefix) if bare else place
            added |= {f"{place}.{name}": p.detach().to(dtype) for name, p in module.named_parameters()}
    return added


def _check_weights(checkpoint: Checkpoint, model: Any, bare: str) -> None:
    """Raise a ValueError unless the weights are those of `model`, whose names may lack a prefix, `bare`."""
    tied = getattr(model, "_tied_weights_keys", None) if model.config.tie_word_embeddings else None
    own = {name: p.detach() for name, p in model.named_parameters()}
    own = {name: p for name, p in own.items() if not is_added(name) and name not in (tied or ())}
    # as transformers saves them, which for experts is one by one; or, as others may, as it has them
    forms = [
        {name.removeprefix(bare): p for name, p in form.items()} for form in (_as_saved(model, own), own)
    ]
    missing, wanted = min(
        (([name for name in form if name not in checkpoint.shapes], form) for form in forms),
        key=lambda found: len(found[0]),
    )
    if missing:
        raise ValueError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(wanted)} tensors of its config: "
            f"{missing[0]}, ..."
        )
    for name, value in wanted.items():
        if checkpoint.shapes[name] != tuple(value.shape):
            found, home = checkpoint.shapes[name], checkpoint.home[name]
            raise ValueError(
                f"tensor {name} in {home} has shape {found}, but {CONFIG} asks for {tuple(value.shape)}"
            )


def _as_saved(model: Any, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names that they have in files; on the meta device that costs nothing."""
    return (
        own
        if not renames(model.config.model_type.removeprefix(PREFIX))
        else revert_weight_conversion(model, own)
    )


def _added_modules(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if name.endswith(tuple(part.rstrip(".") for part in ADDED)):
            yield name, module


def _write_weights(checkpoint: Checkpoint, added: dict[str, torch.Tensor], new: Path) -> None:
    """The files of weights as they are, one more for what is added, and an index."""
    if not added and checkpoint.files == (ONE,):
        copy(checkpoint.folder / ONE, new / ONE)
        return
    # transformers prefers model.safetensors to an index
    names = {name: "model-source.safetensors" if name == ONE else name for name in checkpoint.files}
    for name, renamed in names.items():
        copy(checkpoint.folder / name, new / renamed)
    weight_map = {tensor: names[name] for tensor, name in checkpoint.home.items()}
    if added:
        own = "model-heedful.safetensors"
        while own in names.values():
            own = f"more-{own}"
        save_file(added, new / own, {"format": "pt"})
        weight_map |= dict.fromkeys(added, own)
    _write_index(new, weight_map)


def _write_without(checkpoint: Checkpoint, dropped: set[str], new: Path) -> None:
    """The weights but for some: files that hold none of them as they are, the others shard by shard."""
    kept: dict[str, str] = {}
    files: list[str] = []
    for name in checkpoint.files:
        held = [tensor for tensor, home in checkpoint.home.items() if home == name]
        wanted = [tensor for tensor in held if tensor not in dropped]
        if not wanted:
            continue
        if wanted == held:
            copy(checkpoint.folder / name, new / name)
        else:
            save_file(dict(tensors(checkpoint.folder / name, wanted)), new / name, {"format": "pt"})
        files.append(name)
        kept |= dict.fromkeys(wanted, name)
    if len(files) == 1:
        os.replace(new / files[0], new / ONE)
    else:
        _write_index(new, kept)


def _write_index(new: Path, weight_map: dict[str, str]) -> None:
    size = sum((new / name).stat().st_size for name in set(weight_map.values()))
    write_json(
        new / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    )


@contextlib.contextmanager
def _replaced(out: str | Path, source: Path, force: bool) -> Iterator[Path]:
    """A new folder that takes the place of `out` when all is written; nothing changes if anything fails."""
    out = Path(out)
    check_out(out, source, force)
    with made_folder(out.parent):
        new = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        old = new.with_name(new.name + "-old")
        try:
            yield new
            new.chmod(0o755)
            for path in new.iterdir():
                path.chmod(0o644)
            if out.exists():
                os.replace(out, old)
            os.replace(new, out)
        finally:
            if old.exists() and not out.exists():  # stopped between the two
                os.replace(old, out)
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)


def check_out(out: Path, source: Path, force: bool) -> None:
    """Raise unless `out` may be made, or replaced."""
    here, there = out.resolve(), source.resolve()
    if here == there:
        raise ValueError(f"{out} is the source itself; name another folder for the result")
    if here in there.parents or there in here.parents:
        raise ValueError(f"one of {source} and {out} lies in the other; name another folder for the result")
    if here in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{out} is where you are, or above; name a folder that can be replaced")
    if (out.exists() or out.is_symlink()) and not force:
        raise FileExistsError(
            f"{out} exists; name another folder, or give --force (force=True) to replace it"
        )
    if out.is_symlink():
        raise ValueError(f"{out} is a symbolic link; name the folder itself")
    if out.exists():
        held = list(out.iterdir()) if out.is_dir() else [out]
        if held and (any(path.is_dir() for path in held) or not (out / CONFIG).is_file()):
            raise ValueError(f"{out} holds more than a model; it is not replaced, name another")


def _plain(value: Any) -> Any:
    """As JSON would have it."""
    return json.loads(json.dumps(value, default=str))
