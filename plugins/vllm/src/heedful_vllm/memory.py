"""The engine's blocks as heedful's caches: a block holds what `EvictingCache`s of a request hold."""

from typing import Any

import torch
from torch import Tensor

from heedful.attention.cache import KVCache
from heedful.attention.eviction import EvictingCache
from heedful.attention.eviction.bound import LossBound
from heedful.attention.tokens import Layer, Tokens
from heedful_vllm.batch import Batch, Piece
from heedful_vllm.layout import NEXT, Layout


class Held:
    """One layer of one block: its tensors, and the cache that works on them."""

    def __init__(self, cache: EvictingCache, places: list[Any], block: Tensor) -> None:
        self.cache = cache
        self.views = {(place.group, place.name): place.of(block) for place in places}
        self.next = self.views.pop((NEXT, NEXT))

    def attend(self, layer: Layer, tokens: Tokens, seen: int) -> Tensor:
        """Let the next tokens of the request attend; what is held afterwards is in the block."""
        cache, slots = self.cache, self.cache.slots
        if seen == 0:
            cache.reset()
        else:
            for (group, name), view in self.views.items():
                getattr(slots, group)[name] = view
            cache.seen = seen
            if cache.rule.threshold is not None:  # what was lost is not counted here
                cache._bound = LossBound.nothing_lost(slots.positions.shape[0], torch.float32, slots.positions.device)
            # the number is in the block, with all else: it may have been copied here
            cache._next_slot = self.next if tokens.length == 1 and int(self.next[0, 0]) >= 0 else None
        out = cache.attend(layer, tokens)
        for (group, name), view in self.views.items():
            now = getattr(slots, group)[name]
            if now is not view:
                view.copy_(now)
        if cache._next_slot is None:
            self.next.fill_(-1)
        else:
            self.next.copy_(cache._next_slot)
        slots.clear()
        return out


class LayerMemory(KVCache):
    """One layer of all requests of a batch, which stands for the cache of one row of tokens."""

    def __init__(self, blocks: "Blocks", index: int) -> None:
        super().__init__()
        self.blocks, self.index = blocks, index

    def attend(self, layer: Layer, tokens: Tokens) -> Tensor:
        """(1, H, T, E), of the tokens of all requests."""
        batch = self.blocks.batch
        if batch is None:  # the engine tries how much memory a pass takes
            _, v = layer.keys_values(tokens.memory)
            return tokens.q.new_zeros(*tokens.q.shape[:3], v.shape[-1])
        parts, end = [], 0
        for piece in batch.pieces:
            held = self.blocks.held(piece, self.index)
            whole = piece.length == tokens.length
            parts.append(
                held.attend(layer, tokens if whole else tokens.part(piece.start, piece.length), piece.seen)
            )
            end = piece.start + piece.length
        if end < tokens.length:  # padded by the engine
            parts.append(parts[0].new_zeros(*parts[0].shape[:2], tokens.length - end, parts[0].shape[-1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    # Of one request there is nothing to say here.

    kept = padded = nbytes = property(lambda self: 0)  # type: ignore[assignment]

    def _next_positions(self, *args: Any) -> Tensor:
        raise NotImplementedError("the engine gives positions")

    def reset(self) -> None:
        """Nothing: requests come and go in blocks."""

    def _attend(self, layer: Layer, tokens: Tokens) -> Tensor:
        raise NotImplementedError

    def _snapshot(self) -> Any:
        raise NotImplementedError

    def _change_rows(self, change: Any) -> None:
        raise NotImplementedError


class Blocks:
    """The memory that the engine allotted, block by block.

    Args:
        model: heedful's model.
        eviction: who goes, with a bound for every layer.
        layout: of one block.
    """

    def __init__(self, model: Any, eviction: Any, layout: Layout) -> None:
        self.model, self.eviction, self.layout = model, eviction, layout
        self.pages: Tensor | None = None
        """(blocks, bytes) uint8."""
        self.batch: Batch | None = None
        """What the current forward pass reads."""
        self._held: dict[int, list[Held]] = {}

    def bind(self, pages: Tensor) -> None:
        """Take the memory."""
        self.pages = pages
        self._held.clear()

    def held(self, piece: Piece, layer: int) -> Held:
        """One layer of a request."""
        found = self._held.get(piece.block)
        if found is None:
            assert self.pages is not None
            block = self.pages[piece.block]
            layers = self.model.new_cache(self.eviction).layers
            found = [
                Held(one.memory, places, block)
                for one, places in zip(layers, self.layout.layers, strict=True)
            ]
            self._held[piece.block] = found
        return found[layer]
