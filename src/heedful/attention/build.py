"""Modules and configs by name."""

from typing import Any

from heedful.attention.base import Attention
from heedful.attention.config import AttentionConfig


def configure(attention: str, score: str = "softmax", **options: Any) -> AttentionConfig:
    """The config of a form: it knows `parameter_count()` and `flops_per_token(context)` already.

    Args:
        attention: a name from `available()["attention"]`.
        score: a name from `available()["score"]`.
        **options: `d_model`, `n_heads` and any field of the two configs.

    Raises:
        ValueError: for an unknown name or option (saying what it could have been), or a bad value.
    """
    return AttentionConfig.of(attention, score, **options)


def build(attention: str, score: str = "softmax", **options: Any) -> Attention:
    """A module `(B, T, C) -> (B, T, C)`: `build("sas", score="selective", d_model=64, n_heads=4)`.

    Options of the attention, of the score and of both stand side by side: `build("mha", score="forgetting",
    d_model=64, n_heads=4, gate_bias=3.0)`; `gqa` also needs `n_kv_heads`. Arguments and errors as for `configure`.
    """
    return configure(attention, score, **options).build()
