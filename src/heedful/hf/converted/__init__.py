"""Converted checkpoints: transformers' own blocks with heedful's attention in them.

Importing this registers a model type per family (`heedful_llama`, ...) with transformers' Auto classes. The classes
of a family, such as `HeedfulLlamaForCausalLM`, are made when they are first asked for.
"""

from typing import Any

from heedful.hf.converted.families import class_named, register_configs
from heedful.hf.converted.known import FAMILIES

__all__ = ["FAMILIES"]

register_configs()


def __getattr__(name: str) -> Any:
    found = class_named(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
