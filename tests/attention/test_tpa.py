"""TPA against the paper's formula, written as loops."""

import math

import pytest
import torch
from torch import Tensor

from heedful.attention import TensorProductAttention, build, configure


def by_hand(layer: TensorProductAttention, x: Tensor) -> Tensor:
    """One row (T, C) -> (T, C), one product after the other."""
    c, weights = layer.config, dict(layer.named_parameters())
    length = x.shape[0]

    def heads_of(name: str, rank: int) -> Tensor:
        """(T, H, D): 1/R sum_r a_r b_r^T, b turned by position but for values."""
        out = torch.zeros(length, c.n_heads, c.size, dtype=x.dtype)
        for t in range(length):
            for r in range(rank):
                a = weights[f"{name}_heads.weight"][r * c.n_heads : (r + 1) * c.n_heads] @ x[t]
                b = weights[f"{name}_features.weight"][r * c.size : (r + 1) * c.size] @ x[t]
                if name != "v" and c.rope:
                    half, turned = c.size // 2, b.clone()
                    for i in range(half):
                        angle = t * c.rope_theta ** (-2 * i / c.size)
                        turned[i] = b[i] * math.cos(angle) - b[i + half] * math.sin(angle)
                        turned[i + half] = b[i + half] * math.cos(angle) + b[i] * math.sin(angle)
                    b = turned
                out[t] += torch.outer(a, b) / rank
        return out

    q, k, v = (heads_of(name, getattr(c, f"{name}_rank")) for name in "qkv")
    outs = torch.zeros(length, c.n_heads, c.size, dtype=x.dtype)
    for t in range(length):
        for h in range(c.n_heads):
            logits = torch.stack([q[t, h] @ k[s, h] for s in range(t + 1)]) / math.sqrt(c.size)
            outs[t, h] = sum(w * v[s, h] for s, w in enumerate(logits.softmax(0)))
    return outs.flatten(1) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("options", [{}, {"q_rank": 1, "k_rank": 3, "v_rank": 2}, {"rope": False}], ids=str)
def test_equals_the_formula(options: dict):
    """Outputs and gradients; beside the authors' own layer: benchmarks/agreement.py."""
    torch.manual_seed(0)
    layer = build("tpa", d_model=12, n_heads=3, head_dim=4, init_logit_std=2.0, **options).double()
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    results = []
    for run in (layer, lambda x: by_hand(layer, x[0])[None]):
        given = x.clone().requires_grad_()
        out = run(given)
        results.append((out, *torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_the_start_is_the_papers():
    """Each factor's matrix is uniform within sqrt(6 / (C + size)), but that which sets the size of the logits."""
    torch.manual_seed(0)
    layer = build("tpa", d_model=64, n_heads=4)
    for name in "qkv":
        for factor, size in (("heads", 4), ("features", 16)):
            largest = getattr(layer, f"{name}_{factor}").weight.abs().max().item()
            if (name, factor) != ("q", "features"):
                assert largest == pytest.approx((6 / (64 + size)) ** 0.5, rel=0.02)


def test_cache_size():
    """At 12 heads of 64, ranks 2 and 2: 304 values per token, of 1536."""
    config = configure("tpa", d_model=768, n_heads=12)
    assert config.cache_bytes_per_token(2) == 2 * 4 * (12 + 64)
    assert (config.q_rank, config.k_rank, config.v_rank) == (6, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "attention 'tpa' has no QK-norm: the norm of a key is not that of the factors"),
        ({"k_rank": 0}, "k_rank must be a whole number >= 1, got 0"),
        ({"q_rank": None}, "q_rank must be a whole number >= 1, got None"),
        ({"n_kv_heads": 1}, "attention 'tpa' has 4 key/value heads by definition, got n_kv_heads=1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        configure("tpa", d_model=32, n_heads=4, **options)
