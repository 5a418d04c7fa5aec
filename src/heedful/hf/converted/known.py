"""Which families of models can be converted."""

import importlib
from types import ModuleType
from typing import Any

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


def source_of(family: str) -> Any:
    """Transformers' causal language model of a family."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]


def source_module(family: str) -> ModuleType:
    """Where transformers has the family's classes."""
    return importlib.import_module(source_of(family).__module__)
