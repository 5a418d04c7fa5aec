"""Taking tokens back: a cache that forgot its last tokens is one that never saw them."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful.attention import Attention, LayerCache, build
from heedful.attention.eviction import EvictingCache
from heedful.ops.eviction import least_needed_slot

Make = Callable[[], LayerCache]

LAYERS: dict[str, dict[str, Any]] = {
    "mha-softmax": {"attention": "mha", "score": "softmax"},
    "mha-selective": {"attention": "mha", "score": "selective"},
    "gqa-selective": {"attention": "gqa", "score": "selective", "n_kv_heads": 2},
    "sas-selective": {"attention": "sas", "score": "selective"},
    "added-selector": {"attention": "gqa", "score": "selective", "n_kv_heads": 2, "selector": "added"},
    "selectors-apart": {
        **{"attention": "gqa", "score": "selective", "n_kv_heads": 2},
        **{"selector": "added", "selectors": 2, "subtract": False},
    },
    "sas-compact": {"attention": "sas", "score": "selective", "cache": "compact"},
}
RULES: dict[str, dict[str, Any]] = {
    "selective": {"budget": 5},
    "selective every 2": {"budget": 4, "evict_every": 2},
    "selective with grace": {"budget": 6, "grace": 3, "first": 2},
    "selective every 3": {"budget": 3, "evict_every": 3},
    "threshold": {"budget": None, "threshold": 3.0, "block": 3},
    "threshold every 2": {"budget": None, "threshold": 2.0, "evict_every": 2, "block": 2},
    "nothing ever": {"budget": None, "threshold": 1e6, "block": 2},
    "block of one": {"budget": None, "threshold": 1e6, "block": 1},
    "budget and threshold": {"budget": 6, "threshold": 2.0},
    "budget and threshold every 3": {"budget": 4, "threshold": 2.0, "evict_every": 3},
    "streaming": {"budget": 7, "policy": "streaming"},
    "random every 2": {"budget": 4, "policy": "random", "evict_every": 2},
    "h2o": {"budget": 5, "policy": "h2o"},
    "h2o every 3": {"budget": 4, "policy": "h2o", "evict_every": 3},
    "tova": {"budget": 5, "policy": "tova"},
    "tova with grace": {"budget": 5, "policy": "tova", "grace": 2, "first": 2},
    "tova every 2": {"budget": 4, "policy": "tova", "evict_every": 2},
}
CASES = [(layer, None) for layer in LAYERS] + [("mha-selective", rule) for rule in RULES]
CASES += [(layer, "budget and threshold") for layer in ("gqa-selective", "sas-selective", "sas-compact")]
CASES += [(layer, "selective with grace") for layer in ("added-selector", "selectors-apart")]
CASES += [("mha-softmax", "h2o"), ("mha-softmax", "streaming"), ("sas-compact", "tova")]


def layer_of(name: str) -> Attention:
    torch.manual_seed(1)
    return build(**LAYERS[name], d_model=16, n_heads=4, init_logit_std=2.0).double().eval()


def cache_of(rule: str | None) -> LayerCache:
    return LayerCache(block=3) if rule is None else EvictingCache(**RULES[rule])


def held_tensors(cache: LayerCache) -> dict[str, Tensor]:
    """Everything a cache remembers of the tokens it holds, whatever the slots they are in."""
    facts: dict[str, Tensor] = {"seen": torch.tensor(cache.seen), "kept": torch.tensor(cache.kept)}
    if not cache.seen:
        return facts
    if not isinstance(cache, EvictingCache):
        facts |= {f"storage {name}": cache[name] for name in cache._storage}
        return facts | {f"mask {n}": t for n, t in cache.masks.items()} | cache.state
    facts["evicted"], facts["arrived"] = torch.tensor(cache.evicted), cache.slots.arrived
    if cache.rule.threshold is not None:
        facts["forgotten"] = cache.forgotten
    order = torch.where(cache.positions < 0, 10**6, cache.positions).argsort(dim=-1, stable=True)
    by_slot = cache.slots.held() | cache.slots.state | {"positions": cache.positions}
    if cache.policy.ranks_by is None:
        by_slot["scores"] = cache.scores
    for row, places in enumerate(order):
        n = int((cache.positions[row] >= 0).sum())
        for name, tensor in by_slot.items():
            axis = 1 if tensor.ndim == 4 else tensor.ndim - 2
            facts[f"{name} of row {row}"] = tensor[row].index_select(axis, places[:n])
    return facts


def same(one: LayerCache, other: LayerCache) -> None:
    ours, theirs = held_tensors(one), held_tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, name=name: f"{name}: {m}")


class Text:
    """Random tokens of two rows, some of them padding, read by a cache piece by piece."""

    def __init__(self, layer: Attention, seed: int, padded: bool) -> None:
        self.layer, self.draw, self.padded = layer, random.Random(seed), padded
        self.generator = torch.Generator().manual_seed(seed)
        self.x = torch.zeros(2, 0, 16, dtype=torch.float64)
        self.real = torch.ones(2, 0, dtype=torch.bool)

    def extend(self, n: int) -> None:
        x = torch.randn(2, n, 16, dtype=torch.float64, generator=self.generator)
        real = torch.ones(2, n, dtype=torch.bool)
        if self.padded:
            real = torch.rand(2, n, generator=self.generator) < 0.7
        self.x, self.real = torch.cat((self.x, x), dim=1), torch.cat((self.real, real), dim=1)

    def read(self, cache: LayerCache, start: int, end: int) -> Tensor:
        with torch.no_grad():
            mask = self.real[:, start:end] if self.padded else None
            return self.layer(self.x[:, start:end], key_mask=mask, cache=cache)

    def read_pieces(self, cache: LayerCache) -> Tensor:
        """What follows the tokens that the cache has seen, in pieces of random length; the outputs."""
        outs = []
        while cache.seen < self.x.shape[1]:
            end = min(self.x.shape[1], cache.seen + self.draw.choice([1, 1, 2, 3, 4, 5, 6]))
            outs.append(self.read(cache, cache.seen, end))
        return torch.cat(outs, dim=1)

    def forget(self, n: int) -> None:
        self.x, self.real = self.x[:, : self.x.shape[1] - n], self.real[:, : self.real.shape[1] - n]


@pytest.mark.parametrize(("name", "rule"), CASES, ids=[f"{name}-{rule}" for name, rule in CASES])
@given(seed=st.integers(0, 10**6), padded=st.booleans())
@settings(max_examples=4)
def test_a_cropped_cache_never_saw_the_tokens(name: str, rule: str | None, seed: int, padded: bool):
    text, cache = Text(layer_of(name), seed, padded), cache_of(rule)
    draw = text.draw
    if draw.random() < 0.5:  # something that is never taken back
        text.extend(draw.randint(1, 9))
        text.read_pieces(cache)
    cache.recording = True
    for _ in range(3):
        text.extend(draw.randint(1, 9))
        text.read_pieces(cache)
        recorded = cache.recorded
        n = draw.choice([0, 1, recorded, draw.randint(0, recorded)])
        cache.crop(n)
        text.forget(n)
        fresh = cache_of(rule)
        if text.x.shape[1]:
            text.read(fresh, 0, text.x.shape[1])
        same(cache, fresh)
        text.extend(draw.randint(1, 6))
        out = text.read_pieces(cache)
        real = text.real[:, -out.shape[1] :]
        torch.testing.assert_close(out[real], text.read_pieces(fresh)[real])
        same(cache, fresh)


@pytest.mark.parametrize("rule", RULES)
def test_whole_rollback_restores_every_slot(rule: str):
    """Not only what is attended to: storage, votes and books are what they were, bit for bit."""
    text, cache = Text(layer_of("mha-selective"), 7, padded=False), EvictingCache(**RULES[rule])
    text.extend(9)
    text.read_pieces(cache)
    slots = cache.n_slots

    def everything() -> dict[str, Tensor]:
        """All tensors; where there is no budget, of the slots there were before."""
        tensors = {name: t for group in cache.slots.groups for name, t in group.items()}
        if cache._bound is not None:
            tensors |= cache._bound._asdict()
        axes = {name: 2 if t.ndim == 4 else t.ndim - 1 for name, t in tensors.items()}
        return {n: t.narrow(axes[n], 0, min(slots, t.shape[axes[n]])).clone() for n, t in tensors.items()}

    before = everything()
    cache.recording = True
    text.extend(14)
    text.read_pieces(cache)
    assert any(not torch.equal(before[name], tensor) for name, tensor in everything().items())
    cache.crop(14)
    after = everything()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    assert cache.seen == 9


@pytest.mark.parametrize(
    "rule", [None, "selective", "threshold", "h2o"], ids=["all", "selective", "threshold", "h2o"]
)
def test_crop_beyond_what_was_recorded(rule: str | None):
    text, cache = Text(layer_of("mha-selective"), 3, padded=False), cache_of(rule)
    text.extend(4)
    text.read_pieces(cache)
    with pytest.raises(ValueError, match=r"cannot forget 1 tokens, 0 are recorded; set recording = True"):
        cache.crop(1)
    cache.recording = True
    text.extend(5)
    text.read_pieces(cache)
    before = {name: tensor.clone() for name, tensor in held_tensors(cache).items()}
    with pytest.raises(ValueError, match=r"cannot forget 6 tokens, 5 are recorded"):
        cache.crop(6)
    after = held_tensors(cache)
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    cache.crop(5)  # what was recorded still is
    fresh = cache_of(rule)
    text.read(fresh, 0, 4)
    same(cache, fresh)


@pytest.mark.parametrize("rule", [None, "selective", "threshold"], ids=["all", "selective", "threshold"])
def test_the_record_is_dropped(rule: str | None):
    """By `crop`, `reorder`, `repeat`, `reset`, and by tokens that are read unrecorded."""
    layer = layer_of("mha-selective")

    def recorded() -> tuple[Text, LayerCache]:
        text, cache = Text(layer, 5, padded=False), cache_of(rule)
        cache.recording = True
        text.extend(6)
        text.read(cache, 0, 2)
        text.read(cache, 2, 3)
        text.read(cache, 3, 6)
        assert cache.recorded == 6
        return text, cache

    def unrecorded(text: Text, cache: LayerCache) -> None:
        cache.recording = False
        text.extend(1)
        text.read_pieces(cache)

    ways: dict[str, Callable[[Text, LayerCache], Any]] = {
        "crop nothing": lambda _, cache: cache.crop(0),
        "crop a part": lambda _, cache: cache.crop(2),
        "crop a piece": lambda _, cache: cache.crop(4),
        "reorder": lambda _, cache: cache.reorder(torch.tensor([1, 0])),
        "repeat": lambda _, cache: cache.repeat(2),
        "reset": lambda _, cache: cache.reset(),
        "unrecorded tokens": unrecorded,
    }
    for way, change in ways.items():
        text, cache = recorded()
        change(text, cache)
        assert cache.recorded == 0, way
        with pytest.raises(ValueError, match="cannot forget 1 tokens, 0 are recorded"):
            cache.crop(1)
        if isinstance(cache, EvictingCache):
            assert cache.slots._journal is None, way


@pytest.mark.parametrize("rule", [None, "selective"], ids=["all", "selective"])
def test_crop_keeps_gradients_off(rule: str | None):
    """Generated without gradients, cropped with gradients on: nothing may hold a graph."""
    text, cache = Text(layer_of("sas-compact"), 4, padded=False), cache_of(rule)
    cache.recording = True
    text.extend(7)
    text.read(cache, 0, 7)
    cache.crop(3)
    assert torch.is_grad_enabled()
    groups = cache.slots.groups if isinstance(cache, EvictingCache) else cache._groups()
    assert not any(t.requires_grad for group in groups for t in group.values())


def test_padding_that_is_taken_back_was_never_there():
    """Rows of equal length again: the next token takes the fast way."""
    layer, cache = layer_of("mha-selective"), EvictingCache(4)
    x = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer(x[:, :3], cache=cache)
        cache.recording = True
        layer(x[:, 3:6], key_mask=torch.tensor([[True] * 3, [False, True, True]]), cache=cache)
        assert cache.padded
        cache.crop(3)
        assert not cache.padded
        fresh = EvictingCache(4)
        layer(x[:, :3], cache=fresh)
        for t in range(3, 8):
            torch.testing.assert_close(
                layer(x[:, t : t + 1], cache=cache), layer(x[:, t : t + 1], cache=fresh)
            )
    same(cache, fresh)


def test_a_crop_costs_no_more_than_its_tokens():
    """What is kept to go back is the tokens read since, not the whole cache, time and again."""
    layer, cache = layer_of("mha-selective"), LayerCache(block=512)
    x = torch.randn(1, 200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer(x, cache=cache)
        cache.recording = True
        where = cache["k"].data_ptr()
        for _ in range(20):
            layer(x[:, :3], cache=cache)
            cache.crop(2)
    assert cache["k"].data_ptr() == where
    assert (cache.seen, cache.recorded) == (220, 0)


@pytest.mark.parametrize("name", ["mha-selective", "gqa-selective", "sas-compact"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=12)
def test_the_slot_that_was_planned_is_the_one_to_go(name: str, seed: int):
    """After steps and pieces, crops and reordered rows: what the last step said is what a fresh look says."""
    text, cache = Text(layer_of(name), seed, padded=False), EvictingCache(5)
    draw = text.draw
    for _ in range(12):
        text.extend(draw.choice([1, 1, 2, 6]))
        cache.recording = draw.random() < 0.5
        text.read_pieces(cache)
        recorded = cache.recorded
        if draw.random() < 0.3:
            n = draw.randint(0, recorded)
            cache.crop(n)
            text.forget(n)
        if draw.random() < 0.2:
            cache.reorder(torch.tensor([1, 0]))
            text.x, text.real = text.x.flip(0), text.real.flip(0)
        if cache._next_slot is not None and cache.seen >= 5:
            assert torch.equal(cache._next_slot, least_needed_slot(cache.scores, cache.positions))
    for n in (5, 1):
        text.extend(n)
        text.read(cache, cache.seen, cache.seen + n)
    assert cache._next_slot is not None
    assert torch.equal(cache._next_slot, least_needed_slot(cache.scores, cache.positions))
    fresh = EvictingCache(5)
    text.read(fresh, 0, text.x.shape[1])
    same(cache, fresh)
