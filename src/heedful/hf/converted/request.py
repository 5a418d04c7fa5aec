"""From what a caller asks for to a `Conversion`, and the conversion done."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from heedful.attention.eviction import Eviction
from heedful.hf.converted.checkpoint import CONFIG, read_json
from heedful.hf.converted.convert import check_out, convert_folder
from heedful.hf.converted.gguf import from_gguf
from heedful.hf.converted.settings import Conversion


def conversion_of(
    config: Mapping[str, Any],
    *,
    attention: str = "source",
    attention_options: Mapping[str, Any] | None = None,
    score: str,
    selector: str,
    per: str,
    select_dim: int,
    subtract: bool | None,
    eviction: Eviction,
) -> Conversion:
    """The conversion of a model with this config.

    Raises:
        ValueError: for an unsound option.
    """
    if score not in ("selective", "softmax"):
        raise ValueError(
            f"score must be 'selective' or 'softmax', which keep a model what it is, got {score!r}"
        )
    if score == "softmax" and eviction.evicts and eviction.policy == "selective":
        raise ValueError(
            "score 'softmax' casts no votes to evict by; name another policy, such as 'streaming'"
        )
    if per not in ("layer", "kv_head"):
        raise ValueError(f"per must be 'layer' or 'kv_head', got {per!r}")
    own = Conversion(attention=attention, attention_options=dict(attention_options or {}))
    sizes = own.sizes(config)
    options: dict[str, Any] = {}
    if score == "selective":
        options = {"selector": selector, "subtract": selector == "head" if subtract is None else subtract}
        if selector != "head":
            heads = config.get("num_attention_heads", config.get("n_head"))
            groups = (config.get("num_key_value_heads") or heads) if sizes is None else sizes.sim_kv_heads
            options |= {"select_dim": select_dim, "selectors": groups if per == "kv_head" else 1}
        elif per == "kv_head":
            raise ValueError(
                "per='kv_head' needs selector='retention' or 'added': attention head 0 is one selection head"
            )
    if isinstance(eviction.budget, tuple):
        eviction.budgets(config.get("num_hidden_layers", config.get("n_layer", 0)))
    evicts = eviction.to_dict() if eviction.evicts else None
    return replace(own, score=score, score_options=options, eviction=evicts)


def convert_path(source: str | Path, out: str | Path, *, force: bool = False, **options: Any) -> Path:
    """Convert the checkpoint at `source`, a folder or a .gguf file, into the folder `out`; see `convert_folder`."""
    source = Path(source)
    if source.suffix == ".gguf" and source.is_file():
        check_out(Path(out), source, force)
        with from_gguf(source, Path(out)) as folder:
            return convert_path(folder, out, force=force, **options)
    config = read_json(source / CONFIG, "the config of a model")
    return convert_folder(source, out, conversion_of(config, **options), force=force)
