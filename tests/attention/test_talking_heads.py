"""Talking heads against plain float64 loops: the start, blocks of queries, policies that see mixed weights."""

import math

import pytest
import torch

from heedful.attention import EvictingCache, build, explicit, param_groups

SIZES = {"d_model": 16, "n_heads": 4, "init_logit_std": 2.0}
HOSTS = [("mha", {}), ("gqa", {"n_kv_heads": 2}), ("sas", {"kernel_size": 1})]


def layer_of(attention="mha", **options):
    """With mixtures far from the identity, and weights below 0 among them."""
    torch.manual_seed(0)
    layer = build(attention, "talking_heads", **SIZES, **options).double()
    with torch.no_grad():
        for mixture in layer.score.parameters():
            mixture.add_(0.5 * torch.randn_like(mixture))
    return layer


def text(length, batch=1, dtype=torch.float64):
    return torch.randn(batch, length, 16, dtype=dtype, generator=torch.Generator().manual_seed(3))


def formula(layer, x, held=None):
    """The outputs of one row, and the mixed weights of each query by key, in loops."""
    with torch.no_grad():
        q, memory = layer.project(x, torch.arange(x.shape[1])[None])
        k, v = layer.keys_values(memory)
        n_heads, length = q.shape[1:3]
        times = n_heads // k.shape[1]
        products = [(q[0, g] @ k[0, g // times].T * layer.scale).tolist() for g in range(n_heads)]
        before, after = layer.score.mix_logits.tolist(), layer.score.mix_weights.tolist()
        out, paid = q.new_zeros(1, n_heads, length, v.shape[-1]), []
        for i in range(length):
            keys = range(i + 1) if held is None else held[i]
            logits = [[products[g][i][j] for j in keys] for g in range(n_heads)]
            soft = []
            for h in range(n_heads):
                row = [
                    math.exp(math.fsum(before[h][g] * logits[g][n] for g in range(n_heads)))
                    for n in range(len(keys))
                ]
                soft.append([e / math.fsum(row) for e in row])
            weights = [
                [math.fsum(after[h][g] * soft[g][n] for g in range(n_heads)) for n in range(len(keys))]
                for h in range(n_heads)
            ]
            for h in range(n_heads):
                for n, j in enumerate(keys):
                    out[0, h, i] += weights[h][n] * v[0, h // times, j]
            paid.append({j: sum(abs(weights[h][n]) for h in range(n_heads)) for n, j in enumerate(keys)})
        return layer.aggregate(out), paid


@pytest.mark.parametrize(("attention", "options"), HOSTS, ids=[name for name, _ in HOSTS])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_formula(attention, options, impl, monkeypatch):
    monkeypatch.setattr(explicit, "BLOCK", 5)
    layer, x = layer_of(attention, impl=impl, **options), text(13)
    torch.testing.assert_close(layer(x), formula(layer, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["mqa", "sas"])
def test_it_starts_as_softmax(attention):
    layer, plain = (build(attention, score, **SIZES).double() for score in ("talking_heads", "softmax"))
    plain.load_state_dict({n: t for n, t in layer.state_dict().items() if not n.startswith("score.")})
    torch.testing.assert_close(layer(text(9)), plain(text(9)), rtol=0, atol=1e-14)


def test_weight_decay_leaves_the_identity_alone():
    layer = build("mha", "talking_heads", **SIZES)
    decayed, kept = (group["params"] for group in param_groups(layer, 0.1))
    for mixture in layer.score.parameters():
        assert any(p is mixture for p in kept)
        assert not any(p is mixture for p in decayed)


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_agree_forward_and_backward(masked, monkeypatch):
    """Blocks that do not divide the length, padding, segments, and earlier keys."""
    monkeypatch.setattr(explicit, "BLOCK", 8)
    generator, x, masks = torch.Generator().manual_seed(5), text(37, batch=2), {}
    if masked:
        masks["key_mask"] = torch.rand(2, 37, generator=generator) > 0.2
        masks["segment_ids"] = torch.randint(0, 3, (2, 37), generator=generator)
    results = []
    for impl in ("reference", "auto"):
        layer, given = layer_of("gqa", n_kv_heads=2, impl=impl), x.clone().requires_grad_()
        out = layer(given, **masks)
        gradients = torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])
        results.append([out, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("policy", ["streaming", "h2o", "tova", "snapkv", "keydiff"])
@torch.no_grad()
def test_every_way_under_a_budget_is_the_formula(policy):
    layer, x = layer_of("gqa", n_kv_heads=2), text(20)
    cache, held, outs = EvictingCache(6, policy), [], []
    for token in x.split(1, dim=1):
        outs.append(layer(token, cache=cache))
        held.append(sorted(p for p in cache.positions[0].tolist() if p >= 0))
    expected, paid = formula(layer, x, held)
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=0, atol=1e-12)
    pieces = EvictingCache(6, policy)
    outs = [layer(piece, cache=pieces) for piece in x.split([9, 1, 10], dim=1)]
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=0, atol=1e-12)
    if policy == "tova":  # who goes is who was paid least, in size, after mixing
        for i in range(6, 20):
            (gone,) = set(held[i - 1]) - set(held[i])
            assert gone == min(held[i - 1][1:], key=lambda j: paid[i - 1][j])


def test_bfloat16_is_close():
    layer = layer_of().bfloat16()
    exact = layer_of()
    exact.load_state_dict(layer.state_dict())
    x = text(65, batch=3, dtype=torch.bfloat16)
    out, expected = layer(x), exact(x.double())
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 0.02
