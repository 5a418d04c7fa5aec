"""SAS against the published module, its identity start, its two caches."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from heedful.attention import LayerCache, SASCore, build, configure

Sizes = dict[str, int]


class Residual(nn.Module):
    """x + process(relu(x))."""

    def __init__(self, process: nn.Module) -> None:
        super().__init__()
        self.process = process

    def forward(self, x: Tensor) -> Tensor:
        return x + self.process(torch.relu(x))


class Published(nn.Module):
    """The paper's module, with the names of its checkpoints, written without heedful."""

    def __init__(
        self, n_heads: int, sim_heads: int, head_dim: int, sim_head_dim: int, kernel_size: int
    ) -> None:
        super().__init__()

        def conv(channels: int) -> nn.Conv1d:
            return nn.Conv1d(channels, sim_heads, kernel_size, padding="same")

        def query_or_key() -> nn.Sequential:
            return nn.Sequential(
                conv(n_heads),
                Residual(conv(sim_heads)),
                nn.Linear(head_dim, sim_head_dim),
                Residual(nn.Linear(sim_head_dim, sim_head_dim)),
            )

        self.n_heads, self.sim_heads = n_heads, sim_heads
        self.sas_q, self.sas_k = query_or_key(), query_or_key()
        self.sas_v = nn.Sequential(conv(n_heads), Residual(conv(sim_heads)))
        self.output_dense = nn.Linear(n_heads * head_dim, n_heads * head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length = q.shape[:2]
        q, k, v = (
            expand(x.flatten(0, 1)).unflatten(0, (batch, length))
            for expand, x in ((self.sas_q, q), (self.sas_k, k), (self.sas_v, v))
        )
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)
        out = torch.einsum("bhij,bjhe->bihe", weights, v)
        groups = out.split(self.n_heads, dim=2)
        return sum(self.output_dense(group.flatten(2)) for group in groups) / len(groups)


OURS = {"0": "conv1", "1.process": "conv2", "2": "lin1", "3.process": "lin2"}


def our_name(theirs: str) -> str:
    if theirs.startswith("output_dense"):
        return theirs.replace("output_dense", "o_proj")
    part, kind = theirs.removeprefix("sas_").split(".", 1)
    layer, kind = kind.rsplit(".", 1)
    return f"{part}_expand.{OURS[layer]}.{kind}"


@st.composite
def sizes(draw: Any) -> Sizes:
    n_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return {
        "n_heads": n_heads,
        "sim_heads": n_heads * draw(st.integers(1, 3)),
        "head_dim": head_dim,
        "sim_head_dim": head_dim + draw(st.integers(0, 4)),
        "kernel_size": draw(st.sampled_from([1, 3, 5])),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@settings(max_examples=25)
@given(sizes=sizes(), length=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_core_equals_the_published_module(
    dtype: torch.dtype, tolerance: float, sizes: Sizes, length: int, seed: int
):
    torch.manual_seed(seed)
    published = Published(**sizes).to(dtype)
    core = SASCore(**sizes).to(dtype)
    core.load_published_state_dict(published.state_dict())
    qkv = [torch.randn(2, length, sizes["n_heads"], sizes["head_dim"], dtype=dtype) for _ in range(3)]
    results = []
    for module in (core, published):
        inputs = [x.clone().requires_grad_() for x in qkv]
        out = module(*inputs)
        out.square().sum().backward()
        results.append((out, [x.grad for x in inputs], dict(module.named_parameters())))
    (out, grads, ours), (expected, expected_grads, theirs) = results
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    assert {our_name(name) for name in theirs} == set(ours)
    pairs = list(zip(grads, expected_grads, strict=True))
    pairs += [(ours[our_name(name)].grad, parameter.grad) for name, parameter in theirs.items()]
    for got, wanted in pairs:
        size = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got, wanted, rtol=0, atol=10 * tolerance * size)


CORE = {"n_heads": 2, "sim_heads": 4, "head_dim": 3, "sim_head_dim": 5, "kernel_size": 3}


def test_loading_says_what_does_not_fit_and_changes_nothing():
    core, good = SASCore(**CORE), Published(**CORE).state_dict()
    before = {name: tensor.clone() for name, tensor in core.state_dict().items()}
    short = {name: tensor for name, tensor in good.items() if name != "sas_q.2.bias"}
    wide = Published(**{**CORE, "sim_head_dim": 6}).state_dict()
    wrong = [
        (short, ["missing ['sas_q.2.bias']", "unknown nothing"]),
        ({**good, "extra.weight": good["sas_q.2.bias"]}, ["missing nothing", "unknown ['extra.weight']"]),
        (
            {**good, "sas_v.0.weight": torch.zeros(4, 2, 5)},
            ["sas_v.0.weight", "(4, 2, 3)", "got (4, 2, 5)", "W=3"],
        ),
        (wide, ["(5, 3)", "D̂=5", "got (6, 3)"]),
        ({}, ["missing", "output_dense.bias"]),
    ]
    for state, parts in wrong:
        with pytest.raises(ValueError) as raised:
            core.load_published_state_dict(state)
        for part in parts:
            assert part in str(raised.value)
        for name, tensor in core.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    core.load_published_state_dict(good)
    assert torch.equal(core.o_proj.weight, good["output_dense.weight"])


def test_core_sizes_are_checked():
    for wrong, message in (
        ({"sim_heads": 3}, r"sim_heads must be a multiple of n_heads \(2\), got 3; use 2 or 4"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"sim_head_dim": 0}, "sim_head_dim must be a whole number >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SASCore(**{**CORE, **wrong})


GRID = list(itertools.product(["before_rope", "after_rope"], [True, False], [True, False]))


HOSTS = [case for case in GRID if case[1] or case[0] == "before_rope"]


@pytest.mark.parametrize(
    ("position", "qk_norm", "rope", "score"),
    [
        pytest.param(
            *case, score, marks=[pytest.mark.exhaustive] * (i % 2 != j)
        )  # each case with one score is fast
        for i, case in enumerate(HOSTS)
        for j, score in enumerate(("softmax", "selective"))
    ],
    ids=lambda value: str(value),
)
def test_identity_start_is_the_host(score: str, position: str, qk_norm: bool, rope: bool):
    torch.manual_seed(0)
    shared = {
        "d_model": 32,
        "n_heads": 4,
        "qk_norm": qk_norm,
        "rope": rope,
        "qk_norm_position": position,
        "init_logit_std": 1.0,
    }
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    ids = torch.tensor([[1] * 3 + [0] * 6] * 2)
    for groups, times, wide, width in itertools.product([1, 2, 4], [1, 2, 3], [8, 12, 20], [1, 3]):
        host = build("gqa", score, n_kv_heads=groups, **shared).double()
        options = {"sim_heads": 4 * times, "sim_head_dim": wide, "kernel_size": width}
        sas = build("sas", score, n_kv_heads=groups, init="identity", **options, **shared).double()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(sas, name).load_state_dict(getattr(host, name).state_dict())
        for masks in ({}, {"key_mask": mask}, {"segment_ids": ids}):
            got, expected = sas(x, **masks), host(x, **masks)
            real = mask if "key_mask" in masks else torch.ones_like(mask)
            # Weights are filled in float32, so a gain such as 1.5^(1/4) has float32 precision.
            torch.testing.assert_close(
                got[real], expected[real], rtol=0, atol=1e-6, msg=str((groups, options))
            )


@pytest.mark.parametrize(("head_dim", "wide"), [(5, 5), (5, 6), (5, 7), (1, 1), (1, 4), (6, 9)])
def test_identity_start_with_odd_sizes(head_dim: int, wide: int):
    shared = {"d_model": 16, "n_heads": 2, "head_dim": head_dim, "rope": False}
    host = build("mha", **shared).double()
    sas = build("sas", init="identity", sim_head_dim=wide, **shared).double()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(sas, name).load_state_dict(getattr(host, name).state_dict())
    x = 3 * torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(sas(x), host(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("groups", [None, 2])
def test_copies_of_the_identity_start_learn_apart(groups: int | None):
    """They got equal gradients, and were copies for ever."""
    torch.manual_seed(0)
    sas = build("sas", d_model=32, n_heads=4, n_kv_heads=groups, init="identity")
    x, y = torch.randn(2, 16, 32), torch.randn(2, 16, 32)
    at_first = [e.conv1.weight.detach().clone() for e in (sas.q_expand, sas.k_expand)]
    optimizer = torch.optim.Adam(sas.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (sas(x) - y).square().mean().backward()
        optimizer.step()
    for expansion, before in zip((sas.q_expand, sas.k_expand), at_first, strict=True):
        learned = (expansion.conv1.weight.detach() - before).unflatten(0, (3, 4))
        assert (learned - learned.mean(0)).norm() > 0.1 * learned.norm()


def test_expansions_act_before_norm_and_rope():
    """A start other than the identity, by hand: project, expand, norm, rotate, attend, average."""
    torch.manual_seed(0)
    module = build("sas", d_model=12, n_heads=2, n_kv_heads=1, sim_heads=4, sim_head_dim=10).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    at = torch.arange(5, dtype=torch.float64)
    heads = {}
    for part, count in (("q", 2), ("k", 1), ("v", 1)):
        y = getattr(module, f"{part}_proj")(x).reshape(10, count, 6)
        expand = getattr(module, f"{part}_expand")
        y = nn.functional.conv1d(y, expand.conv1.weight, expand.conv1.bias, padding="same")
        y = y + nn.functional.conv1d(y.relu(), expand.conv2.weight, expand.conv2.bias, padding="same")
        if part != "v":
            y = expand.lin1(y)
            y = y + expand.lin2(y.relu())
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6 * 6 / 10).sqrt()
            y = y * getattr(module, f"{part}_norm").weight
            angle = at[:, None, None] * 10000.0 ** (-torch.arange(5).double() * 2 / 6)
            first, second = y.reshape(2, 5, 4, 10).split(5, dim=-1)
            turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
            y = torch.cat(turned, dim=-1)
        heads[part] = y.reshape(2, 5, 4, -1)
    logits = torch.einsum("bihd,bjhd->bhij", heads["q"], heads["k"]) / 10**0.5
    weights = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhe->bihe", weights, heads["v"])
    expected = module.o_proj((out[:, :, :2] + out[:, :, 2:]).flatten(2) / 2)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("score", ["softmax", "selective"])
@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2}, {"qk_norm_position": "after_rope"}], ids=str)
def test_compact_cache_equals_expanded(score: str, options: dict[str, Any]):
    torch.manual_seed(0)
    shared = {"d_model": 32, "n_heads": 4, "init_logit_std": 1.0, **options}
    modules = [build("sas", score, cache=cache, **shared).double() for cache in ("expanded", "compact")]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    mask = torch.arange(12) >= torch.tensor([[0], [3]])
    outs = []
    for module in modules:
        cache = LayerCache(block=8)
        with torch.no_grad():
            pieces = [
                module(x[:, a:b], key_mask=mask[:, a:b], cache=cache) for a, b in ((0, 6), (6, 7), (7, 12))
            ]
        outs.append(torch.cat(pieces, dim=1))
    torch.testing.assert_close(outs[0][mask], outs[1][mask], rtol=0, atol=1e-12)


def test_cache_sizes():
    """12 heads of 64, 36 simulated ones of 96: Ĥ(D̂+D) against 2HD numbers."""
    sizes = {"d_model": 768, "n_heads": 12, "sim_heads": 36, "sim_head_dim": 96}
    expanded = configure("sas", **sizes).cache_bytes_per_token(2)
    compact = configure("sas", **sizes, cache="compact").cache_bytes_per_token(2)
    plain = configure("mha", d_model=768, n_heads=12).cache_bytes_per_token(2)
    assert expanded == 36 * (96 + 64) * 2
    assert compact == plain + 8  # and the position
    assert configure("sas", "selective", **sizes).cache_bytes_per_token(2) == expanded + 4


def test_paper_costs():
    """At the paper's sizes parameters grow by some per cent and scores cost 3.75 times as much."""
    sas = configure("sas", d_model=768, n_heads=12, sim_heads=36, sim_head_dim=96)
    mha = configure("mha", d_model=768, n_heads=12)
    assert 0.01 < sas.parameter_count() / mha.parameter_count() - 1 < 0.03
    growth = [config.flops_per_token(2048) - config.flops_per_token(1024) for config in (sas, mha)]
    assert growth[0] / growth[1] == 3.75
    expansion = sas.flops_per_token(1) - mha.flops_per_token(1) - (growth[0] - growth[1]) // 1024
    assert expansion == 2 * (3 * 3 * 64 * 36 * (12 + 36) + 2 * 36 * 96 * (64 + 96))
