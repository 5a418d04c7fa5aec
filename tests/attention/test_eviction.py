"""Eviction: one rule, however the tokens are run, against a simulator made of plain Python objects."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.attention import build
from heedful.attention.eviction import POLICIES, EvictingCache, eviction_mask


class Token:
    """One token of the simulator."""

    def __init__(self, column, position):
        self.column, self.position, self.votes = column, position, 0.0


def simulate(votes, budget, evict_every, real):
    """For every query the columns it attends to; `votes[i][j]` are Python floats."""
    held, rows, position = [], [], -1
    for i, is_real in enumerate(real):
        if not is_real:
            rows.append(set())
            continue
        position += 1
        held.append(Token(i, position))
        if position % evict_every == 0:
            while len(held) > budget:
                candidates = held[1:-1]
                worst = max(token.votes for token in candidates)
                victim = next(token for token in candidates if token.votes == worst)
                held = [token for token in held if token is not victim]
        rows.append({token.column for token in held})
        for token in held[:-1]:
            token.votes += votes[i][token.column]
    return rows


@st.composite
def cases(draw):
    length = draw(st.integers(1, 24))
    generator = random.Random(draw(st.integers(0, 10**6)))
    # few distinct values: ties are what real votes are full of
    votes = [[generator.choice([0.0, 0.0, 0.5, 1.25, 3.0]) for _ in range(length)] for _ in range(length)]
    real = [generator.random() < 0.8 for _ in range(length)]
    return votes, draw(st.integers(2, 10)), draw(st.integers(1, 4)), real


@given(cases())
@settings(max_examples=150, deadline=None)
def test_mask_agrees_with_the_simulator(case):
    votes, budget, evict_every, real = case
    mask = eviction_mask(
        torch.tensor([votes], dtype=torch.float64),
        budget,
        evict_every=evict_every,
        key_mask=torch.tensor([real]),
    )[0]
    expected = simulate(votes, budget, evict_every, real)
    assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == expected
    assert mask.sum(-1).max() <= budget + evict_every - 1


def layer_of(attention, score, **options):
    torch.manual_seed(1)
    layer = build(attention, score=score, d_model=16, n_heads=4, init_logit_std=2.0, **options).double()
    return layer.eval()


def run(layer, x, key_mask, pieces, **cache):
    """Outputs and, after every piece, the positions held."""
    memory, outs, held, start = EvictingCache(**cache), [], [], 0
    with torch.no_grad():
        for n in pieces:
            part = slice(start, start + n)
            outs.append(layer(x[:, part], key_mask=key_mask[:, part], cache=memory))
            held.append([sorted(p for p in row if p >= 0) for row in memory.positions.tolist()])
            assert memory.kept <= memory.n_slots
            start += n
    return torch.cat(outs, dim=1), held, memory


def pieces_of(length, generator):
    """A random split."""
    pieces = []
    while sum(pieces) < length:
        pieces.append(min(generator.choice([1, 1, 2, 5, 9]), length - sum(pieces)))
    return pieces


FORMS = [
    ("mha", "selective", "selective", {}),
    ("gqa", "selective", "selective", {"n_kv_heads": 2}),
    ("sas", "selective", "selective", {}),
    ("sas", "selective", "selective", {"cache": "compact"}),
    ("mha", "selective", "streaming", {}),
    *(("mha", "softmax", policy, {}) for policy in POLICIES if policy != "selective"),
    ("sas", "softmax", "h2o", {"cache": "compact"}),
]


@pytest.mark.parametrize(
    "form", FORMS, ids=lambda f: "-".join(map(str, f[:3])) + ("-" + str(f[3]) if f[3] else "")
)
@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([1, 1, 2, 3]))
@settings(max_examples=12, deadline=None)
def test_all_ways_of_running_the_same_tokens_agree(form, seed, budget, evict_every):
    attention, score, policy, options = form
    layer = layer_of(attention, score, **options)
    generator = random.Random(seed)
    length, left = generator.randint(2, 26), generator.randint(0, 5)
    x = torch.randn(2, left + length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    key_mask = torch.ones(2, left + length, dtype=torch.bool)
    key_mask[1, :left] = False
    how = {"budget": budget, "policy": policy, "evict_every": evict_every}
    whole, held, _ = run(layer, x, key_mask, [left + length], **how)
    for pieces in ([1] * (left + length), pieces_of(left + length, generator)):
        out, now_held, _ = run(layer, x, key_mask, pieces, **how)
        torch.testing.assert_close(out[key_mask], whole[key_mask])
        assert now_held[-1] == held[-1]
    alone, _, _ = run(layer, x[1:, left:], key_mask[1:, left:], [length], **how)
    torch.testing.assert_close(alone[0], whole[1, left:])
    if budget >= left + length:
        torch.testing.assert_close(whole[key_mask], layer(x, key_mask=key_mask)[key_mask])


@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_decoding_evicts_whom_the_simulator_evicts(seed, budget, evict_every):
    layer = layer_of("mha", "selective")
    length = 20
    x = torch.randn(1, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, memory = layer.project(x, torch.arange(length)[None])
    logits = (q[0, 0] @ memory["k"][0, 0].T * layer.config.qk_dim**-0.5).tolist()
    votes = [[max(logits[i][j], 0.0) for j in range(length)] for i in range(length)]
    expected = simulate(votes, budget, evict_every, [True] * length)
    everyone = torch.ones(1, length, dtype=torch.bool)
    _, held, _ = run(layer, x, everyone, [1] * length, budget=budget, evict_every=evict_every)
    assert [set(rows[0]) for rows in held] == expected


def test_memory_is_the_slots_and_does_not_grow():
    layer = layer_of("mha", "selective").float()
    memory, sizes = EvictingCache(7), set()
    with torch.no_grad():
        for _ in range(40):
            layer(torch.randn(3, 1, 16), cache=memory)
            sizes.add(memory.nbytes)
    keys_values, votes, position, arrived = 2 * 4 * 4 * 4, 4, 8, 8
    assert sizes == {3 * (7 * (keys_values + votes + position) + arrived)}
    assert (memory.seen, memory.kept) == (40, 7)


def test_rows_can_be_reordered_and_repeated():
    layer = layer_of("mha", "selective")
    x, later = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        one, other = EvictingCache(4), EvictingCache(4)
        layer(x, cache=one)
        one.reorder(torch.tensor([1, 0]))
        layer(x.flip(0), cache=other)
        torch.testing.assert_close(layer(later, cache=one), layer(later, cache=other))
        one.repeat(2)
        assert layer(torch.zeros(4, 1, 16, dtype=torch.float64), cache=one).shape == (4, 1, 16)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="budget must be a whole number >= 2"):
        EvictingCache(1)
    with pytest.raises(ValueError, match="evict_every must be a whole number >= 1"):
        eviction_mask(torch.zeros(1, 3, 3), 4, evict_every=0)
    with pytest.raises(ValueError, match="did you mean 'streaming'"):
        EvictingCache(4, "stream")
    x = torch.randn(1, 5, 16)
    layer = build("mha", d_model=16, n_heads=4)
    with torch.no_grad(), pytest.raises(ValueError, match="needs score 'selective'"):
        layer(x, cache=EvictingCache(4))
    with pytest.raises(RuntimeError, match="cannot be trained through"):
        layer(x, cache=EvictingCache(4, "h2o"))
    with torch.no_grad(), pytest.raises(ValueError, match="segments"):
        layer(x, segment_ids=torch.zeros(1, 5, dtype=torch.long), cache=EvictingCache(4, "h2o"))
    with pytest.raises(ValueError, match=r"\(B, T, T\)"):
        eviction_mask(torch.zeros(3, 3), 4)
