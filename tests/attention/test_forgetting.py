"""The bound on what evictions have cost: no query of any head ever lost more attention than it says."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful.attention import Attention, build
from heedful.attention.eviction import EvictingCache
from heedful.hf import HeedfulCache

FORMS: dict[str, dict[str, Any]] = {
    "mha": {"attention": "mha"},
    "mha after rope": {"attention": "mha", "qk_norm_position": "after_rope"},
    "mha without norm": {"attention": "mha", "qk_norm": False},
    "gqa": {"attention": "gqa", "n_kv_heads": 2},
    "mqa without norm": {"attention": "mqa", "qk_norm": False},
    "sas": {"attention": "sas"},
    "sas compact": {"attention": "sas", "cache": "compact"},
    "mla": {"attention": "mla"},
    "sas linear": {"attention": "sas_linear", "n_kv_heads": 2},
    "sas compact without norm": {"attention": "sas", "cache": "compact", "qk_norm": False},
}
EXHAUSTIVE = {"mha after rope", "mqa without norm", "sas compact without norm", "gqa"}
forms = pytest.mark.parametrize(
    "form", [pytest.param(f, marks=[pytest.mark.exhaustive] * (f in EXHAUSTIVE)) for f in FORMS]
)
RULES: list[dict[str, Any]] = [
    {"budget": None, "threshold": 0.3},
    {"budget": None, "threshold": 4.0},
    {"budget": None, "threshold": 2.0, "evict_every": 3},
    {"budget": 6, "threshold": 2.0},
    {"budget": 4, "threshold": 1.0, "evict_every": 2},
    {"budget": 7, "threshold": 1.0, "grace": 4, "first": 3},
]


def layer_of(form: str, seed: int, **more: Any) -> Attention:
    """A layer with random gains, small and very large ones."""
    torch.manual_seed(seed)
    options = {"d_model": 16, "n_heads": 4, "init_logit_std": 1.0, **FORMS[form], **more}
    layer = build(score="selective", **options).double().eval()
    with torch.no_grad():
        for norm in ("q_norm", "k_norm") if layer.config.qk_norm else ():
            gain = getattr(layer, norm).weight
            gain.copy_(torch.randn_like(gain) * math.exp(random.Random(seed).uniform(-2, 1.5)))
    return layer


def full_weights(layer: Attention, x: Tensor) -> Tensor:
    """(H, T, T), the weights of full selective attention for one row, one number at a time from the formula."""
    length = x.shape[1]
    with torch.no_grad():
        q, memory = layer.project(x, torch.arange(length)[None])
        k, _ = layer.keys_values(memory)
    heads, groups, size = q.shape[1], k.shape[1], q.shape[-1]
    logits = torch.zeros(heads, length, length, dtype=torch.float64)
    for h in range(heads):
        logits[h] = q[0, h] @ k[0, h * groups // heads].T / math.sqrt(size)
    votes = [[0.0] * length for _ in range(length + 1)]  # F
    for i in range(length):
        for j in range(length):
            vote = max(float(logits[0, i, j]), 0.0) if 0 < j < i else 0.0
            votes[i + 1][j] = votes[i][j] + vote
    weights = torch.zeros_like(logits)
    for i in range(length):
        masked = logits[:, i, : i + 1] - torch.tensor(votes[i][: i + 1], dtype=torch.float64)
        weights[:, i, : i + 1] = masked.softmax(-1)
    return weights


def decode(layer: Attention, x: Tensor, pieces: list[int], **rule: Any) -> list[tuple[int, set[int], float]]:
    """After every piece: the tokens read, those that are gone, and the bound."""
    cache, seen, trace = EvictingCache(**{"block": 4, **rule}), 0, []
    with torch.no_grad():
        for n in pieces:
            layer(x[:, seen : seen + n], cache=cache)
            seen += n
            trace.append((seen, set(range(seen)) - set(cache.positions[0].tolist()), cache.forgotten.item()))
    return trace


def tokens(length: int, seed: int, *, uneven: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, 16, dtype=torch.float64, generator=generator)
    if uneven:  # some tokens far larger than others
        x = x * torch.randn(1, length, 1, dtype=torch.float64, generator=generator).exp()
    return x


@forms
@given(seed=st.integers(0, 10**6), rule=st.sampled_from(RULES), uneven=st.booleans())
@settings(max_examples=12)
def test_no_query_lost_more(form: str, seed: int, rule: dict[str, Any], uneven: bool):
    layer, x = layer_of(form, seed), tokens(24, seed, uneven=uneven)
    weights = full_weights(layer, x)
    trace = decode(layer, x, [1] * 24, **rule)
    before = 0.0
    for t, (seen, gone, bound) in enumerate(trace):
        assert seen == t + 1
        assert 0.0 <= bound <= 1.0
        assert bound >= before
        before = bound
        # With QK-norm what is gone by now costs no later query more; without, none so far.
        queries = weights[:, t:] if layer.config.qk_norm else weights[:, t : t + 1]
        lost = queries[..., sorted(gone)].sum(-1).max()
        assert lost <= bound * (1 + 1e-12)
    if layer.config.qk_norm:
        return
    final = trace[-1][2]
    assert all(weights[:, t, sorted(gone)].sum(-1).max() <= final for t, (_, gone, _) in enumerate(trace))


@forms
@given(seed=st.integers(0, 10**6), rule=st.sampled_from(RULES))
@settings(max_examples=5)
def test_the_bound_is_the_same_however_the_tokens_are_read(form: str, seed: int, rule: dict[str, Any]):
    layer, x, draw = layer_of(form, seed), tokens(20, seed, uneven=True), random.Random(seed)
    cut = sorted(draw.sample(range(1, 20), 4))
    pieces = [b - a for a, b in zip([0, *cut], [*cut, 20], strict=True)]
    traces = [{n: rest for n, *rest in decode(layer, x, p, **rule)} for p in ([1] * 20, pieces, [20])]
    for trace in traces[1:]:
        for seen, (gone, bound) in trace.items():
            assert gone == traces[0][seen][0]
            assert bound == pytest.approx(traces[0][seen][1], rel=1e-9)


@pytest.mark.parametrize("form", ["mha", "mha without norm"])
@pytest.mark.parametrize("single", [True, False], ids=["token by token", "at once"])
def test_padding_neither_costs_nor_widens_the_bound(form: str, single: bool):
    torch.manual_seed(3)
    layer = build(score="selective", d_model=16, n_heads=4, init_logit_std=0.2, **FORMS[form]).double().eval()
    x, mask = tokens(200, 3), torch.arange(200)[None] >= 5
    x[:, :5] *= 100.0  # padding may hold anything
    rule = {"budget": None, "threshold": 9.0, "block": 16}
    padded, alone = EvictingCache(**rule), EvictingCache(**rule)
    with torch.no_grad():
        for part in torch.arange(200).split(1 if single else 200):
            layer(torch.cat((x, x))[:, part], key_mask=torch.cat((mask, mask))[:, part], cache=padded)
        layer(x[:, 5:], cache=alone)
    torch.testing.assert_close(padded.forgotten, alone.forgotten.expand(2))
    assert 0 < alone.forgotten < 1
    assert padded.evicted == 2 * alone.evicted > 0


def test_small_where_the_threshold_is_large():
    """e^(2m - threshold) a token: nothing evicted costs more, and the paper's regime is nearly free."""
    torch.manual_seed(0)
    layer = build("mha", score="selective", d_model=16, n_heads=4, init_logit_std=0.2).double().eval()
    reach = 0.2 * math.sqrt(4)  # both gains are sqrt(0.2), D = 4
    x = tokens(240, 0)
    for threshold in (7.0, 9.0):
        _, gone, bound = decode(layer, x, [240], budget=None, threshold=threshold)[-1]
        assert len(gone) > 5
        assert 0 < bound <= len(gone) * math.exp(2 * reach - threshold)
        assert bound > 0.2 * len(gone) * math.exp(2 * reach - threshold)  # no vote adds much more than 1
    assert bound < 0.9
    _, gone, bound = decode(layer, x, [240], budget=None, threshold=1e4)[-1]
    assert (gone, bound) == (set(), 0.0)


def test_a_budget_that_bites_costs_more():
    """The budget evicts tokens that nobody voted away, and the bound says so."""
    layer, x = layer_of("mha", 1), tokens(40, 1)
    free = decode(layer, x, [40], budget=None, threshold=20.0)[-1]
    tight = decode(layer, x, [40], budget=3, threshold=20.0)[-1]
    assert len(tight[1]) == 37 > len(free[1])
    assert tight[2] == 1.0 > free[2]


def stage(pairs: list[tuple[list[float], list[float]]], **options: Any) -> tuple[Attention, Tensor]:
    """A layer of two heads of size 2 without positions whose q and k are what each token says, (q, k)."""
    layer = build("mha", score="selective", d_model=8, n_heads=2, head_dim=2, rope=False, **options).double()
    with torch.no_grad():
        layer.q_proj.weight.copy_(torch.eye(8)[:4])
        layer.k_proj.weight.copy_(torch.eye(8)[4:])
    return layer.eval(), torch.tensor([[[*q, *k] for q, k in pairs]], dtype=torch.float64)


def test_the_worst_case_nearly_reaches_the_bound():
    """Head 1 wants what head 0 voted away, and nothing else: a bound of half the size would be wrong."""
    gain = 2.0
    right, up = [1.0, 0.0], [0.0, 1.0]
    left = [-1.0, 0.0]
    first = ([*up, *up], [*up, *left])
    wanted = ([*up, *up], [*right, *right])
    voter = ([*right, *up], [*up, *left])
    seeker = ([*up, *right], [*up, *left])
    layer, x = stage([first, wanted, voter, voter, seeker, seeker], norm_eps=1e-12)
    with torch.no_grad():
        layer.q_norm.weight.fill_(gain)
        layer.k_norm.weight.fill_(gain)
    reach = gain**2 * math.sqrt(2)
    weights = full_weights(layer, x)
    trace = decode(layer, x, [1] * 6, budget=None, threshold=2 * reach * 0.99)
    assert [gone for _, gone, _ in trace] == [set()] * 4 + [{1}] * 2
    bound = trace[-1][2]
    lost = weights[1, 5, 1].item()
    assert bound == pytest.approx(1.0)  # two votes of m: e^(2m - 2m)
    assert lost > 0.1
    # Two voters more, and a token that weighs e^(2m - 4m) at most is all but forgotten.
    layer_x = torch.cat((x[:, :2], x[:, 2:3].expand(1, 4, 8), x[:, 4:]), dim=1)
    weights = full_weights(layer, layer_x)
    _, gone, bound = decode(layer, layer_x, [1] * 8, budget=None, threshold=4 * reach * 0.99)[-1]
    assert gone == {1}
    assert bound == pytest.approx(math.exp(-2 * reach))
    assert 0.1 * bound < weights[1, 6:, 1].max() <= bound


@pytest.mark.parametrize("rule", [{"budget": 20}, {"budget": None}], ids=["budget", "no budget"])
@pytest.mark.parametrize("pieces", [[1] * 8, [8]], ids=["single", "whole"])
def test_with_a_norm_the_bound_knows_of_queries_to_come(rule: dict[str, Any], pieces: list[int]):
    """Gains that nobody has made use of yet: the bound allows for them before they are."""
    right, up = [1.0, 0.0], [0.0, 1.0]
    first = ([*right, *right], [*up, 0.0, -1.0])
    wanted = ([*right, *right], [1.0, 1.0, 1.0, 1.0])
    voter = ([*right, *right], [*up, 0.0, -1.0])
    silent = ([-1.0, 0.0, *right], [*up, 0.0, -1.0])
    seeker = ([*right, *up], [*up, 0.0, -1.0])
    layer, x = stage([first, wanted, *[voter] * 4, silent, silent, seeker], norm_eps=1e-12)
    with torch.no_grad():
        layer.q_norm.weight.copy_(torch.tensor([1.0, 3.0]))
        layer.k_norm.weight.fill_(1.0)
    weights = full_weights(layer, x)
    _, gone, bound = decode(layer, x[:, :8], pieces, threshold=3.9, **rule)[-1]
    assert gone == {1}  # four votes of 1; of what has been seen so far, m = sqrt(2)
    assert math.exp(2 * math.sqrt(2) - 4) < weights[1, 8, 1] <= bound


@pytest.mark.parametrize("rule", [{"budget": 20}, {"budget": None}], ids=["budget", "no budget"])
@pytest.mark.parametrize("pieces", [[1] * 10, [7, 3], [10]], ids=["single", "pieces", "whole"])
def test_without_a_norm_a_late_query_may_want_a_large_key_that_is_gone(
    rule: dict[str, Any], pieces: list[int]
):
    """The largest key is evicted and overwritten before the largest query comes: m is the product of both."""
    zero = [0.0, 0.0]
    first = ([*zero, *zero], [*zero, *zero])
    large = ([*zero, *zero], [2.0, 0.0, 2.0, 0.0])
    voter = ([2.0, 0.0, *zero], [*zero, 0.02, 0.0])
    seeker = ([*zero, 8.0, 0.0], [*zero, 0.02, 0.0])
    layer, x = stage([first, large, *[voter] * 4, first, first, first, seeker], qk_norm=False)
    weights = full_weights(layer, x)
    reach = 2.0 * 2.0 / math.sqrt(2)  # of the queries and keys that were held together
    assert weights[1, 9, 1] > 10 * math.exp(2 * reach - 4 * reach)
    _, gone, bound = decode(layer, x, pieces, threshold=3.9 * reach, **rule)[-1]
    assert gone == {1}
    assert weights[1, 9, 1] <= bound


def test_only_with_a_threshold():
    with pytest.raises(ValueError, match="kept with a threshold"):
        _ = EvictingCache(4).forgotten
    with pytest.raises(ValueError, match="kept with a threshold"):
        _ = EvictingCache(4, "streaming").forgotten
    for cache in (HeedfulCache(2), HeedfulCache(2, 4)):
        with pytest.raises(ValueError, match="kept with a threshold"):
            _ = cache.forgotten
    assert EvictingCache(None, threshold=1.0).forgotten.numel() == 0  # nobody has been read
    with pytest.raises(ValueError, match="threshold must be a finite number greater than 0"):
        EvictingCache(None, threshold=0.0)
    with pytest.raises(ValueError, match="give a budget, a threshold, or both"):
        EvictingCache(None)
    with pytest.raises(ValueError, match="needs the policy 'selective', got 'h2o'"):
        EvictingCache(4, "h2o", threshold=1.0)
