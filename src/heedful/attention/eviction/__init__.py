"""Caches that evict: what is asked for, the cache of slots, and one file per policy."""

from heedful.attention.eviction.cache import EvictingCache
from heedful.attention.eviction.policy import POLICIES, Policy, get_policy, register_policy
from heedful.attention.eviction.settings import Eviction
from heedful.ops.eviction import eviction_mask

from heedful.attention.eviction.h2o import H2OPolicy  # isort: skip
from heedful.attention.eviction.keydiff import KeyDiffPolicy  # isort: skip
from heedful.attention.eviction.random import RandomPolicy  # isort: skip
from heedful.attention.eviction.selective import SelectivePolicy  # isort: skip
from heedful.attention.eviction.snapkv import SnapKVPolicy  # isort: skip
from heedful.attention.eviction.streaming import StreamingPolicy  # isort: skip
from heedful.attention.eviction.tova import TOVAPolicy  # isort: skip

__all__ = [
    "POLICIES",
    "EvictingCache",
    "Eviction",
    "H2OPolicy",
    "KeyDiffPolicy",
    "Policy",
    "RandomPolicy",
    "SelectivePolicy",
    "SnapKVPolicy",
    "StreamingPolicy",
    "TOVAPolicy",
    "eviction_mask",
    "get_policy",
    "register_policy",
]
