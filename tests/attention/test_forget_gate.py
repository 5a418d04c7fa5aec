"""Forgetting attention against plain float64 loops, precise at long contexts, and exact under every policy."""

import math

import pytest
import torch

from heedful.attention import EvictingCache, LayerCache, build, forgetting
from heedful.attention.eviction import POLICIES
from heedful.attention.eviction.streaming import StreamingPolicy
from heedful.ops.decay import RunningSums, decay_reference

SIZES = {"d_model": 16, "n_heads": 4, "init_logit_std": 2.0}
HOSTS = [("mha", {}), ("gqa", {"n_kv_heads": 2}), ("sas", {"kernel_size": 1})]
POLICIES_TO_TRY = ["streaming", "h2o", "tova", "snapkv", "keydiff", "random"]


def layer_of(attention="mha", **options):
    torch.manual_seed(0)
    layer = build(attention, "forgetting", **{**SIZES, **options}).double()
    with torch.no_grad():
        layer.score.gate_proj.bias.copy_(torch.linspace(-1, 3, layer.score.n_heads))
    return layer


def text(length, batch=1, dtype=torch.float64):
    return torch.randn(batch, length, 16, dtype=dtype, generator=torch.Generator().manual_seed(3))


def formula(layer, x, held=None):
    """The outputs of one row by loops over heads, queries and keys; `held[i]` are the keys of query i."""
    with torch.no_grad():
        q, memory = layer.project(x, torch.arange(x.shape[1])[None])
        k, v = layer.keys_values(memory)
        gate, (n_heads, length) = layer.score.gate_proj, q.shape[1:3]
        out = q.new_zeros(1, n_heads, length, v.shape[-1])
        for h in range(n_heads):
            g = h * k.shape[1] // n_heads
            gates = (x[0] @ gate.weight[h] + gate.bias[h]).tolist()
            log_f = [-math.log1p(math.exp(-number)) for number in gates]
            products = (q[0, h] @ k[0, g].T * layer.scale).tolist()
            for i in range(length):
                keys = range(i + 1) if held is None else held[i]
                logits = [products[i][j] + math.fsum(log_f[j + 1 : i + 1]) for j in keys]
                total = math.fsum(math.exp(logit) for logit in logits)
                for j, logit in zip(keys, logits, strict=True):
                    out[0, h, i] += math.exp(logit) / total * v[0, g, j]
        return layer.aggregate(out)


@pytest.mark.parametrize(("attention", "options"), HOSTS, ids=[name for name, _ in HOSTS])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_formula(attention, options, impl):
    layer, x = layer_of(attention, impl=impl, **options), text(13)
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_flex_of_an_empty_batch():
    layer = layer_of(impl="flex")
    assert layer(text(5, batch=0)).shape == (0, 5, 16)
    assert layer(text(0, batch=2)).shape == (2, 0, 16)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_the_formula_and_trains_on_a_gpu_alone():
    for attention, options in HOSTS:
        layer, x = layer_of(attention, impl="flex", **options), text(13)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), formula(layer, x), rtol=0, atol=1e-12)
        with pytest.raises(
            ValueError, match="impl='flex' cannot run here: FlexAttention has gradients on NVIDIA"
        ):
            layer(x)


def test_the_gates_start_at_their_bias():
    for bias in (0.0, 5.0):
        layer = build("mha", "forgetting", **SIZES, gate_bias=bias)
        assert torch.equal(layer.score.gate_proj.bias, torch.full((4,), bias))


def test_a_gate_that_is_open_is_softmax():
    layer, plain = layer_of(), build("mha", **SIZES).double()
    plain.load_state_dict({n: t for n, t in layer.state_dict().items() if not n.startswith("score.")})
    with torch.no_grad():
        layer.score.gate_proj.bias.fill_(800.0)
    torch.testing.assert_close(layer(text(9)), plain(text(9)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_implementations_agree_forward_and_backward(segments, fused, monkeypatch):
    """In blocks, with padding, and with segments whose tokens lie among each other."""
    monkeypatch.setattr(forgetting, "decay_fuses", lambda device, n_queries: fused and n_queries > 1)
    monkeypatch.setattr(forgetting, "BLOCK", 16)
    x, length = text(67, batch=2), 67
    generator = torch.Generator().manual_seed(5)
    masks = {"key_mask": torch.rand(2, length, generator=generator) > 0.2}
    if segments:
        masks["segment_ids"] = torch.randint(0, 3, (2, length), generator=generator)
    results = []
    for impl in ("reference", "sdpa"):
        layer, given = layer_of("gqa", n_kv_heads=2, impl=impl), x.clone().requires_grad_()
        out = layer(given, **masks)
        gradients = torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])
        results.append([out, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert not results[1][1][~masks["key_mask"]].any()


@pytest.mark.parametrize("bias", [-3.0, 0.0, 3.0, 7.0])
@pytest.mark.parametrize("impl", ["differences", "reference"])
def test_long_contexts_in_float32(impl, bias):
    """At 8,192 tokens the decay is off by its own rounding, not by that of the sum over the text."""
    generator, length, queries = torch.Generator().manual_seed(1), 8192, 16
    gates = bias + torch.randn(1, 2, length, generator=generator, dtype=torch.float64)
    steps = torch.nn.functional.softplus(-gates)
    exact = RunningSums.of(steps, None).decay(None, length - queries, length)
    sums = steps.cumsum(-1)
    torch.testing.assert_close(exact, sums[..., -queries:, None] - sums[..., None, :], rtol=0, atol=1e-10)
    if impl == "differences":
        found = RunningSums.of(steps.float(), None).decay(None, length - queries, length)
    else:  # what a cache does: the state of earlier keys grows step by step
        counts = torch.ones(1, queries, length, dtype=torch.bool).tril(length - queries - 1)
        before = length - queries
        earlier = RunningSums.of(steps.float(), None).decay(None, before - 1, before)[:, :, 0]
        found = decay_reference(steps.float()[..., -queries:], earlier, counts)
    matters = (exact >= 0) & (exact < 100)  # what weighs at least exp(-100)
    assert matters.sum() > 100
    error = (found.double() - exact)[matters].abs()
    allowed = 2e-6 * exact[matters].clamp(min=1.0)  # the steps themselves are rounded to 6e-8
    assert (error <= allowed).all(), (error / allowed).max()
    naive = steps.float().cumsum(-1)
    lost = (naive[..., -queries:, None] - naive[..., None, :]).double() - exact
    assert bias > 0 or lost[matters].abs().max() > 1e-4


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("bias", [-2.0, 2.0])
def test_a_long_text_in_float32_is_that_in_float64(segments, bias):
    """Outputs and gradients, of 3,000 tokens, of which at gates of -2 a sum over the text reaches 6,000."""
    x, masks, results = text(3000), {}, []
    if segments:
        masks["segment_ids"] = torch.arange(3000)[None] // 700 % 3  # the first comes again at the end
    for dtype in (torch.float64, torch.float32):
        layer, given = layer_of().to(dtype), x.to(dtype).requires_grad_()
        with torch.no_grad():
            layer.score.gate_proj.bias.fill_(bias)
        out = layer(given, **masks)
        wanted = [given, layer.q_proj.weight, layer.k_proj.weight, layer.score.gate_proj.weight]
        results.append([out, *torch.autograd.grad(out.sin().sum(), wanted)])
    for exact, found, allowed in zip(*results, [3e-6, 5e-6, 5e-6, 5e-6, 3e-5], strict=True):
        error = (found.double() - exact).abs().max() / exact.abs().max()
        assert error < allowed, error


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
@torch.no_grad()
def test_no_length_is_less_exact(scale):
    """In float32, where the last block has one query, some, or nearly all; gates as shut as inputs make them.

    A product of few queries adds its features up in another order.
    """
    for length in (1, 2, 9, 40, 128, 129, 130, 137, 160, 255, 258, 1030, 1100):
        x, layer = text(length).float() * scale, layer_of("gqa", n_kv_heads=2, impl="auto").float()
        plain = layer_of("gqa", n_kv_heads=2, impl="reference").float()
        exact = layer_of("gqa", n_kv_heads=2, impl="reference")(x.double())
        errors = [(form(x) - exact).abs().max() / exact.abs().max() for form in (layer, plain)]
        assert errors[0] < 4 * errors[1] + 1e-6, (length, errors)


def test_the_state_of_thousands_of_tokens_in_float32():
    """However the tokens are fed, it is that of float64."""
    layer, x = layer_of(), text(2000)
    with torch.no_grad():
        layer.score.gate_proj.bias.fill_(6.0)
        states = []
        for dtype in (torch.float64, torch.float32):
            cache, module = LayerCache(), layer.to(dtype)
            for piece in x.to(dtype).split([1000, *[1] * 60, 940], dim=1):
                module(piece, cache=cache)
            states.append(cache.state["decay"].double())
    assert states[0].max() > 3
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-6)


def held_by(policy, layer, x, budget):
    """For every query the positions held, from a cache fed token by token."""
    cache, rows = EvictingCache(budget, policy), []
    for token in x.split(1, dim=1):
        layer(token, cache=cache)
        rows.append(sorted(p for p in cache.positions[0].tolist() if p >= 0))
    return rows


@pytest.mark.parametrize("policy", POLICIES_TO_TRY)
@torch.no_grad()
def test_decay_is_exact_whoever_is_evicted(policy):
    """Whole, in pieces and token by token, the outputs are those of the formula over what is held."""
    layer, x = layer_of("gqa", n_kv_heads=2), text(23)
    held = held_by(policy, layer, x, 6)
    expected = formula(layer, x, held)
    assert any(len(row) < i + 1 for i, row in enumerate(held))
    ones = torch.ones(1, 23, dtype=torch.bool)
    for sizes in ([1] * 23, [23], [9, 1, 1, 12]):
        for mask in (None, ones):
            cache, outs, start = EvictingCache(6, policy), [], 0
            for n in sizes:
                here = None if mask is None else mask[:, start : start + n]
                outs.append(layer(x[:, start : start + n], key_mask=here, cache=cache))
                start += n
            torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=0, atol=1e-12)
            assert sorted(cache.positions[0].tolist()) == held[-1]


@torch.no_grad()
def test_attention_policies_see_what_is_left_after_decay():
    """The token that tova lets go is the one with the least weight by the formula, decay included."""
    layer, x = layer_of(), text(20)
    q, memory = layer.project(x, torch.arange(20)[None])
    log_f = torch.nn.functional.logsigmoid(layer.score.gate_proj(x))[0].T  # (H, T)
    logits = q[0] @ memory["k"][0].mT * layer.scale
    held, expected = [], []
    for i in range(20):
        if len(held) == 5:
            held.remove(min(held[1:], key=lambda j: weights[j]))
        held.append(i)
        row = logits[:, i, held] + torch.stack([log_f[:, j + 1 : i + 1].sum(-1) for j in held], dim=-1)
        weights = dict(zip(held, row.softmax(-1).sum(0).tolist(), strict=True))
        expected.append(list(held))
    assert held_by("tova", layer, x, 5) == expected
    plain = build("mha", **SIZES).double()
    plain.load_state_dict({n: t for n, t in layer.state_dict().items() if not n.startswith("score.")})
    assert held_by("tova", plain, x, 5) != expected


@torch.no_grad()
def test_rows_padded_and_rolled_back_under_a_budget():
    layer, x = layer_of(), text(30, batch=2)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :11] = False
    whole = layer(x, key_mask=mask, cache=EvictingCache(7, "streaming"))
    alone = layer(x[1:, 11:], cache=EvictingCache(7, "streaming"))
    torch.testing.assert_close(whole[1:, 11:], alone, rtol=0, atol=1e-12)
    cache = EvictingCache(7, "streaming")
    layer(x[:, :20], key_mask=mask[:, :20], cache=cache)
    cache.recording = True
    layer(text(4, batch=2), cache=cache)
    cache.crop(4)
    torch.testing.assert_close(layer(x[:, 20:], cache=cache), whole[:, 20:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_key_with_the_most_decay_is_the_oldest_in_every_head():
    """So a policy by decay would be a window: there is none, and one that asks for it is told so."""
    layer, x = layer_of(), text(12)
    cache = EvictingCache(8, "random")
    layer(x, cache=cache)
    order = cache.positions[0].argsort()
    assert (cache.slots.state["decay"][0, :, order].diff() <= 0).all()

    class ByDecay(StreamingPolicy):
        ranks_by = "decay"

    with pytest.raises(
        ValueError, match=r"ranks by 'decay', of which each head of score 'forgetting' has its own"
    ):
        layer(x, cache=EvictingCache(8, ByDecay()))
    with pytest.raises(ValueError, match="'selective' needs score 'selective', this layer has 'forgetting'"):
        layer(x, cache=EvictingCache(8))
    assert set(POLICIES_TO_TRY) == set(POLICIES) - {"selective"}


def test_bytes_of_both_caches():
    for attention, heads in (("mqa", 4), ("sas", 12)):
        layer = build(attention, "forgetting", **SIZES)
        plain = build(attention, **SIZES)
        assert layer.config.cache_bytes_per_token() - plain.config.cache_bytes_per_token() == 4 * heads
        with torch.no_grad():
            cache = EvictingCache(5, "streaming")
            layer(text(9, dtype=torch.float32), cache=cache)
        assert cache.nbytes == 5 * (layer.config.cache_bytes_per_token() + 8 + 4) + 8  # positions, scores


def test_bfloat16_decays_in_float32():
    layer = layer_of().bfloat16()
    cache = LayerCache()
    with torch.no_grad():
        out = layer(text(300, dtype=torch.bfloat16), cache=cache)
    assert out.dtype == torch.bfloat16
    assert cache.state["decay"].dtype == torch.float32
    expected = layer_of()
    expected.load_state_dict(layer.state_dict())
    error = (out.double() - expected(text(300, dtype=torch.bfloat16).double())).norm() / out.double().norm()
    assert error < 0.02
