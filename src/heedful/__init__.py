"""heedful: attention that simulates more and keeps less.

SAS (Simulated Attention Score) and Selective Attention for PyTorch. `import heedful` is fast: names load
their module on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "heedful.ops": (
        "aggregate_heads",
        "memory_share",
        "rope",
        "selective_attention",
        "simulate_features",
        "simulate_heads",
        "unmasked_count",
    ),
    "heedful.attention": (
        "Attention",
        "AttentionConfig",
        "GroupedQueryAttention",
        "LayerCache",
        "SASAttention",
        "SASCore",
        "Score",
        "ScoreConfig",
        "available",
        "build",
        "configure",
        "option",
        "param_groups",
        "register_attention",
        "register_score",
    ),
    "heedful.decoder": ("Decoder", "DecoderConfig"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:
    from heedful.attention import *  # noqa: F403
    from heedful.decoder import Decoder, DecoderConfig  # noqa: F401
    from heedful.ops import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name in ("ops", "attention", "decoder", "testing"):
        return importlib.import_module(f"heedful.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'heedful' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
