"""All contact with transformers' cache API: its names in front, `LayerCache` behind."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from heedful.attention.cache import KVCache
from heedful.attention.eviction import Eviction
from heedful.attention.eviction.settings import AnyBudget


class _CacheLayer(CacheLayerMixin):
    """One layer as `generate` sees it."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, memory: KVCache) -> None:
        super().__init__()
        self.memory = memory

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage appears with the first tokens."""

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "a HeedfulCache is filled by heedful's attention, not through update(keys, values); "
            "other models need their own cache"
        )

    def get_seq_length(self) -> int:
        """Tokens seen, padding included; not the tokens kept."""
        return self.memory.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.20

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.memory.seen + query_length, 0

    def reset(self) -> None:
        self.memory.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.memory.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.memory.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.memory.reorder(indices)

    @property
    def record_past(self) -> bool:
        """Whether tokens can be taken back with `crop`."""
        return self.memory.recording

    @record_past.setter
    def record_past(self, on: bool) -> None:
        self.memory.recording = on

    def activate_past_recording(self) -> None:
        """From here on tokens can be taken back, until the next `crop`."""
        self.memory.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; transformers gives their number with a minus sign."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove with a minus sign, got {tokens_to_remove}"
            )
        self.memory.crop(-tokens_to_remove)


class ConvertedCacheLayer(_CacheLayer):
    """One layer of a converted model: the source's code calls `update`, and then our attention function attends."""

    expected = False
    """Whether a converted attention module is about to call `update`."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """The new keys and values as they are: the memory takes them when they attend."""
        if not self.expected:
            super().update()
        self.expected = False
        return args[:2]


@dataclass(frozen=True)
class CacheStats:
    """What a `HeedfulCache` has been through."""

    evictions: list[int]
    """Tokens evicted per layer, over all rows."""
    peak_bytes: int
    """The most bytes that keys, values and their books ever took at once, the piece being read included."""
    tokens_per_second: float | None
    """Tokens per row and second after the first forward pass, which reads the prompt; None before a second."""


class HeedfulCache(Cache):
    """The key/value cache of a heedful model: one `LayerCache` per layer.

    Args:
        n_layers: the number of layers.
        kv_budget: tokens held per layer: a number, a list with one per layer, or "full"; or an `Eviction`.
        kv_policy: which token goes when a layer is full (`heedful.attention.eviction`); default "selective".
        kv_evict_every: evict only at positions divisible by it; up to kv_evict_every - 1 more tokens are held.
        kv_threshold: votes F above which a token goes, whatever the budget; `forgotten` then bounds what was lost.
        kv_grace: the newest tokens that never go, the one that has just arrived included.
        kv_first: the first tokens that never go.
        windows: per layer, its sliding window, else None.
        own: whether layers with a window keep their own attention and cache; else the window is part of the rule.
        converted: for a converted model, whose layers hand over keys and values by `update`.

    Raises:
        ValueError: for what `Eviction` refuses, or a list of the wrong length.
    """

    def __init__(
        self,
        n_layers: int,
        kv_budget: AnyBudget = "full",
        kv_policy: str | None = None,
        kv_evict_every: int | None = None,
        kv_threshold: float | None = None,
        kv_grace: int | None = None,
        kv_first: int | None = None,
        *,
        windows: Sequence[int | None] | None = None,
        own: bool = True,
        converted: bool = False,
    ) -> None:
        self.eviction = Eviction.of(kv_budget, kv_policy, kv_evict_every, kv_threshold, kv_grace, kv_first)
        layer = ConvertedCacheLayer if converted else _CacheLayer
        caches = self.eviction.layer_caches(n_layers, None if own else windows)
        layers: list[Any] = [layer(memory) for memory in caches]
        for i, window in enumerate((windows or []) if own else []):
            if window is not None:
                layers[i] = DynamicSlidingWindowLayer(sliding_window=window)
        super().__init__(layers=layers)
        self._clock: list[tuple[int, float]] = []

    def __repr__(self) -> str:
        holds = f"{self.eviction}" if self.eviction.evicts else "everything"
        kept = ", ".join(map(str, self.kept))
        counts = f"{self.seen} tokens seen, {kept} kept, {self.nbytes:,} bytes"
        layers = f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        return f"HeedfulCache({layers}, {counts}; {holds})"

    @property
    def memories(self) -> list[KVCache]:
        """The cache of each layer, but for those with a sliding window."""
        return [layer.memory for layer in self.layers if isinstance(layer, _CacheLayer)]

    @property
    def seen(self) -> int:
        """Tokens the model has read, padding included."""
        return self.memories[0].seen

    @property
    def kept(self) -> list[int]:
        """Tokens held per layer, the maximum over the rows; without a budget padding counts."""
        return [memory.kept for memory in self.memories]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that exist."""
        return sum(memory.nbytes for memory in self.memories)

    @property
    def forgotten(self) -> list[Tensor]:
        """Per layer (B,), an upper bound on the attention mass lost to evictions (`EvictingCache.forgotten`).

        Raises:
            ValueError: if the cache has no threshold.
        """
        return [memory.forgotten for memory in self.memories]

    @property
    def stats(self) -> CacheStats:
        """What the cache has been through."""
        evictions = [memory.evicted for memory in self.memories]
        tokens_per_second = None
        if len(self._clock) > 1:
            (first, start), (last, end) = self._clock[0], self._clock[-1]
            tokens_per_second = (last - first) / (end - start)
        return CacheStats(evictions, sum(memory.peak_bytes for memory in self.memories), tokens_per_second)

    def reset(self) -> None:
        """Forget everything, `stats` included."""
        super().reset()
        self._clock.clear()

    def tick(self) -> None:
        """Note the time after a forward pass, for `stats`."""
        del self._clock[1:]  # the first, which read the prompt, and the last are what counts
        self._clock.append((self.seen, time.perf_counter()))


def check_cache(cache: object, n_layers: int) -> HeedfulCache:
    """Raise unless `cache` is one of ours, of the right depth.

    Other caches keep keys and values only: selection would silently be lost in them.
    """
    if not isinstance(cache, HeedfulCache):
        raise TypeError(
            f"past_key_values must be a heedful.hf.HeedfulCache, got {type(cache).__name__}; leave it out "
            f"and generate() makes one. Static, paged, offloaded and quantized caches are not supported."
        )
    if len(cache.layers) != n_layers:
        raise ValueError(f"the cache has {len(cache.layers)} layers, the model {n_layers}; make a new one")
    return cache
