"""The families of models that can be converted, and their classes: the source's own, with another attention."""

import inspect
from functools import cache
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from heedful.hf.converted.adapters import tell_peft
from heedful.hf.converted.known import FAMILIES, PREFIX, source_of


@cache
def config_class(family: str) -> Any:
    """`HeedfulLlamaConfig` for "llama": the source's config under a model type of its own."""
    source = CONFIG_MAPPING[family]

    def made(cls: Any, *args: Any, **kwargs: Any) -> Any:
        register_model(family)  # who has a config wants its model next
        return super(own, cls).__new__(cls)

    def to_dict(self: Any) -> dict[str, Any]:
        tell_peft()  # it asks for this, and looks the model type up next
        return super(own, self).to_dict()

    to_dict.__doc__ = source.to_dict.__doc__
    own: Any = type(
        f"Heedful{source.__name__}",
        (source,),
        {
            "__module__": "heedful.hf.converted",
            "__doc__": f"The config of a converted {family} model: `{source.__name__}`, and `heedful`.",
            "model_type": PREFIX + family,
            "__new__": made,
            "to_dict": to_dict,
        },
    )
    return own


@cache
def model_class(family: str) -> Any:
    """`HeedfulLlamaForCausalLM` for "llama": the source's model with converted attention."""
    from heedful.hf.converted.model import ConvertedGenerationMixin

    source = source_of(family)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ConvertedGenerationMixin.forward(self, *args, **kwargs)

    # generate and Trainer look up what a model takes
    forward.__signature__ = inspect.signature(source.forward)  # type: ignore[attr-defined]
    forward.__doc__ = source.forward.__doc__
    return type(
        f"Heedful{source.__name__}",
        (ConvertedGenerationMixin, source),
        {
            "__module__": "heedful.hf.converted",
            "__doc__": f"`{source.__name__}` with the attention that its config's `heedful` says.",
            "config_class": config_class(family),
            "forward": forward,
        },
    )


def renames(family: str) -> bool:
    """Whether transformers renames or joins the weights of a family while it loads them."""
    names = family, model_class(family).__name__.removeprefix("Heedful")
    return any(get_checkpoint_conversion_mapping(name) is not None for name in names)


def register_configs() -> None:
    """Let `AutoConfig` know the model types."""
    for family in FAMILIES:
        AutoConfig.register(PREFIX + family, config_class(family), exist_ok=True)


@cache
def register_model(family: str) -> None:
    """Let `AutoModelForCausalLM` know the model of a family, and how its weights are named in files."""
    tokenizer = TOKENIZER_MAPPING.get(CONFIG_MAPPING[family], None)
    for one in tokenizer if isinstance(tokenizer, tuple) else (tokenizer,):
        if one is not None:
            AutoTokenizer.register(config_class(family), fast_tokenizer_class=one, exist_ok=True)
    own = model_class(family).__name__
    for theirs, ours in ((family, PREFIX + family), (own.removeprefix("Heedful"), own)):
        mapping = get_checkpoint_conversion_mapping(theirs)
        if mapping is not None:
            register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
    AutoModelForCausalLM.register(config_class(family), model_class(family), exist_ok=True)


def architecture_of(family: str) -> str:
    """The name of `model_class(family)`, as in config.json; the module that has the source's loads slowly."""
    return f"Heedful{MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping.get(family)}"


def class_named(name: str) -> Any:
    """A config or model class by its name, or None."""
    for family in FAMILIES:
        if name == config_class(family).__name__:
            return config_class(family)
        if name == architecture_of(family):
            return model_class(family)
    return None
