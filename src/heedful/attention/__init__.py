"""The forms, one file each, and what they share. A new form is a file and an import line here."""

from heedful.attention.base import Attention
from heedful.attention.build import build, configure
from heedful.attention.cache import KVCache, LayerCache
from heedful.attention.config import AttentionConfig, ScoreConfig, option
from heedful.attention.eviction import EvictingCache, Eviction
from heedful.attention.params import param_groups
from heedful.attention.registry import available, register_attention, register_score
from heedful.attention.score import EvictableScore, Score

# The order here is the order of `heedful ls`.
from heedful.attention.gqa import GroupedQueryAttention  # isort: skip
from heedful.attention.sas import SASAttention, SASCore  # isort: skip
from heedful.attention.sas_linear import SASLinearAttention  # isort: skip
from heedful.attention.mla import LatentAttention  # isort: skip
from heedful.attention.tpa import TensorProductAttention  # isort: skip
from heedful.attention.softmax import SoftmaxScore  # isort: skip
from heedful.attention.selective import SelectiveScore  # isort: skip
from heedful.attention.gated import GatedScore  # isort: skip
from heedful.attention.forgetting import ForgettingScore  # isort: skip
from heedful.attention.talking_heads import TalkingHeadsScore  # isort: skip
from heedful.attention.sigmoid import SigmoidScore  # isort: skip

__all__ = [
    "Attention",
    "AttentionConfig",
    "EvictableScore",
    "EvictingCache",
    "Eviction",
    "ForgettingScore",
    "GatedScore",
    "GroupedQueryAttention",
    "KVCache",
    "LatentAttention",
    "LayerCache",
    "SASAttention",
    "SASCore",
    "SASLinearAttention",
    "Score",
    "ScoreConfig",
    "SelectiveScore",
    "SigmoidScore",
    "SoftmaxScore",
    "TalkingHeadsScore",
    "TensorProductAttention",
    "available",
    "build",
    "configure",
    "option",
    "param_groups",
    "register_attention",
    "register_score",
]
