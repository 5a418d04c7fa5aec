"""What a saved model's folder holds beside config and weights: a module that loads it, and its card."""

import contextlib
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heedful.attention.eviction import Eviction

MODULE = "modeling_heedful"
CARD = "README.md"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.HeedfulConfig",
    "AutoModel": f"{MODULE}.HeedfulModel",
    "AutoModelForCausalLM": f"{MODULE}.HeedfulForCausalLM",
    "AutoModelForSequenceClassification": f"{MODULE}.HeedfulForSequenceClassification",
}
_SOURCE = '''\
"""By this file transformers loads the model with trust_remote_code=True; the code is the package heedful."""

try:
    from heedful.hf import (
        HeedfulConfig,
        HeedfulForCausalLM,
        HeedfulForSequenceClassification,
        HeedfulModel,
    )
except ModuleNotFoundError as error:
    if error.name != "heedful":
        raise
    raise ImportError('this model needs heedful; install it with: pip install "heedful[lm]"') from error
'''


@contextlib.contextmanager
def replacing_weights(folder: Path) -> Iterator[None]:
    """While a model is saved in `folder`: weights of another one that was there are gone afterwards.

    transformers leaves a whole file beside new shards, and loads it instead of them; and an index, with the shards
    of a converted model, beside a whole file. Weights of other names, such as adapters, stay.
    """
    before = {path: _stamp(folder / path) for path in (_WHOLE, _INDEX)}
    old = {_WHOLE, _INDEX, *_indexed(folder)}
    yield
    written = [path for path in (_WHOLE, _INDEX) if _stamp(folder / path) not in (None, before[path])]
    if not written:  # an adapter alone, or a variant, which stands beside
        return
    new = {_WHOLE} if _WHOLE in written else {_INDEX, *_indexed(folder)}
    for path in old - new:
        (folder / path).unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    if not path.is_file():
        return None
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _indexed(folder: Path) -> set[str]:
    """The files of weights that the index in `folder` names, if there is a sound one."""
    try:
        names = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return {name for name in names if name == Path(name).name and name.endswith(".safetensors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def write_beside(model: Any, folder: Path, facts: dict[str, str] | None = None) -> None:
    """Write the module, and a card unless there is one; name the module in the model's config.

    Args:
        model: a heedful model, about to be saved in `folder`.
        folder: made if missing.
        facts: lines for the card that the model does not know, such as its data and its loss.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.auto_map = dict(AUTO_MAP)
    (folder / f"{MODULE}.py").write_text(_SOURCE, encoding="utf-8")
    if facts or not (folder / CARD).exists():
        (folder / CARD).write_text(card(model, facts or {}), encoding="utf-8")


def card(model: Any, facts: dict[str, str]) -> str:
    """A model card in Markdown: what the model is, and how to load it."""
    config = model.config
    layers = f"{config.num_hidden_layers} layer{'s' if config.num_hidden_layers > 1 else ''}"
    lines = {
        "form": f"attention {words(config.attention)}, score {words(config.score)}",
        "size": f"{model.num_parameters() / 1e6:.3g} M parameters, {layers} of width "
        f"{config.hidden_size}, vocabulary of {config.vocab_size}",
        **facts,
        "cache": kept_by(Eviction.of(config.eviction), config.num_hidden_layers),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
    causal = type(model).__name__ == "HeedfulForCausalLM"
    auto = "AutoModelForCausalLM" if causal else AUTO_BY_CLASS.get(type(model).__name__, "AutoModel")
    head = textwrap.dedent(
        f"""\
        ---
        library_name: transformers
        {"pipeline_tag: text-generation" if causal else "tags: [heedful]"}
        ---

        # A heedful model

        | | |
        |---|---|
        """
    )
    usage = textwrap.dedent(
        f"""\

        ```python
        from transformers import {auto}  # pip install "heedful[lm]"

        model = {auto}.from_pretrained("path/to/this/folder", trust_remote_code=True)
        ```

        After `import heedful.hf` it loads without `trust_remote_code`.
        """
    )
    return f"{head}{table}\n{usage}"


AUTO_BY_CLASS = {value.partition(".")[2]: name for name, value in AUTO_MAP.items()}


def words(form: str | list[str]) -> str:
    """A form's name, or the names by layer."""
    return form if isinstance(form, str) else ", ".join(form)


def kept_by(eviction: Eviction, n_layers: int) -> str:
    """How much the cache holds by default."""
    if not eviction.evicts:
        return "holds every token, unless generate is given a kv_budget"
    if eviction.budget is None:
        return f"forgets tokens with more than {eviction.threshold:g} votes against them"
    budgets = eviction.budgets(n_layers)
    safe = (
        ""
        if eviction.grace == eviction.first == 1
        else f"; the newest {eviction.grace} and first {eviction.first} never go"
    )
    return f"holds {', '.join(map(str, budgets))} tokens, by layer; who goes: {eviction.policy}{safe}"
