"""Names that transformers has changed."""

from typing import Any

from heedful.hf.version import VERSION

CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
"""What `generate` and outputs call the cache in the installed transformers."""


def output_cache(output: Any) -> Any:
    """The cache in what a model or `generate` returned."""
    return output.get(CACHE)


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache given under either name.

    Raises:
        ValueError: if it was given under both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("give the cache once: `cache` and `past_key_values` are two names of one argument")
    return cache if past_key_values is None else past_key_values
