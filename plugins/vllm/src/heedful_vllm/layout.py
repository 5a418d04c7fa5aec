"""How the memory of one request lies in one block of the engine: the slots of all layers, side by side."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.attention.eviction import EvictingCache, Eviction

ALIGN = 64
"""Bytes that every tensor's place is a multiple of."""
NEXT = "next"
"""The slot that the next token takes."""


class Place(NamedTuple):
    """One tensor of one layer in the block."""

    group: str
    """"tensors", "state" or "book" of `Slots`, or "next"."""
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def of(self, block: Tensor) -> Tensor:
        """The tensor in a block of bytes."""
        return block[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)

    def of_all(self, blocks: Tensor) -> Tensor:
        """The tensors in all of (N, bytes), the blocks in front of the first axis if that has one row."""
        own = blocks[:, self.offset : self.offset + self.nbytes].view(self.dtype)
        return own.unflatten(1, self.shape[1:] if self.shape[0] == 1 else self.shape)


class Layout:
    """The places of all layers.

    Args:
        caches: what a model made for one request after a forward pass: an `EvictingCache` per layer.
    """

    def __init__(self, caches: list[EvictingCache]) -> None:
        self.layers: list[list[Place]] = []
        end = 0
        for cache in caches:
            places = []
            for group in ("tensors", "state", "book"):
                for name, tensor in getattr(cache.slots, group).items():
                    places.append(Place(group, name, end, tuple(tensor.shape), tensor.dtype))
                    end += -(-places[-1].nbytes // ALIGN) * ALIGN
            rows = cache.positions.shape[0]
            places.append(Place(NEXT, NEXT, end, (rows, 1), torch.long))
            end += -(-places[-1].nbytes // ALIGN) * ALIGN
            self.layers.append(places)
        self.nbytes = end
        """Of one request."""


def bounded(eviction: Eviction, n_layers: int, longest: int) -> Eviction:
    """With a bound for every layer: one that has none holds the longest request that the engine admits."""
    if not eviction.evicts:  # nobody ever goes, and any model may be told so by age
        eviction = Eviction.of({**eviction.to_dict(), "policy": "streaming"})
    budgets = [longest if budget is None else min(budget, longest) for budget in eviction.budgets(n_layers)]
    same = len(set(budgets)) == 1
    return Eviction.of({**eviction.to_dict(), "budget": budgets[0] if same else budgets})


@torch.no_grad()
def layout_of(model: Any, eviction: Eviction) -> Layout:
    """The layout of a model's memory, by letting it read a token.

    Raises:
        ValueError: if a layer cannot be bounded, or its score and the policy do not go together.
    """
    cache = model.new_cache(eviction)
    caches = [getattr(layer, "memory", None) for layer in cache.layers]
    if not all(isinstance(memory, EvictingCache) for memory in caches):
        raise ValueError(
            "heedful: layers with a sliding window beside layers without (Gemma) are not served yet; they keep "
            "transformers' own cache"
        )
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    run(model, ids, cache, torch.zeros_like(ids))
    return Layout(caches)  # type: ignore[arg-type]


def run(model: Any, ids: Tensor, cache: Any, positions: Tensor) -> Tensor:
    """(1, T) token ids to the last hidden states, (1, T, C)."""
    from heedful.hf.names import CACHE

    given: dict[str, Any] = {CACHE: cache}
    return model.base_model(ids, position_ids=positions, use_cache=True, **given).last_hidden_state
