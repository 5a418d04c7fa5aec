"""Eviction: one rule, however the tokens are run, against a simulator made of plain Python objects."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.attention import EvictableScore, LayerCache, build, register_score
from heedful.attention import selective as selective_module
from heedful.attention.eviction import POLICIES, EvictingCache, eviction_mask
from heedful.attention.eviction import cache as cache_module
from heedful.attention.registry import SCORES
from heedful.ops import selective_attention
from heedful.ops.selective.reference import selective_reference


class Token:
    """One token of the simulator."""

    def __init__(self, column, position):
        self.column, self.position, self.votes = column, position, 0.0


def simulate(votes, budget, evict_every, real, threshold=None, grace=1, first=1, window=None):
    """For every query the columns it attends to; `votes[i][j]` are Python floats."""
    held, rows, position = [], [], -1
    for i, is_real in enumerate(real):
        if not is_real:
            rows.append(set())
            continue
        position += 1
        held.append(Token(i, position))
        held = [token for token in held if window is None or token.position > position - window]
        if position % evict_every == 0:

            def safe(token, newest=position):
                return token.position < first or token.position > newest - grace

            if threshold is not None:
                held = [token for token in held if safe(token) or token.votes <= threshold]
            while budget is not None and len(held) > budget:
                candidates = [token for token in held if not safe(token)]
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
    # thresholds that sums of those votes reach exactly: what equals it stays
    budget, threshold = draw(st.integers(2, 10)), draw(st.sampled_from([None, 0.5, 3.0, 5.5, 100.0]))
    if threshold is not None and draw(st.booleans()):
        budget = None
    grace, first = draw(st.sampled_from([(1, 1), (1, 1), (3, 1), (1, 4), (4, 2), (9, 3)]))
    budget = budget if budget is None else max(budget, grace + first)
    window = draw(st.sampled_from([None, None, 1, 3, 7, 12]))
    return votes, budget, draw(st.integers(1, 4)), real, threshold, grace, first, window


@given(cases())
@settings(max_examples=150, deadline=None)
def test_mask_agrees_with_the_simulator(case):
    votes, budget, evict_every, real, threshold, grace, first, window = case
    mask = eviction_mask(
        torch.tensor([votes], dtype=torch.float64),
        budget,
        evict_every=evict_every,
        threshold=threshold,
        grace=grace,
        first=first,
        window=window,
        key_mask=torch.tensor([real]),
    )[0]
    expected = simulate(votes, budget, evict_every, real, threshold, grace, first, window)
    assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == expected
    if budget is not None:
        assert mask.sum(-1).max() <= budget + evict_every - 1
    for i in (i for i, is_real in enumerate(real) if is_real):
        there = [j for j in range(i + 1) if real[j]]
        newest = there[-grace:] if window is None else there[-min(grace, window) :]
        assert mask[i, newest].all()
        assert mask[i, there[:first]].all() if window is None else mask[i].sum() <= window


def layer_of(attention, score, **options):
    torch.manual_seed(1)
    layer = build(attention, score=score, d_model=16, n_heads=4, init_logit_std=2.0, **options).double()
    return layer.eval()


def check_what_is_held(memory, held, arrived, apart=1):
    """The first real token in slot 0, the newest, nobody twice, never more than there may be."""
    rule = memory.rule
    assert memory.kept == max(len(positions) for positions in held)
    assert memory.evicted == (sum(arrived) - sum(len(positions) for positions in held)) // apart
    for row, (positions, n) in enumerate(zip(held, arrived, strict=True)):
        assert len(set(positions)) == len(positions)
        if n:
            seen = range(n) if rule.window is None else range(n)[-rule.window :]
            safe = {*range(n)[: rule.first], *range(n)[-rule.grace :]} & set(seen)
            assert safe <= set(positions) <= set(seen)
            assert memory.positions[row, 0] == 0 or n > len(seen)
        else:
            assert positions == []
        if rule.budget is None:
            continue
        extra = (n - 1) % rule.evict_every  # arrived since the last time anybody could go
        most = min(rule.budget + extra, rule.window or n)
        assert len(positions) <= most <= max(memory.n_slots, n)
        if rule.threshold is None:
            assert len(positions) >= min(n, rule.budget, rule.window or n)


def run(layer, x, key_mask, pieces, **cache):
    """Outputs and, after every piece, the positions held."""
    memory, outs, held, start = EvictingCache(**cache), [], [], 0
    with torch.no_grad():
        for n in pieces:
            part = slice(start, start + n)
            outs.append(layer(x[:, part], key_mask=key_mask[:, part], cache=memory))
            start += n
            held.append([sorted(p for p in row if p >= 0) for row in memory.positions.tolist()])
            apart = len(held[-1]) // len(x)  # key heads that hold tokens of their own
            check_what_is_held(
                memory, held[-1], key_mask[:, :start].sum(-1).repeat_interleave(apart).tolist(), apart
            )
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
    ("mha", "selective", "selective", {"selector": "added", "select_dim": 6}),
    (
        "gqa",
        "selective",
        "selective",
        {"n_kv_heads": 2, "selector": "added", "selectors": 2, "select_dim": 5},
    ),
    ("mha", "selective", "selective", {"subtract": False}),
    (
        "gqa",
        "selective",
        "selective",
        {"n_kv_heads": 2, "selector": "added", "selectors": 2, "subtract": False},
    ),
    ("mha", "selective", "streaming", {}),
    *(("mha", "softmax", policy, {}) for policy in POLICIES if policy != "selective"),
    ("sas", "softmax", "h2o", {"cache": "compact"}),
    ("sas", "softmax", "keydiff", {"cache": "compact"}),
    ("gqa", "selective", "tova", {"n_kv_heads": 2, "selector": "added", "select_dim": 5}),
    ("gqa", "selective", "snapkv", {"n_kv_heads": 2, "selector": "added", "selectors": 2}),
    ("gqa", "gated", "streaming", {"n_kv_heads": 2}),
    ("sas", "gated", "tova", {}),
]


@pytest.mark.parametrize(
    "form",
    [f if i % 2 == 0 else pytest.param(f, marks=pytest.mark.exhaustive) for i, f in enumerate(FORMS)],
    ids=lambda f: "-".join(map(str, f[:3])) + ("-" + str(f[3]) if f[3] else ""),
)
@given(
    st.integers(0, 10**6),
    st.integers(2, 9),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from([None, None, 0.5, 2.0, 6.0, 1e6]),
    st.booleans(),
    st.sampled_from([(1, 1), (1, 1), (3, 1), (2, 4)]),
)
@settings(max_examples=10, deadline=None)
def test_all_ways_of_running_the_same_tokens_agree(form, seed, budget, evict_every, threshold, bounded, safe):
    attention, score, policy, options = form
    grace, first_ones = safe
    budget = max(budget, grace + first_ones)
    threshold = threshold if policy == "selective" and options.get("subtract", True) else None
    budget = budget if bounded or threshold is None else None
    layer = layer_of(attention, score, **options)
    generator = random.Random(seed)
    length, left = generator.randint(2, 26), generator.randint(0, 5)
    x = torch.randn(2, left + length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    key_mask = torch.ones(2, left + length, dtype=torch.bool)
    key_mask[1, :left] = False
    how = {"budget": budget, "policy": policy, "evict_every": evict_every, "threshold": threshold, "block": 3}
    how |= {"grace": grace, "first": first_ones}
    whole, held, first = run(layer, x, key_mask, [left + length], **how)
    for pieces in ([1] * (left + length), pieces_of(left + length, generator)):
        out, now_held, memory = run(layer, x, key_mask, pieces, **how)
        torch.testing.assert_close(out[key_mask], whole[key_mask])
        assert now_held[-1] == held[-1]
        if threshold is not None:
            torch.testing.assert_close(memory.forgotten, first.forgotten)
    alone, _, _ = run(layer, x[1:, left:], key_mask[1:, left:], [length], **how)
    torch.testing.assert_close(alone[0], whole[1, left:])
    if threshold in (None, 1e6) and (budget is None or budget >= left + length):
        torch.testing.assert_close(whole[key_mask], layer(x, key_mask=key_mask)[key_mask])


@given(
    st.integers(0, 10**6),
    st.one_of(st.none(), st.integers(2, 8)),
    st.integers(1, 3),
    st.sampled_from([None, 0.7, 3.0, 10.0]),
    st.sampled_from([(1, 1), (1, 1), (3, 1), (1, 3), (2, 2)]),
    st.sampled_from([None, None, 4, 9]),
)
@settings(max_examples=40, deadline=None)
def test_decoding_evicts_whom_the_simulator_evicts(seed, budget, evict_every, threshold, safe, window):
    budget = 5 if budget is None and threshold is None and window is None else budget
    budget = budget if budget is None else max(budget, sum(safe))
    layer = layer_of("mha", "selective")
    length = 20
    x = torch.randn(1, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, memory = layer.project(x, torch.arange(length)[None])
    logits = (q[0, 0] @ memory["k"][0, 0].T * layer.config.qk_dim**-0.5).tolist()
    votes = [[max(logits[i][j], 0.0) for j in range(length)] for i in range(length)]
    expected = simulate(votes, budget, evict_every, [True] * length, threshold, *safe, window)
    everyone = torch.ones(1, length, dtype=torch.bool)
    how = {"budget": budget, "evict_every": evict_every, "threshold": threshold}
    how |= {"grace": safe[0], "first": safe[1], "window": window}
    _, held, _ = run(layer, x, everyone, [1] * length, block=4, **how)
    assert [set(rows[0]) for rows in held] == expected
    mask = eviction_mask(torch.tensor([votes], dtype=torch.float64), **how)[0]
    assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == expected


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("selectors", [1, 2])
@given(st.integers(0, 10**6), st.integers(4, 8), st.integers(1, 3), st.sampled_from([(1, 1), (3, 1), (2, 2)]))
@settings(max_examples=10, deadline=None)
def test_added_selection_heads_evict_whom_the_simulator_evicts(
    selectors, subtract, seed, budget, evict_every, safe
):
    """Outputs too: of each head over what its key head holds, from the formula."""
    options = {"n_kv_heads": 2, "selector": "added", "selectors": selectors, "select_dim": 5}
    layer = layer_of("gqa", "selective", subtract=subtract, **options)
    length, generator = 20, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for projection in (layer.score.select_q, layer.score.select_k):
            projection.weight.copy_(
                torch.randn(projection.weight.shape, generator=generator, dtype=torch.float64)
            )
    x = torch.randn(1, length, 16, dtype=torch.float64, generator=generator)
    how = {"budget": budget, "evict_every": evict_every, "grace": safe[0], "first": safe[1]}
    everyone = torch.ones(1, length, dtype=torch.bool)
    out, held, _ = run(layer, x, everyone, [1] * length, **how)
    with torch.no_grad():
        q, memory = layer.project(x, torch.arange(length)[None])
        select_q, select_k, _ = layer.score.selection(x, layer.scale)
        cast = (select_q @ select_k.mT * layer.scale)[0].relu().tril(-1)
        cast[:, :, 0] = 0
        heads = []
        for h in range(4):
            group = h // 2
            votes = cast[group if selectors == 2 else 0]
            mask = eviction_mask(votes[None], **how)[0]
            rows = simulate(votes.tolist(), budget, evict_every, [True] * length, None, *safe)
            assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == rows
            assert [set(step[group if selectors == 2 else 0]) for step in held] == rows
            logits = q[0, h] @ memory["k"][0, group].T * layer.scale
            logits = logits - (votes.cumsum(0) - votes) * subtract
            heads.append(logits.masked_fill(~mask, -torch.inf).softmax(-1) @ memory["v"][0, group])
        torch.testing.assert_close(out, layer.aggregate(torch.stack(heads)[None]))


@pytest.mark.parametrize("selectors", [1, 2])
@given(
    st.integers(0, 10**6),
    st.integers(4, 8),
    st.sampled_from([(1, 1), (3, 1), (2, 2)]),
    st.sampled_from([[1] * 20, [20], [7, 1, 1, 11]]),
)
@settings(max_examples=10, deadline=None)
def test_a_retention_evicts_by_what_each_token_said(selectors, seed, budget, safe, pieces):
    """F = c + a n after n later queries, in a plain loop."""
    options = {"n_kv_heads": 2, "selector": "retention", "selectors": selectors, "select_dim": 3}
    layer = layer_of("gqa", "selective", subtract=False, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layer.score.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        x = torch.randn(1, 20, 16, dtype=torch.float64, generator=generator)
        said = torch.nn.functional.softplus(layer.score.retain(x))[0].T.tolist()
    how = {"budget": budget, "grace": safe[0], "first": safe[1]}
    _, held, _ = run(layer, x, torch.ones(1, 20, dtype=torch.bool), pieces, **how)
    for r in range(selectors):
        own, votes = said[r], said[selectors + r]
        alive: list[int] = []
        ends = [sum(pieces[: i + 1]) - 1 for i in range(len(pieces))]
        for t in range(20):
            alive.append(t)
            if len(alive) > budget:
                may = [j for j in alive if safe[1] <= j <= t - safe[0]]
                alive.remove(max(may, key=lambda j: (own[j] + votes[j] * (t - 1 - j), -j)))
            if t in ends:
                assert set(held[ends.index(t)][r]) == set(alive)


@pytest.mark.parametrize("pieces", [[1] * 300, [300], [7, 250, 43]], ids=["single", "whole", "pieces"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_retention_counts_exactly_in_float32(exact, pieces, monkeypatch):
    """F is c + a n to the last bit in every way of running, so that rounding says nowhere who goes."""
    if not exact:
        monkeypatch.setattr(selective_module, "STEPS", 2.0**60)  # not rounded
    layer = layer_of("gqa", "selective", subtract=False, n_kv_heads=2, selector="retention").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        last = layer.score.retain[2].weight
        last.copy_(torch.randn(last.shape, generator=generator) * 0.1)
    x = torch.randn(1, 300, 16, generator=generator)
    _, _, memory = run(layer, x, torch.ones(1, 300, dtype=torch.bool), pieces, budget=400)
    with torch.no_grad():
        said = [layer.score.selection(part, layer.scale) for part in x.split(pieces, 1)]
    k, own = torch.cat([part.k for part in said], 2), torch.cat([part.own_votes for part in said], 2)
    later = 299 - torch.arange(300, dtype=torch.float64)
    expected = own[0, 0].double() + k[0, 0, :, 0].double() * later
    got = memory.scores[0, :300].double()[memory.positions[0, :300].argsort()]
    assert torch.equal(got[1:], expected[1:]) == exact  # nobody votes on the first token
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-4, atol=1e-4)


def test_a_threshold_needs_votes_that_are_subtracted():
    layer, cache = layer_of("mha", "selective", subtract=False), EvictingCache(None, threshold=3.0)
    with torch.no_grad(), pytest.raises(ValueError, match="only say who goes: use a budget"):
        layer(torch.randn(1, 5, 16, dtype=torch.float64), cache=cache)


@pytest.mark.parametrize("budget", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("pieces", [[1] * 20, [20]], ids=["single", "whole"])
def test_streaming_keeps_sinks_and_a_window(budget, pieces):
    """The window is one token at least; the oldest sinks are the last to give way."""
    layer = layer_of("mha", "softmax")
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    everyone, sinks = torch.ones(1, 20, dtype=torch.bool), min(4, budget - 1)
    _, held, _ = run(layer, x, everyone, pieces, budget=budget, policy="streaming")
    assert held[-1][0] == [*range(sinks), *range(20 - budget + sinks, 20)]


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


SIZES = [
    ("mha", "selective", {"budget": 7}, {}),
    ("gqa", "selective", {"budget": 5, "evict_every": 3}, {"n_kv_heads": 2}),
    ("mqa", "softmax", {"budget": 6, "policy": "h2o"}, {}),
    ("mha", "softmax", {"budget": 6, "policy": "streaming", "evict_every": 2}, {}),
    ("sas", "selective", {"budget": 4, "threshold": 2.0}, {}),
    ("sas", "selective", {"budget": 4}, {"cache": "compact"}),
    ("mha", "selective", {"budget": None, "threshold": 3.0, "block": 4}, {}),
]


@pytest.mark.parametrize("case", SIZES, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("single", [True, False], ids=["single", "pieces"])
def test_bytes_are_the_slots_times_the_bytes_of_a_token(case, single):
    attention, score, rule, options = case
    layer, memory = layer_of(attention, score, **options).float(), EvictingCache(**rule)
    per_token = layer.config.cache_bytes_per_token() + 8  # and its position
    per_token += 4 if memory.policy.name != "selective" else 0  # its score
    per_row = 8 + (0 if memory.rule.threshold is None else 4 + 2 * 4)  # what arrived; what is lost, two sizes
    bound, peak = memory.rule.n_slots, 0
    with torch.no_grad():
        for _ in range(30 if single else 6):
            layer(torch.randn(3, 1 if single else 5, 16), cache=memory)
            slots = memory.positions.shape[1]
            assert memory.nbytes == 3 * (slots * per_token + per_row)
            held = [t for group in memory.slots.groups for t in group.values()] + [*(memory._bound or ())]
            assert memory.nbytes == sum(t.untyped_storage().nbytes() for t in held)
            peak = max(peak, memory.nbytes)
            assert memory.peak_bytes >= peak
            if bound is None:
                assert slots % 4 == 0
                assert memory.kept <= slots <= memory.seen + 4
            else:
                assert slots == bound
    of_a_token = 3 * (layer.config.cache_bytes_per_token() - layer.score.config.state_bytes_per_token(4))
    if single:
        assert memory.peak_bytes <= peak + of_a_token
    elif bound is not None:  # the piece was there beside the slots
        assert memory.peak_bytes >= peak + 5 * of_a_token
    memory.reset()
    assert (memory.nbytes, memory.peak_bytes, memory.kept, memory.evicted) == (0, 0, 0, 0)


def test_slots_grow_only_as_far_as_tokens_are_held():
    """With a threshold that evicts much, a long text leaves few slots."""
    layer = layer_of("mha", "selective")
    x = torch.randn(1, 300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        single, whole = (EvictingCache(None, threshold=1.0, block=8) for _ in range(2))
        for t in range(300):
            layer(x[:, t : t + 1], cache=single)
        layer(x, cache=whole)
    assert single.kept == whole.kept < 60
    assert whole.n_slots == -(-whole.kept // 8) * 8
    assert single.n_slots <= 96


@pytest.mark.parametrize(
    "rule", [{}, {"evict_every": 5}, {"evict_every": 10**12}, {"threshold": 50.0}], ids=str
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_budget_beyond_the_text_takes_the_slots_of_the_text(monkeypatch, rule, padded):
    """Slots come as tokens do, whatever the budget; what is computed is the same."""
    monkeypatch.setattr(cache_module, "AT_ONCE", 16)
    layer = layer_of("mha", "selective")
    x = torch.randn(2, 300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 300, dtype=torch.bool)
    if padded:
        mask[0, :40] = mask[1, 50:60] = False
    with torch.no_grad():
        expected = layer(x, key_mask=mask, cache=EvictingCache(300, **rule))
        for first in (1, 7, 300):
            memory, outputs = EvictingCache(10**12, block=8, **rule), []
            for start in (0, *range(first, 300)):
                piece = slice(start, first if start == 0 else start + 1)
                own = mask[:, piece] if padded else None
                outputs.append(layer(x[:, piece], key_mask=own, cache=memory))
            torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-12, rtol=0)
            assert memory.kept <= memory.n_slots <= 1.5 * memory.kept + 16
            assert memory.n_slots % 8 == 0


def test_slots_grow_up_to_the_bound(monkeypatch):
    monkeypatch.setattr(cache_module, "AT_ONCE", 16)
    layer = layer_of("mha", "selective")
    x = torch.randn(1, 300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = layer(x, cache=EvictingCache(90))
        monkeypatch.setattr(cache_module, "AT_ONCE", 1024)
        torch.testing.assert_close(layer(x, cache=EvictingCache(90)), whole)
        monkeypatch.setattr(cache_module, "AT_ONCE", 16)
        memory = EvictingCache(90, block=8)
        outputs, slots = [], []
        for t in range(300):
            if t == 50:  # what is taken back leaves the slots that came
                memory.recording = True
                layer(x[:, 50:80], cache=memory)
                memory.crop(30)
                memory.recording = False
            outputs.append(layer(x[:, t : t + 1], cache=memory))
            slots.append(memory.n_slots)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=1e-12, rtol=0)
    assert slots == sorted(slots)
    assert (slots[0], slots[-1]) == (16, 90)


def test_more_tokens_than_any_text_has():
    for name in ("budget", "evict_every", "grace", "first"):
        with pytest.raises(ValueError, match=f"{name} must be at most .*, got 1000"):
            EvictingCache(**{"budget": 10**40 + 2 if name in ("grace", "first") else 5, name: 10**39})


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


@pytest.mark.parametrize("score", ["selective", "softmax"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(("held", "new"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("counted", [True, False], ids=["", "positions given"])
def test_another_batch_is_refused(score, length, held, new, counted):
    """One row would be broadcast to all."""
    layer = layer_of("mha", score)
    memory = EvictingCache(4, "selective" if score == "selective" else "streaming")
    with torch.no_grad():
        layer(torch.randn(held, 6, 16, dtype=torch.float64), cache=memory)
        with pytest.raises(ValueError, match=f"holds {held} sequences but got {new} new ones"):
            positions = None if counted else torch.arange(6, 6 + length)[None]
            layer(torch.randn(new, length, 16, dtype=torch.float64), positions=positions, cache=memory)


class TwoSelectors(EvictableScore):
    """Two selection heads, as `selective_attention` takes them: the votes are (B, 2, S)."""

    state_names = ["soft_mask"]

    def forward(self, q, k, v, *, x, state, key_mask, segment_ids, scale):
        select = {"select_q": q[:, :2], "select_k": k[:, :2], "soft_mask": state.get("soft_mask")}
        masks = {"key_mask": key_mask, "segment_ids": segment_ids}
        out, soft_mask = selective_attention(q, k, v, scale=scale, **select, **masks)
        return out, {"soft_mask": soft_mask}

    def attend(self, q, k, v, *, x, state, visible, voted, scale):
        select = (q[:, :2], k[:, :2], scale)
        out, soft_mask = selective_reference(q, k, v, select, state.get("soft_mask"), visible, voted, scale)
        return out, {"soft_mask": soft_mask}

    def running_state(self, q, k, state, voted, scale):
        return torch.zeros(voted.shape, dtype=q.dtype)

    def logits(self, q, k, **rest):
        return torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)


@pytest.fixture
def two_selectors(monkeypatch):
    monkeypatch.setattr(SCORES, "forms", dict(SCORES.forms))
    register_score("two_selectors")(TwoSelectors)
    return layer_of("mha", "two_selectors")


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(
    "rule",
    [{"budget": 3}, {"budget": 3, "evict_every": 2}, {"budget": None, "threshold": 2.0}]
    + [{"budget": 3, "policy": policy} for policy in ("streaming", "h2o", "tova", "keydiff")],
    ids=lambda rule: "-".join(map(str, rule.values())),
)
def test_two_selection_heads_do_not_go_with_eviction(two_selectors, length, padded, rule):
    """A slot is free only if both heads let its token go: refused, never guessed."""
    x = torch.randn(2, length, 16, dtype=torch.float64)
    mask = torch.ones(2, length, dtype=torch.bool) if padded else None
    with torch.no_grad(), pytest.raises(ValueError, match=r"needs one selection head \(R = 1\)"):
        two_selectors(x, key_mask=mask, cache=EvictingCache(**rule))
    assert two_selectors(x, cache=LayerCache()).shape == x.shape


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_no_part_can_be_trained_through(name: str):
    layer = build("mha", "selective", d_model=16, n_heads=4).requires_grad_(False)
    getattr(layer, name).requires_grad_(True)
    cache = EvictingCache(4)
    with torch.no_grad():
        layer(torch.randn(1, 6, 16), cache=cache)
    for n in (1, 3):
        with pytest.raises(RuntimeError, match="cannot be trained through"):
            layer(torch.randn(1, n, 16), cache=cache)
    with torch.no_grad():
        layer(torch.randn(1, 1, 16), cache=cache)


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


def test_another_precision_is_refused():
    layer = layer_of("mha", "selective").float()
    memory, x = EvictingCache(4), torch.randn(1, 3, 16)
    with torch.no_grad():
        layer(x, cache=memory)
        with pytest.raises(TypeError, match=r"the cache holds k in torch.float32, got torch.float64"):
            layer.double()(x.double(), cache=memory)
        with pytest.raises(TypeError, match=r"the cache holds k in torch.float32"):
            layer(x[:, :1].double(), cache=memory)


@pytest.mark.parametrize("policy", ["selective", "h2o", "tova", "snapkv", "keydiff"])
def test_nan_is_named(policy):
    """A weight that is not a number: nobody is found to go."""
    layer = layer_of("mha", "selective", qk_norm=False)
    with torch.no_grad():
        layer.k_proj.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=rf"policy '{policy}' are not numbers, .* infinities in k of"):
            layer(torch.randn(1, 37, 16, dtype=torch.float64), cache=EvictingCache(5, policy))


@pytest.mark.parametrize("policy", ["h2o", "tova", "snapkv", "keydiff"])
def test_scores_are_as_wide_as_the_layer(policy):
    layer = layer_of("mha", "selective")
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    with torch.no_grad():
        for pieces in (40, 1):
            memory = EvictingCache(9, policy)
            for start in range(0, 40, pieces):
                layer(x[:, start : start + pieces], cache=memory)
            assert memory.scores.dtype == torch.float64
        memory = EvictingCache(9, policy)
        layer.float()(x.float(), cache=memory)
        assert memory.scores.dtype == torch.float32


def test_a_tie_in_float32_is_none_in_float64():
    """What two tokens were paid differs by less than float32 can tell from what they had before."""
    policy, weights = POLICIES["h2o"](), torch.tensor([[[0.5, 0.5, 1e-9, 0.0]]], dtype=torch.float64)
    scores = policy.start(torch.arange(4)[None]).double() - 1
    scores = policy.update(scores, weights, torch.tensor([[3]]))
    assert scores[0, 2] < scores[0, 3]
    assert scores.float()[0, 2] == scores.float()[0, 3]
