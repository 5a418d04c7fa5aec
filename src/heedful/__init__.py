"""heedful: attention that simulates more and keeps less.

SAS (Simulated Attention Score) and Selective Attention for PyTorch. `import heedful` is fast: names load
their module on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from heedful.lazy import lazy_names

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
        "EvictableScore",
        "EvictingCache",
        "Eviction",
        "GroupedQueryAttention",
        "KVCache",
        "LatentAttention",
        "LayerCache",
        "SASAttention",
        "SASCore",
        "SASLinearAttention",
        "Score",
        "ScoreConfig",
        "TensorProductAttention",
        "available",
        "build",
        "configure",
        "option",
        "param_groups",
        "register_attention",
        "register_score",
    ),
    "heedful.decoder": ("Decoder", "DecoderConfig"),
    "heedful.api": ("adapt", "compare", "convert", "load", "patch", "train"),
}
_load, __dir__ = lazy_names(__name__, _HOME)

__all__ = ["__version__", *sorted(name for names in _HOME.values() for name in names)]

if TYPE_CHECKING:
    from heedful.api import adapt, compare, convert, load, patch, train  # noqa: F401
    from heedful.attention import *  # noqa: F403
    from heedful.decoder import Decoder, DecoderConfig  # noqa: F401
    from heedful.ops import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name in ("ops", "attention", "decoder", "testing"):
        return importlib.import_module(f"heedful.{name}")
    return _load(name)
