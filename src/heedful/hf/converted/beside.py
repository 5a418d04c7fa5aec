"""What the folder of a converted model holds beside config and weights: the module that loads it, and its card."""

import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from huggingface_hub.utils import yaml_dump

from heedful.attention.eviction import Eviction
from heedful.files import write_text
from heedful.hf.converted.settings import FIELD
from heedful.hf.saved import CARD, MODULE, kept_by

SOURCE_CARD = "README-source.md"
"""The name of the source's own card."""
_STILL_TRUE = "license", "license_name", "license_link", "language", "datasets", "base_model"
"""What a card says of the source that holds for what is made of it."""


def auto_map(config_name: str, model_name: str) -> dict[str, str]:
    """What the config names for `trust_remote_code`."""
    return {"AutoConfig": f"{MODULE}.{config_name}", "AutoModelForCausalLM": f"{MODULE}.{model_name}"}


def module_source(config_name: str, model_name: str) -> str:
    """The module of a few lines: it imports heedful, or says how to install it."""
    return textwrap.dedent(
        f'''\
        """By this file transformers loads the model with trust_remote_code=True; the code is in heedful."""

        try:
            from heedful.hf.converted import {config_name}, {model_name}
        except ModuleNotFoundError as error:
            if error.name != "heedful":
                raise
            raise ImportError('this model needs heedful; install it with: pip install "heedful[lm]"') from error
        '''
    )


def card(
    config: dict[str, Any],
    source: str,
    source_card: Path | None = None,
    facts: dict[str, str] | None = None,
) -> str:
    """A model card in Markdown.

    Args:
        config: config.json of the converted model.
        source: what it was converted from, for people.
        source_card: the card of that; it goes along under another name.
        facts: more lines, such as what it learned from.
    """
    settings = config[FIELD]
    options = ", ".join(f"{name} {value}" for name, value in settings["score_options"].items())
    layers = config.get("num_hidden_layers", config.get("n_layer", 0))
    lines = {
        "source": f"{source}, {settings['source'].get('model_type')}",
        "attention": "simulated heads (SAS)" if settings.get("attention") == "sas" else "the source's heads",
        "score": settings["score"] + (f" ({options})" if options else ""),
        "cache": kept_by(Eviction.of(settings["eviction"]), layers),
        **(facts or {}),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
    known = {"library_name": "transformers", "pipeline_tag": "text-generation", **_still_true(source_card)}
    more = f" Its card is [{SOURCE_CARD}]({SOURCE_CARD})." if source_card else ""
    head = f"---\n{yaml_dump(known)}---\n" + textwrap.dedent(
        f"""
        # A model whose cache can forget

        Converted by heedful: its source's weights, and heedful's attention around them. The licence of the source
        holds for its weights.{more}

        | | |
        |---|---|
        """
    )
    usage = textwrap.dedent(
        """\

        ```python
        from transformers import AutoModelForCausalLM  # pip install "heedful[lm]"

        model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
        model.generate(**inputs, kv_budget=256)  # each layer holds 256 tokens
        ```

        After `import heedful.hf` it loads without `trust_remote_code`. `heedful convert --back` undoes it.
        """
    )
    return f"{head}{table}\n{usage}"


def _still_true(source_card: Path | None) -> dict[str, Any]:
    """What the head of the source's card says of licence, language and data; nothing where it cannot be read."""
    try:
        known = metadata_load(source_card) if source_card else None
    except Exception:  # a card is written by people, and its head is parsed by yaml
        return {}
    return {name: value for name, value in (known or {}).items() if name in _STILL_TRUE}


def write_beside(model: Any, folder: Path) -> None:
    """Write both, a card only where there is none, before a model is saved in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = type(model.config).__name__, type(model).__name__
    model.config.auto_map = auto_map(*names)
    write_text(folder / f"{MODULE}.py", module_source(*names))
    if not (folder / CARD).exists():
        write_text(folder / CARD, card(model.config.to_dict(), model.config.name_or_path or "a checkpoint"))
