"""The engine's blocks as heedful's caches: a block holds what `EvictingCache`s of a request hold."""

from typing import Any

import torch
from torch import Tensor

from heedful.attention.base import Attention
from heedful.attention.eviction import EvictingCache
from heedful.attention.eviction.bound import LossBound
from heedful.attention.eviction.policy import Policy
from heedful.attention.selective import SelectiveScore
from heedful.attention.tokens import SELECT_K, Layer, Tokens
from heedful.hf.converted.attention import ConvertedAttention
from heedful.ops.eviction import least_needed_slot
from heedful.ops.selective.rows import RowStore, step_rows
from heedful_vllm.batch import Batch, Piece, Singles
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
            cache.seen, cache._next_slot = seen, None
            slots.arrived.fill_(seen)  # steps of several requests do not count
            if cache.rule.threshold is not None:  # what was lost is not counted here
                held = slots.positions
                cache._bound = LossBound.nothing_lost(held.shape[0], torch.float32, held.device)
        out = cache.attend(layer, tokens)
        for (group, name), view in self.views.items():
            now = getattr(slots, group)[name]
            if now is not view:
                view.copy_(now)
        self.next.copy_(self._following(layer))
        slots.clear()
        return out

    def _following(self, layer: Layer) -> Tensor:
        """The slot that goes next, as `EvictingCache` would find it then."""
        cache, slots = self.cache, self.cache.slots
        if cache._next_slot is not None:
            return cache._next_slot
        budget = cache.rule.budget
        assert budget is not None
        if cache.seen < budget:
            return torch.full_like(slots.arrived, cache.seen)
        cache._rate(layer)
        priority = cache.policy.priority(cache.scores, cache.positions, slots.arrived, budget)
        return least_needed_slot(priority, cache.positions, slots.arrived, cache.rule.grace, cache.rule.first)


class LayerMemory:
    """One layer of all requests of a batch, which stands for the cache of one row of tokens.

    Args:
        blocks: the memory of all layers.
        index: of the layer.
    """

    seen = 0
    """As of an empty cache: the engine gives positions."""
    padded = False
    measures_keys = True
    """Its tokens are those of several requests: a layer must not take one for a step of decoding."""

    def __init__(self, blocks: "Blocks", index: int) -> None:
        self.blocks, self.index = blocks, index
        self._together: bool | None = None

    def attend(self, layer: Layer, tokens: Tokens) -> Tensor:
        """(1, H, T, E), of the tokens of all requests."""
        batch = self.blocks.batch
        if batch is None:  # the engine tries how much memory a pass takes
            _, v = layer.keys_values(tokens.memory)
            return tokens.q.new_zeros(*tokens.q.shape[:3], v.shape[-1])
        if self._together is None:
            self._together = self._decodes_together(layer)
        if not self._together:
            return self._each(layer, tokens, batch.pieces)
        if not batch.longer and len(batch.singles.at) == tokens.length:
            return self._all(layer, tokens, batch.singles).permute(2, 1, 0, 3)
        out = self._each(layer, tokens, batch.longer) if batch.longer else None
        if len(batch.singles.at):
            at = batch.singles.at
            singles = self._all(layer, _columns(tokens, at), batch.singles)
            if out is None:
                out = singles.new_zeros(1, singles.shape[1], tokens.length, singles.shape[3])
            out[0, :, at] = singles[:, :, 0].transpose(0, 1)
        assert out is not None
        return out

    def _each(self, layer: Layer, tokens: Tokens, pieces: list[Piece]) -> Tensor:
        """One request after the other."""
        out: Tensor | None = None
        for piece in pieces:
            held = self.blocks.held(piece, self.index)
            if piece.length == tokens.length:
                return held.attend(layer, tokens, piece.seen)
            part = held.attend(layer, tokens.part(piece.start, piece.length), piece.seen)
            if out is None:
                out = part.new_zeros(*part.shape[:2], tokens.length, part.shape[3])
            out[:, :, piece.start : piece.start + piece.length] = part
        assert out is not None
        return out

    def _decodes_together(self, layer: Layer) -> bool:
        """Whether a step of this layer is what `_all` does: the plain rule, votes, keys as they are remembered."""
        cache = self.blocks.empty[self.index]
        rule, policy, score = cache.rule, cache.policy, layer.score
        plain_rule = rule.evict_every == 1 and rule.threshold is None and rule.window is None
        by_votes = policy.ranks_by == "soft_mask" and type(policy).priority is Policy.priority
        as_kept = type(layer).keys_values in (Attention.keys_values, ConvertedAttention.keys_values)
        return (
            plain_rule
            and by_votes
            and as_kept
            and type(score) is SelectiveScore
            and score.config.impl == "auto"
            and score.selectors == 1
        )

    def _all(self, layer: Layer, tokens: Tokens, singles: Singles) -> Tensor:
        """(n, H, 1, E): one token of each of n requests, written in place of the one that goes."""
        store, rule = self.blocks.store(self.index), self.blocks.empty[self.index].rule
        select = None
        if tokens.select_q is not None:
            select = tokens.select_q.permute(2, 1, 0, 3), tokens.memory[SELECT_K][0, 0]
        return step_rows(
            store,
            singles.blocks,
            singles.seen,
            tokens.q.permute(2, 1, 0, 3),
            *(tokens.memory[name][0].transpose(0, 1) for name in ("k", "v")),
            layer.scale,
            grace=rule.grace,
            first=rule.first,
            select=select,
            own_votes=None if tokens.own_votes is None else tokens.own_votes[0, 0],
            subtract=layer.score.subtracts,  # type: ignore[attr-defined]
        )


class Blocks:
    """The memory that the engine allotted, block by block.

    Args:
        model: heedful's model.
        eviction: who goes, with a bound for every layer.
        layout: of one block.
    """

    def __init__(self, model: Any, eviction: Any, layout: Layout) -> None:
        self.model, self.eviction, self.layout = model, eviction, layout
        self.empty = self._caches()
        """A cache for each layer that nothing is in."""
        self.pages: Tensor | None = None
        """(blocks, bytes) uint8."""
        self.batch: Batch | None = None
        """What the current forward pass reads."""
        self._held: dict[int, list[Held]] = {}
        self._stores: dict[int, RowStore] = {}

    def _caches(self) -> list[EvictingCache]:
        return [layer.memory for layer in self.model.new_cache(self.eviction).layers]

    def bind(self, pages: Tensor) -> None:
        """Take the memory."""
        self.pages = pages
        self._held.clear()
        self._stores.clear()

    def store(self, layer: int) -> RowStore:
        """One layer of all blocks, where each has one row and is ranked by votes."""
        if layer not in self._stores:
            assert self.pages is not None
            own = {place.name: place.of_all(self.pages) for place in self.layout.layers[layer]}
            votes, following = own["soft_mask"][:, 0], own[NEXT][:, 0]
            self._stores[layer] = RowStore(
                own["k"], own["v"], votes, own["positions"], following, own.get(SELECT_K)
            )
        return self._stores[layer]

    def held(self, piece: Piece, layer: int) -> Held:
        """One layer of a request."""
        found = self._held.get(piece.block)
        if found is None:
            assert self.pages is not None
            block, places = self.pages[piece.block], self.layout.layers
            found = [Held(cache, own, block) for cache, own in zip(self._caches(), places, strict=True)]
            self._held[piece.block] = found
        return found[layer]


def _columns(tokens: Tokens, at: Tensor) -> Tokens:
    """Some tokens of a row."""
    memory = {name: new.index_select(2, at) for name, new in tokens.memory.items()}
    select_q = None if tokens.select_q is None else tokens.select_q.index_select(2, at)
    own_votes = None if tokens.own_votes is None else tokens.own_votes.index_select(2, at)
    x, q = tokens.x.index_select(1, at), tokens.q.index_select(2, at)
    return Tokens(x, q, memory, None, None, select_q, own_votes)
