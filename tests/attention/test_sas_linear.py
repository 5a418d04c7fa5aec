"""Linear SAS against its formula, its identity start, and its cache."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.attention import SASLinearAttention, build, configure

SIZES: dict[str, Any] = {"d_model": 12, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "sim_heads": 8}


def by_hand(layer: SASLinearAttention, x: Tensor) -> Tensor:
    """(B, T, C) -> (B, T, C): queries as the layer makes them, keys and values one head and feature at a time."""
    c, length = layer.config, x.shape[1]
    positions = torch.arange(length)[None]
    q, _ = layer.project(x, positions)
    k = layer.place_keys(layer.split_heads(layer.k_proj(x), c.kv_heads), positions)
    v = layer.split_heads(layer.v_proj(x), c.kv_heads)
    outs = []
    for h in range(c.score_heads):
        key, value = torch.zeros_like(k[:, 0]), torch.zeros_like(v[:, 0])
        for g in range(c.kv_heads):
            key = key + layer.k_mix.weight[h, g] * k[:, g]
            for w, d in itertools.product(range(c.kernel_size), range(c.size)):
                source = d + w - c.kernel_size // 2
                if 0 <= source < c.size:
                    tap = torch.zeros(c.size, dtype=x.dtype)
                    tap[d] = 1.0
                    value = value + layer.v_mix.weight[h, g, w] * v[:, g, :, source, None] * tap
        logits = q[:, h] @ key.mT / c.size**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        outs.append(logits.masked_fill(future, -torch.inf).softmax(-1) @ value)
    groups = torch.stack(outs, 1).unflatten(1, (-1, c.n_heads))
    return layer.o_proj(groups.mean(1).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "options", [{}, {"kernel_size": 1, "rope": False}, {"qk_norm": False, "bias": True}], ids=str
)
def test_equals_the_formula(options: dict[str, Any]):
    torch.manual_seed(0)
    layer = build("sas_linear", **SIZES, init_logit_std=1.5, **options).double()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    results = []
    for run in (layer, lambda x: by_hand(layer, x)):
        given = x.clone().requires_grad_()
        out = run(given)
        results.append((out, *torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"qk_norm": False}, {"qk_norm_position": "after_rope"}], ids=str)
def test_identity_start_is_the_host(options: dict[str, Any]):
    torch.manual_seed(0)
    shared = {"d_model": 32, "n_heads": 4, "init_logit_std": 1.0, **options}
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    for groups, times, width in itertools.product([1, 2, 4], [1, 2, 3], [1, 3]):
        host = build("gqa", "selective", n_kv_heads=groups, **shared).double()
        own = {"sim_heads": 4 * times, "kernel_size": width, "init": "identity", "n_kv_heads": groups}
        linear = build("sas_linear", "selective", **own, **shared).double()
        missing, unknown = linear.load_state_dict(host.state_dict(), strict=False)
        assert not unknown
        assert {name.split(".")[0] for name in missing} == {"q_expand", "k_mix", "v_mix"}
        torch.testing.assert_close(linear(x), host(x), rtol=0, atol=1e-12, msg=str(own))


def test_copies_of_the_identity_start_learn_apart():
    torch.manual_seed(0)
    layer = build("sas_linear", d_model=32, n_heads=4, init="identity")
    x, y = torch.randn(2, 16, 32), torch.randn(2, 16, 32)
    before = layer.k_mix.weight.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    learned = (layer.k_mix.weight.detach() - before).unflatten(0, (3, 4))
    assert (learned - learned.mean(0)).norm() > 0.1 * learned.norm()


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_the_cache_is_as_large_as_the_hosts(groups: int):
    sizes = {"d_model": 768, "n_heads": 12, "n_kv_heads": groups}
    linear, host = (configure(name, "selective", **sizes) for name in ("sas_linear", "gqa"))
    assert linear.cache_bytes_per_token(2) == host.cache_bytes_per_token(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sim_heads": 10}, r"sim_heads must be a multiple of n_heads \(4\), got 10; use 8 or 12"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"sim_head_dim": 8}, "has no option 'sim_head_dim'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        configure("sas_linear", d_model=32, n_heads=4, **options)
