"""Reading a prompt in blocks under a budget: exactly the stepwise rule, and never a (T, T) tensor."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from heedful.attention import build
from heedful.attention.eviction import EvictingCache, eviction_mask
from heedful.attention.eviction.cache import BLOCK
from heedful.ops.eviction.rule import Rule
from heedful.ops.eviction.selectors import departures
from heedful.ops.selective.pruned import attend_pruned
from heedful.ops.selective.reference import selective_reference

LENGTH = 2 * BLOCK + 37


def one_by_one(rule, priority, positions):
    """`departures` by `Rule.evict`, query after query."""
    batch, length, total = priority.shape
    before = total - length
    column = torch.arange(total)
    alive = (positions >= 0) & (column < before)
    gone_at = torch.full_like(positions, length)
    for t in range(length):
        arrived = alive.clone()
        arrived[:, before + t] = positions[:, before + t] >= 0
        newest = positions[:, before + t : before + t + 1]
        alive = rule.evict(arrived, priority[:, t], positions, newest)
        gone_at = torch.where(arrived & ~alive, t, gone_at)
    assert gone_at.shape[0] == batch
    return gone_at


def held_before(draw, rule, slots, seen):
    """Positions in random slots, as the rule may have left them after `seen` tokens."""
    extra = (seen - 1) % rule.evict_every if seen else 0
    n = min(seen, slots if rule.budget is None else rule.budget + extra)
    safe = {*range(seen)[: rule.first], *range(seen)[-rule.grace :]}
    kept = sorted(safe) + draw.sample(sorted(set(range(seen)) - safe), max(0, n - len(safe)))
    row = [-1] * slots
    for slot, position in zip(draw.sample(range(slots), len(kept)), kept, strict=True):
        row[slot] = position
    return row


@given(st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_departures_are_the_rule_query_by_query(draw):
    """Votes with ties, priorities that fall, padding, thresholds that are reached exactly, every length."""
    budget, threshold = draw.choice([2, 3, 5, 8, 20, 40]), draw.choice([None, None, 2.0, 3.3, 0.3])
    if threshold is not None and draw.random() < 0.4:
        budget = None
    grace, first = draw.choice([(1, 1), (1, 1), (1, 3), (2, 1), (7, 2), (18, 1), (30, 4)])
    budget = budget if budget is None else max(budget, grace + first)
    window = draw.choice([None, None, 1, 4, 19, 60])
    if window is not None and draw.random() < 0.3:
        budget = None
    rule = Rule(budget, draw.choice([1, 1, 2, 3, 5]), threshold, grace, first, window)
    slots, length = (
        (budget or max(30, grace + first)) + rule.evict_every - 1,
        draw.choice([2, 5, 16, 17, 40, 64, 131]),
    )
    dtype = draw.choice([torch.float32, torch.float64])
    rows = []
    for _ in range(draw.choice([1, 2])):
        seen = draw.choice([0, 1, draw.randint(2, 60)])
        share, row = draw.choice([1.0, 1.0, 0.7, 0.1]), held_before(draw, rule, slots, seen)
        for _ in range(length):
            real = draw.random() < share
            row.append(seen if real else -1)
            seen += real
        rows.append(row)
    positions = torch.tensor(rows)
    generator = torch.Generator().manual_seed(draw.randint(0, 10**6))
    shape = (len(rows), length, positions.shape[1])
    few = torch.tensor([0.0, 0.0, 0.3, 0.55, 1.1], dtype=dtype)
    kind = draw.choice(["few", "few", "many", "falling"])
    priority = torch.rand(shape, generator=generator, dtype=dtype)
    if kind == "few":
        priority = few[torch.randint(0, 5, shape, generator=generator)].cumsum(1)
    elif kind == "many":
        priority = priority.cumsum(1)
    assert torch.equal(departures(rule, priority, positions), one_by_one(rule, priority, positions))


def layer_of(attention, score, std=2.0, **options):
    torch.manual_seed(1)
    layer = build(attention, score=score, d_model=16, n_heads=4, init_logit_std=std, **options)
    return layer.double().eval()


def read(layer, x, pieces, key_mask=None, **rule):
    """The outputs, the cache, and the positions held in each row."""
    cache, outs = EvictingCache(**rule), []
    with torch.no_grad():
        for part in torch.arange(x.shape[1]).split(pieces):
            mask = None if key_mask is None else key_mask[:, part]
            outs.append(layer(x[:, part], key_mask=mask, cache=cache))
    held = [sorted(p for p in row if p >= 0) for row in cache.positions.tolist()]
    return torch.cat(outs, dim=1), cache, held


def masked_formula(layer, x, key_mask, **rule):
    """The outputs of the whole text at once, from the formula, with the mask of `eviction_mask`."""
    with torch.no_grad():
        positions = (key_mask.long().cumsum(-1) - 1).clamp(min=0)
        q, memory = layer.project(x, positions)
        k, v = layer.keys_values(memory)
        length, scale = x.shape[1], layer.config.qk_dim**-0.5
        logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
        first = (key_mask & (positions == 0))[:, None]
        real = key_mask[:, None] & key_mask[:, :, None]
        voted = torch.ones(length, length, dtype=torch.bool).tril(-1) & real & ~first
        keep = eviction_mask(torch.where(voted, logits[:, 0].relu(), 0.0), key_mask=key_mask, **rule)
        out, _ = selective_reference(q, k, v, None, None, keep, voted, scale)
        return layer.aggregate(out)


RULES = [
    {"budget": 5},
    {"budget": BLOCK},
    {"budget": BLOCK + 61},
    {"budget": 9, "evict_every": 3},
    {"budget": 30, "grace": 20, "first": 4},
    {"budget": 40, "evict_every": BLOCK},
    {"budget": None, "threshold": 6.0},
    {"budget": 30, "threshold": 3.0, "evict_every": 2},
    {"budget": None, "window": 50},
    {"budget": 20, "window": 50, "grace": 3},
    {"budget": 40, "window": BLOCK + 11, "threshold": 6.0, "evict_every": 3},
]
FORMS = [("mha", {}), ("gqa", {"n_kv_heads": 2}), ("sas", {"cache": "compact"}), ("mha", {"std": 400.0})]


# Every rule once, with padding and without by turns, the forms in turn; among the exhaustive tests the other pairs,
# and the rule that holds so much that the reference takes long.
PAIRS = [
    pytest.param(
        rule,
        form,
        padded,
        marks=[pytest.mark.exhaustive]
        * ((i % len(FORMS), (i + i // len(FORMS)) % 2) != (j, padded) or rule.get("evict_every") == BLOCK),
    )
    for i, rule in enumerate(RULES)
    for j, form in enumerate(FORMS)
    for padded in (False, True)
]


@pytest.mark.parametrize(("rule", "form", "padded"), PAIRS)
def test_several_blocks_are_the_formula(rule, form, padded):
    """One pass over two blocks and a rest; the largest logits need the maximum of the softmax."""
    attention, options = form
    layer = layer_of(attention, "selective", **options)
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    key_mask = torch.ones(2, LENGTH, dtype=torch.bool)
    if padded:
        key_mask[1, :20] = False
        key_mask[0, 130:150] = False
    mask = key_mask if padded else None
    whole, cache, held = read(layer, x, LENGTH, mask, **rule)
    torch.testing.assert_close(whole[key_mask], masked_formula(layer, x, key_mask, **rule)[key_mask])
    assert cache.evicted > 0
    parts, _, held_by_parts = read(layer, x, [100, 1, 150, LENGTH - 251], mask, **rule)
    torch.testing.assert_close(parts[key_mask], whole[key_mask])
    assert held_by_parts == held


@pytest.mark.parametrize("rule", [RULES[0], RULES[2], RULES[6], RULES[-1]], ids=str)
def test_several_blocks_are_the_tokens_one_by_one(rule):
    layer = layer_of("mha", "selective")
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    whole, cache, held = read(layer, x, LENGTH, **rule)
    single, other, held_singly = read(layer, x, 1, **rule)
    torch.testing.assert_close(whole, single)
    assert held == held_singly
    assert cache.nbytes == other.nbytes
    if rule.get("threshold") is not None:
        torch.testing.assert_close(cache.forgotten, other.forgotten)
    later = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():  # and both go on alike
        torch.testing.assert_close(layer(later, cache=cache), layer(later, cache=other))


@pytest.mark.parametrize("score", ["selective", "softmax"])
@pytest.mark.parametrize("policy", ["streaming", "random"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_other_policies_in_several_blocks(score, policy, impl):
    layer = layer_of("mha", score, impl=impl)
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    whole, _, held = read(layer, x, LENGTH, budget=20, policy=policy)
    single, _, held_singly = read(layer, x, 1, budget=20, policy=policy)
    torch.testing.assert_close(whole, single)
    assert held == held_singly


@pytest.mark.parametrize(
    "rule", [{"budget": 5}, {"budget": BLOCK + 61}, {"budget": None, "threshold": 6.0}], ids=str
)
@pytest.mark.parametrize("cut", [0, 1, 40, BLOCK, LENGTH - 30], ids=str)
def test_a_long_piece_is_taken_back(rule, cut):
    """Of a piece of several blocks, read upon others, the last tokens are forgotten."""
    layer = layer_of("mha", "selective")
    x = torch.randn(1, LENGTH + 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    cache, fresh = EvictingCache(**rule), EvictingCache(**rule)
    stays = LENGTH - cut
    with torch.no_grad():
        layer(x[:, :30], cache=cache)
        for t in range(30, 33):
            layer(x[:, t : t + 1], cache=cache)
        cache.recording = True
        layer(x[:, 33:LENGTH], cache=cache)
        kept = sum(t.numel() for _, _, t in cache.slots._journal or [])
        assert kept <= 2 * sum(t.numel() for t in cache.slots.held().values())
        cache.crop(min(cut, LENGTH - 33))
        layer(x[:, : max(stays, 33)], cache=fresh)
        assert sorted(cache.positions[0].tolist()) == sorted(fresh.positions[0].tolist())[-cache.n_slots :]
        for t in range(LENGTH, LENGTH + 9):
            now = x[:, t : t + 1]
            torch.testing.assert_close(layer(now, cache=cache), layer(now, cache=fresh))


class Largest(TorchDispatchMode):
    """The most values that any tensor made here holds."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("policy", ["selective", "streaming"])
@pytest.mark.parametrize("rule", [{}, {"evict_every": 8}], ids=str)
def test_memory_grows_with_the_budget_not_with_the_prompt(policy, rule):
    """The largest tensor is one of T tokens, or of a block by what it sees."""
    layer = layer_of("mha", "selective").float()
    for length in (2048, 4096):
        cache = EvictingCache(24, policy, **rule)
        with torch.no_grad(), Largest() as largest:
            layer(torch.randn(1, length, 16), cache=cache)
        assert largest.values <= max(4 * BLOCK * (cache.n_slots + BLOCK), length * 16 * 2)
        assert largest.values < length * length / 8
        assert cache.slots.tensors["k"].shape[2] == 0 or cache.slots.held()["k"].shape[2] == cache.n_slots


@pytest.mark.parametrize("size", [1.0, 60.0], ids=["small logits", "large logits"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(0, 30))
def test_attend_pruned_is_the_formula(size, dtype, seed, length, held):
    """Whatever the order of the keys and whoever goes when."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, total = 2, held + length
    shapes = ((batch, 4, length, 8), (batch, 2, total, 8), (batch, 2, total, 5))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    q = q * size
    order = torch.stack([torch.randperm(held, generator=generator) for _ in range(batch)])
    own = torch.arange(held, total).expand(batch, -1)
    positions = torch.cat((order, own), dim=1)
    positions[torch.rand(batch, total, generator=generator) < draw.choice([0.0, 0.3])] = -1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    past = torch.randint(0, 3, (batch, 1, held), generator=generator).to(wide)
    past *= draw.choice([1, 1, 200])  # so many votes that some keys are left out
    gone_at = torch.randint(1, length + 1, (batch, total), generator=generator)
    gone_at[:, held:] = torch.maximum(gone_at[:, held:], torch.arange(1, length + 1))
    rows, somebody = [], draw.random() < 0.8

    def evict(masks):
        rows.append(masks.clone())
        return gone_at if somebody else None

    out, after = attend_pruned(q, k, v, past if held else None, positions, 0.3, evict)
    column, query = torch.arange(total), torch.arange(length)[:, None]
    real = (positions >= 0)[:, None] & (positions[:, held:, None] >= 0)
    voted = (column < held + query) & real & (positions > 0)[:, None]
    visible = (column <= held + query) & real
    if somebody:
        visible &= query < gone_at[:, None]
    wide_inputs = [x.double() for x in (q, k, v)]
    expected, mask = selective_reference(
        *wide_inputs, None, past.double() if held else None, visible, voted, 0.3
    )
    accuracy = {torch.float64: 1e-10, torch.float32: 2e-5 * size, torch.bfloat16: 1e-2}[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=accuracy, rtol=accuracy)
    torch.testing.assert_close(after.double(), mask, atol=accuracy, rtol=1e-5)
    assert len(rows) == 1
    assert rows[0].shape == (batch, length, total)


def test_a_nan_stays_in_its_row():
    torch.manual_seed(0)
    q, k, v, past = (
        torch.randn(2, 2, 20, 8),
        torch.randn(2, 2, 60, 8),
        torch.randn(2, 2, 60, 5),
        torch.rand(2, 1, 40),
    )
    positions = torch.arange(60).expand(2, -1)
    expected, _ = attend_pruned(q, k, v, 500 * past, positions, 0.3, lambda masks: None)
    k[0, 1, 30] = torch.nan
    got, _ = attend_pruned(q, k, v, 500 * past, positions, 0.3, lambda masks: None)
    torch.testing.assert_close(got[1], expected[1])
    torch.testing.assert_close(got[0, 0], expected[0, 0])
    assert got[0, 1].isnan().all()
