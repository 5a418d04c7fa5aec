"""The families of models that can be converted, and their classes: the source's own, with another attention."""

from functools import cache
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

PREFIX = "heedful_"
FAMILIES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
    *("gemma2", "gemma3_text", "olmo2", "phi3", "gpt2", "gpt_neox"),
)
"""Their model types in transformers; SmolLM is a llama, Pythia a gpt_neox."""


def family_of(model_type: str) -> str | None:
    """The family of a converted model's type, None for any other."""
    family = model_type.removeprefix(PREFIX)
    return family if family in FAMILIES and model_type.startswith(PREFIX) else None


@cache
def config_class(family: str) -> Any:
    """`HeedfulLlamaConfig` for "llama": the source's config under a model type of its own."""
    source = CONFIG_MAPPING[family]

    def made(cls: Any, *args: Any, **kwargs: Any) -> Any:
        register_model(family)  # who has a config wants its model next
        return super(own, cls).__new__(cls)

    own: Any = type(
        f"Heedful{source.__name__}",
        (source,),
        {
            "__module__": "heedful.hf.converted",
            "__doc__": f"The config of a converted {family} model: `{source.__name__}`, and `heedful`.",
            "model_type": PREFIX + family,
            "__new__": made,
        },
    )
    return own


@cache
def model_class(family: str) -> Any:
    """`HeedfulLlamaForCausalLM` for "llama": the source's model with converted attention."""
    from heedful.hf.converted.model import ConvertedGenerationMixin

    source: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    return type(
        f"Heedful{source.__name__}",
        (ConvertedGenerationMixin, source),
        {
            "__module__": "heedful.hf.converted",
            "__doc__": f"`{source.__name__}` with the attention that its config's `heedful` says.",
            "config_class": config_class(family),
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
    own = model_class(family).__name__
    for theirs, ours in ((family, PREFIX + family), (own.removeprefix("Heedful"), own)):
        mapping = get_checkpoint_conversion_mapping(theirs)
        if mapping is not None:
            register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
    AutoModelForCausalLM.register(config_class(family), model_class(family), exist_ok=True)


def class_named(name: str) -> Any:
    """A config or model class by its name, or None."""
    for family in FAMILIES:
        if name == config_class(family).__name__:
            return config_class(family)
        source = MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping.get(
            family
        )  # its name alone: the module loads slowly
        if name == f"Heedful{source}":
            return model_class(family)
    return None
