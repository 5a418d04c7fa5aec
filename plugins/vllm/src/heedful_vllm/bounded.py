"""A model of heedful's over many requests at once; knows nothing of the engine."""

from typing import Any

import torch
from torch import Tensor

from heedful.attention.eviction import Eviction
from heedful.hf.cache import HeedfulCache
from heedful_vllm.batch import Batch
from heedful_vllm.layout import bounded, layout_of, run
from heedful_vllm.memory import Blocks, LayerMemory


class Bounded:
    """A model whose requests have a block of memory each.

    Args:
        model: trained with heedful, or converted.
        asked: who goes; layers without a bound hold the longest request.
        longest: tokens of the longest request.

    Raises:
        ValueError: if a layer cannot be bounded, or its score and the policy do not go together.
    """

    def __init__(self, model: Any, asked: Eviction, longest: int) -> None:
        self.model, self.evicts = model, asked.evicts
        n_layers = len(model.new_cache(asked).layers)
        self.eviction = bounded(asked, n_layers, longest)
        self.layout = layout_of(model, self.eviction)
        self.blocks = Blocks(model, self.eviction, self.layout)
        self._cache = HeedfulCache(n_layers, converted=hasattr(model.config, "heedful"))
        for i, layer in enumerate(self._cache.layers):
            layer.memory = LayerMemory(self.blocks, i)  # type: ignore[attr-defined]

    @property
    def budgets(self) -> list[int]:
        """Tokens that each layer holds at most."""
        return [budget or 0 for budget in self.eviction.budgets(len(self.layout.layers))]

    def forward(self, ids: Tensor, positions: Tensor, batch: Batch | None) -> Tensor:
        """(N,) tokens of all requests, side by side, to (N, C); no batch: nothing is remembered, for a trial."""
        self.blocks.batch = batch
        return run(self.model, ids[None], self._cache, positions[None])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, C) to (n, vocabulary)."""
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def held(self, block: int) -> list[int]:
        """Tokens that each layer holds in a block, counted there; the most of its key heads."""
        found = []
        assert self.blocks.pages is not None
        for places in self.layout.layers:
            place = next(place for place in places if place.name == "positions")
            found.append(int((place.of(self.blocks.pages[block]) >= 0).sum(-1).max()))
        return found
