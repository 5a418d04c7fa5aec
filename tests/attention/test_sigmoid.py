"""Sigmoid attention against plain float64 loops: what n is, alone, cached, padded, packed and under a budget."""

import math

import pytest
import torch

from heedful.attention import EvictingCache, LayerCache, build, explicit

SIZES = {"d_model": 16, "n_heads": 4, "init_logit_std": 2.0}
HOSTS = [("mha", {}), ("gqa", {"n_kv_heads": 2}), ("sas", {"kernel_size": 1})]


def layer_of(attention="mha", **options):
    torch.manual_seed(0)
    return build(attention, "sigmoid", **SIZES, **options).double()


def text(length, batch=1, dtype=torch.float64):
    return torch.randn(batch, length, 16, dtype=dtype, generator=torch.Generator().manual_seed(3))


def formula(layer, x, held=None):
    """The outputs of one row, and the weights of each query by key, summed over heads, in loops."""
    with torch.no_grad():
        q, memory = layer.project(x, torch.arange(x.shape[1])[None])
        k, v = layer.keys_values(memory)
        n_heads, length = q.shape[1:3]
        times = n_heads // k.shape[1]
        products = [(q[0, h] @ k[0, h // times].T * layer.scale).tolist() for h in range(n_heads)]
        out, paid = q.new_zeros(1, n_heads, length, v.shape[-1]), []
        for i in range(length):
            keys = range(i + 1) if held is None else held[i]
            n = layer.score.config.bias_length or len(keys)
            paid.append(dict.fromkeys(keys, 0.0))
            for h in range(n_heads):
                for j in keys:
                    weight = 1 / (1 + n * math.exp(-products[h][i][j]))
                    out[0, h, i] += weight * v[0, h // times, j]
                    paid[i][j] += weight
        return layer.aggregate(out), paid


@pytest.mark.parametrize(("attention", "options"), HOSTS, ids=[name for name, _ in HOSTS])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("bias_length", [None, 64])
def test_the_formula(attention, options, impl, bias_length, monkeypatch):
    monkeypatch.setattr(explicit, "BLOCK", 5)
    layer, x = layer_of(attention, impl=impl, bias_length=bias_length, **options), text(13)
    torch.testing.assert_close(layer(x), formula(layer, x)[0], rtol=0, atol=1e-12)


def test_weights_sum_to_about_one_at_any_length():
    """With logits around 0, as at the start; a fixed n fits one length alone."""
    logits = torch.zeros(1, 1, 4096, dtype=torch.float64)
    for bias_length, expected in ((None, [0.5, 0.94, 1.0]), (64, [0.015, 0.25, 63.0])):
        score = layer_of(bias_length=bias_length).score
        for keys, total in zip((1, 16, 4096), expected, strict=True):
            weights = score.weights(logits, torch.arange(4096)[None, None] < keys)
            assert weights.sum().item() == pytest.approx(total, rel=0.05)
            assert not weights[..., keys:].any()


@pytest.mark.parametrize("bias_length", [None, 64])
def test_blocks_agree_forward_and_backward(bias_length, monkeypatch):
    """Blocks that do not divide the length, padding and segments."""
    monkeypatch.setattr(explicit, "BLOCK", 8)
    generator, x = torch.Generator().manual_seed(5), text(37, batch=2)
    masks = {"key_mask": torch.rand(2, 37, generator=generator) > 0.2}
    masks["segment_ids"] = torch.randint(0, 3, (2, 37), generator=generator)
    results = []
    for impl in ("reference", "auto"):
        layer, given = layer_of(impl=impl, bias_length=bias_length), x.clone().requires_grad_()
        out = layer(given, **masks)
        results.append([out, *torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert not results[1][1][~masks["key_mask"]].any()


@pytest.mark.parametrize("bias_length", [None, 64])
@pytest.mark.parametrize("policy", ["streaming", "h2o", "tova", "snapkv", "keydiff"])
@torch.no_grad()
def test_every_way_under_a_budget_is_the_formula(policy, bias_length):
    layer, x = layer_of("gqa", n_kv_heads=2, bias_length=bias_length), text(20)
    cache, held, outs = EvictingCache(6, policy), [], []
    for token in x.split(1, dim=1):
        outs.append(layer(token, cache=cache))
        held.append(sorted(p for p in cache.positions[0].tolist() if p >= 0))
    expected, paid = formula(layer, x, held)
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=0, atol=1e-12)
    pieces = EvictingCache(6, policy)
    outs = [layer(piece, cache=pieces) for piece in x.split([9, 1, 10], dim=1)]
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=0, atol=1e-12)
    for i in range(6, 20):
        (gone,) = set(held[i - 1]) - set(held[i])
        movable = held[i - 1][1:]
        if policy == "tova":  # by the sigmoid weights, which sum to anything
            assert gone == min(movable, key=lambda j: paid[i - 1][j])
        if policy == "h2o":
            given = {j: sum(row.get(j, 0.0) for row in paid[:i]) for j in movable}
            assert gone == min((j for j in movable if i - j >= 3), key=given.get)


@torch.no_grad()
def test_a_fixed_n_leaves_the_weight_of_a_key_alone_whoever_is_evicted():
    """The output of a query is that of the full cache less what the evicted keys gave."""
    layer, x = layer_of(bias_length=32), text(12)
    full, _ = formula(layer, x)
    cache = EvictingCache(7, "streaming")
    held = layer(x, cache=cache)[:, -1]
    gone = sorted(set(range(12)) - set(cache.positions[0].tolist()))
    lost, _ = formula(layer, x, [[]] * 11 + [gone])
    torch.testing.assert_close(held + lost[:, -1], full[:, -1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_decoding_beyond_any_length_goes_on_as_one_pass():
    layer, x = layer_of(), text(300)
    cache = LayerCache()
    outs = [layer(piece, cache=cache) for piece in x.split([100, *[1] * 20, 180], dim=1)]
    torch.testing.assert_close(torch.cat(outs, dim=1), layer(x), rtol=0, atol=1e-13)


def test_bfloat16_is_close():
    layer = layer_of().bfloat16()
    exact = layer_of()
    exact.load_state_dict(layer.state_dict())
    x = text(65, batch=3, dtype=torch.bfloat16)
    out, expected = layer(x), exact(x.double())
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("value", [0, -4, 2.5, True])
def test_an_unsound_length_is_refused(value):
    with pytest.raises(ValueError, match="bias_length must be a whole number >= 1"):
        build("mha", "sigmoid", **SIZES, bias_length=value)
