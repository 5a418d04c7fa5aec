"""Policies that look at weights or keys, against loops of plain Python written from the papers' formulas."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.attention import build
from heedful.attention.eviction import POLICIES, EvictingCache
from heedful.attention.eviction.cache import BLOCK
from heedful.attention.eviction.snapkv import SnapKVPolicy

OBSERVING = [name for name, policy in POLICIES.items() if policy.needs_weights or policy.needs_keys]


def layer_of(attention, score="softmax", **options):
    torch.manual_seed(1)
    layer = build(attention, score=score, d_model=16, n_heads=4, init_logit_std=2.0, **options)
    return layer.double().eval()


def text(length, seed, batch=1):
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def projected(layer, x):
    """Logits (H, T, T), keys and values (G, T, ·) of one row."""
    q, memory = layer.project(x, torch.arange(x.shape[1])[None])
    k, v = layer.keys_values(memory)
    times = q.shape[1] // k.shape[1]
    logits = q[0] @ k[0].repeat_interleave(times, 0).mT * layer.scale
    return logits, k[0], v[0].repeat_interleave(times, 0)


def pooled(values, kernel):
    """The average over `kernel` neighbours; there is nothing beyond the ends."""
    reach = kernel // 2
    return [sum(values[max(n - reach, 0) : n + reach + 1]) / kernel for n in range(len(values))]


def least_wanted(policy, held, paid, keys, i, budget):
    """How little each held token is wanted when token i arrives; `paid[u][j]` is what query u paid to j."""
    if policy == "h2o":
        return {
            j: float("-inf") if i - j < budget // 2 else -sum(given.get(j, 0.0) for given in paid)
            for j in held
        }
    if policy == "tova":
        return {j: -paid[-1][j] for j in held}
    if policy == "keydiff":
        units = {j: keys[:, j] / keys[:, j].norm(dim=-1, keepdim=True) for j in held}
        mean = torch.stack(list(units.values())).mean(0)
        return {
            j: torch.nn.functional.cosine_similarity(keys[:, j], mean, dim=-1).mean().item() for j in held
        }
    window = min(32, budget // 2)
    ranked = [j for j in held if j < i - window]
    attention = [sum(given.get(j, 0.0) for given in paid[-window:]) for j in ranked]
    wanted = dict(zip(ranked, pooled(attention, 5), strict=True))
    return {j: -wanted.get(j, float("inf")) for j in held}


def simulate(policy, logits, keys, budget, evict_every, grace=1, first=1):
    """For every query the positions held."""
    held, paid, rows = [], [], []
    for i in range(logits.shape[1]):
        if i % evict_every == 0 and len(held) + 1 > budget:
            unwanted = least_wanted(policy, held, paid, keys, i, budget)
            while len(held) + 1 > budget:
                movable = [j for j in held if first <= j <= i - grace]
                held.remove(max(movable, key=lambda j: (unwanted[j], -j)))
        held.append(i)
        weights = logits[:, i, held].softmax(-1).sum(0).tolist()
        paid.append(dict(zip(held, weights, strict=True)))
        rows.append(list(held))
    return rows


@pytest.mark.parametrize("policy", OBSERVING)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("pieces", [[1] * 24, [9, 1, 14]], ids=["single", "pieces"])
@given(
    st.integers(0, 10**6),
    st.integers(2, 9),
    st.integers(1, 3),
    st.sampled_from([(1, 1), (1, 1), (3, 1), (2, 4)]),
)
@settings(max_examples=6, deadline=None)
def test_who_is_held_and_what_comes_out(policy, masked, pieces, seed, budget, evict_every, safe):
    layer = layer_of("gqa", n_kv_heads=2)
    grace, first = safe
    budget = max(budget, grace + first)
    x = text(24, seed)
    logits, keys, values = projected(layer, x)
    expected = simulate(policy, logits, keys, budget, evict_every, grace, first)
    cache, seen = EvictingCache(budget, policy, evict_every, grace=grace, first=first), 0
    for n in pieces:
        mask = torch.ones(1, n, dtype=torch.bool) if masked else None
        with torch.no_grad():
            out = layer(x[:, seen : seen + n], key_mask=mask, cache=cache)
        seen += n
        assert sorted(p for p in cache.positions[0].tolist() if p >= 0) == expected[seen - 1]
        for i in range(seen - n, seen):
            weights = logits[:, i, expected[i]].softmax(-1)
            heads = torch.einsum("hs,hsd->hd", weights, values[:, expected[i]])
            alone = layer.aggregate(heads[None, :, None])[0, 0]
            torch.testing.assert_close(out[0, i - seen + n], alone)


def test_a_whole_window_of_snapkv():
    """A budget of more than twice the window: 32 queries are summed, 32 tokens stay."""
    layer, length, budget = layer_of("mha"), 130, 80
    assert budget > 2 * SnapKVPolicy.window == 64
    x = text(length, 5)
    expected = simulate("snapkv", *projected(layer, x)[:2], budget, 1)
    for pieces in ([1] * length, [length], [50, 80]):
        cache, seen = EvictingCache(budget, "snapkv"), 0
        for n in pieces:
            with torch.no_grad():
                layer(x[:, seen : seen + n], cache=cache)
            seen += n
            assert sorted(p for p in cache.positions[0].tolist() if p >= 0) == expected[seen - 1]
    assert {*range(length - 33, length)} <= set(expected[-1])
    recent = [0, *range(length - budget + 1, length)]
    assert expected[-1] != recent


@pytest.mark.parametrize(
    ("policy", "score"), [*((name, "softmax") for name in OBSERVING), ("tova", "selective")]
)
def test_several_blocks_are_the_tokens_one_by_one(policy, score):
    """With padding inside of a row, and rolled back and read again."""
    layer, length = layer_of("mha", score), BLOCK + 40
    x, later = text(length, 6, batch=2), text(3, 7, batch=2)
    key_mask = torch.ones(2, length, dtype=torch.bool)
    key_mask[0, :13] = False
    key_mask[1, 100:110] = False
    caches = [EvictingCache(20, policy) for _ in range(3)]
    with torch.no_grad():
        whole = layer(x, key_mask=key_mask, cache=caches[0])
        single = [
            layer(x[:, t : t + 1], key_mask=key_mask[:, t : t + 1], cache=caches[1]) for t in range(length)
        ]
        torch.testing.assert_close(whole[key_mask], torch.cat(single, dim=1)[key_mask])
        layer(x[:, :30], key_mask=key_mask[:, :30], cache=caches[2])
        caches[2].recording = True
        wrong = torch.cat((x[:, 30:], later), dim=1)
        layer(wrong, key_mask=torch.nn.functional.pad(key_mask[:, 30:], (0, 3), value=True), cache=caches[2])
        caches[2].crop(3)
        outs = [layer(later, cache=cache) for cache in caches]
    for out, cache in zip(outs[1:], caches[1:], strict=True):
        torch.testing.assert_close(out, outs[0])
        assert [sorted(row) for row in cache.positions.tolist()] == [
            sorted(row) for row in caches[0].positions.tolist()
        ]


@pytest.mark.parametrize("policy", OBSERVING)
@pytest.mark.parametrize(("budget", "window"), [(8, 12), (12, 7), (None, 6)])
def test_a_window_moves_on_with_every_query(policy, budget, window):
    """Whoever it leaves behind goes at once, also where the budget waits for `evict_every`."""
    layer, x = layer_of("gqa", n_kv_heads=2), text(40, 9, batch=2)
    how = {"budget": budget, "window": window, "evict_every": 3}
    caches = [EvictingCache(policy=policy, **how) for _ in range(3)]
    with torch.no_grad():
        single, *others = (
            torch.cat([layer(piece, cache=cache) for piece in x.split(sizes, dim=1)], dim=1)
            for cache, sizes in zip(caches, (1, 40, [7, 1, 15, 17]), strict=True)
        )
    for out, cache in zip(others, caches[1:], strict=True):
        torch.testing.assert_close(out, single)
        assert torch.equal(cache.positions.sort().values, caches[0].positions.sort().values)


def test_snapkv_remembers_a_window_for_each_token():
    layer, cache = layer_of("mha").float(), EvictingCache(6, "snapkv")
    with torch.no_grad():
        layer(text(9, 1).float(), cache=cache)
    assert cache.scores.shape == (1, 32, 6)
    assert cache.nbytes == 6 * (layer.config.cache_bytes_per_token() + 8 + 32 * 4) + 8


@pytest.mark.parametrize("policy", OBSERVING)
def test_rows_of_several_lengths_go_as_they_do_alone(policy):
    generator = random.Random(3)
    layer, lengths = layer_of("gqa", n_kv_heads=2), [40, 26, 33]
    x = text(40, 8, batch=3)
    key_mask = torch.zeros(3, 40, dtype=torch.bool)
    for row, n in enumerate(lengths):
        key_mask[row, sorted(generator.sample(range(40), n))] = True
    together = EvictingCache(9, policy, evict_every=2)
    with torch.no_grad():
        out = layer(x, key_mask=key_mask, cache=together)
        for row in range(3):
            alone = layer(x[row : row + 1, key_mask[row]], cache=EvictingCache(9, policy, evict_every=2))
            torch.testing.assert_close(out[row, key_mask[row]], alone[0])
