"""selective_attention and unmasked_count against the paper's formula in plain Python, and their gradients."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heedful.ops import selective_attention, unmasked_count
from heedful.ops.dot_product import attention_reference
from heedful.ops.masks import visible_keys
from heedful.ops.selective import api, blocked, tiles
from heedful.ops.selective.blocked import plain_blocked

IMPLS = ["auto", "reference", "sdpa", "blocked", "native"]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    select_q: Tensor | None = None
    select_k: Tensor | None = None
    soft_mask: Tensor | None = None
    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    scale: float | None = None

    def floats(self) -> dict[str, Tensor]:
        return {n: t for n, t in vars(self).items() if isinstance(t, Tensor) and t.is_floating_point()}

    def map(self, change: Any) -> "Inputs":
        return replace(self, **{name: change(tensor) for name, tensor in self.floats().items()})

    def run(self, impl: str = "auto") -> tuple[Tensor, Tensor]:
        rest = {"select_q": self.select_q, "select_k": self.select_k, "soft_mask": self.soft_mask}
        masks = {"key_mask": self.key_mask, "segment_ids": self.segment_ids}
        return selective_attention(self.q, self.k, self.v, **rest, **masks, scale=self.scale, impl=impl)


def random_inputs(
    batch: int = 2,
    groups: int = 2,
    repeats: int = 2,
    queries: int = 5,
    earlier: int = 3,
    size: int = 4,
    v_size: int = 3,
    selectors: int | None = None,
    soft_mask: bool = True,
    padding: str = "none",
    segments: str = "none",
    scale: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    keys = queries + earlier
    key_mask = segment_ids = None
    if padding == "holes":
        key_mask = torch.rand(batch, keys, generator=generator) > 0.4
    elif padding != "none":
        amount = torch.randint(0, keys + 1, (batch, 1), generator=generator)
        key_mask = torch.arange(keys) >= amount if padding == "left" else torch.arange(keys) < amount
    if segments == "interleaved":
        segment_ids = torch.randint(-1, 2, (batch, keys), generator=generator)
    elif segments == "packed":
        segment_ids = torch.randint(0, 2, (batch, keys), generator=generator).cumsum(-1) * 7 % 5
    select = selectors is not None
    return Inputs(
        q=2 * randn(batch, groups * repeats, queries, size),
        k=randn(batch, groups, keys, size),
        v=randn(batch, groups, keys, v_size),
        select_q=2 * randn(batch, selectors, queries, size + 1) if select else None,
        select_k=randn(batch, selectors, keys, size + 1) if select else None,
        soft_mask=randn(batch, selectors or 1, earlier).abs() if soft_mask else None,
        key_mask=key_mask,
        segment_ids=segment_ids,
        scale=scale,
    )


@st.composite
def inputs(draw: Any) -> Inputs:
    small = st.integers(1, 3)
    return random_inputs(
        batch=draw(st.integers(1, 2)),
        groups=draw(small),
        repeats=draw(small),
        queries=draw(st.integers(1, 9)),
        earlier=draw(st.integers(0, 5)),
        size=draw(st.integers(1, 6)),
        v_size=draw(st.integers(1, 6)),
        selectors=draw(st.none() | small),
        soft_mask=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "left", "right", "holes"])),
        segments=draw(st.sampled_from(["none", "packed", "interleaved"])),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 10**6)),
    )


def related(x: Inputs, row: int, a: int, b: int) -> bool:
    """Both tokens are real and of one segment."""
    real = x.key_mask is None or bool(x.key_mask[row, a] and x.key_mask[row, b])
    return real and (x.segment_ids is None or bool(x.segment_ids[row, a] == x.segment_ids[row, b]))


def may_vote(x: Inputs, row: int, query: int, key: int) -> bool:
    """On earlier tokens of its sequence, but for the first one."""
    first = min((j for j in range(query + 1) if related(x, row, query, j)), default=query)
    return key < query and key != first and related(x, row, query, key)


def oracle(x: Inputs) -> tuple[Tensor, Tensor]:
    """The formula on Python floats, one number at a time: out and the final F."""
    q, k, v = x.q.tolist(), x.k.tolist(), x.v.tolist()
    batch, heads, queries, size = x.q.shape
    groups, keys = x.k.shape[1:3]
    select_q = x.q[:, :1].tolist() if x.select_q is None else x.select_q.tolist()
    select_k = x.k[:, :1].tolist() if x.select_k is None else x.select_k.tolist()
    selectors = len(select_q[0])
    scale = size**-0.5 if x.scale is None else x.scale
    select_scale = len(select_q[0][0][0]) ** -0.5 if x.scale is None else x.scale
    earlier = keys - queries
    if x.soft_mask is None:
        votes = [[[0.0] * keys for _ in range(selectors)] for _ in range(batch)]
    else:
        votes = [[row + [0.0] * queries for row in rows] for rows in x.soft_mask.tolist()]

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(p * r for p, r in zip(a, b, strict=True))

    out = []
    for b in range(batch):
        out.append([[] for _ in range(heads)])
        for i in range(queries):
            here = earlier + i
            for h in range(heads):
                g, r = h // (heads // groups), h * selectors // heads
                seen = [j for j in range(here + 1) if related(x, b, here, j)]
                logits = {j: dot(q[b][h][i], k[b][g][j]) * scale - votes[b][r][j] for j in seen}
                top = max(logits.values(), default=0.0)
                weights = {j: math.exp(logit - top) for j, logit in logits.items()}
                total = math.fsum(weights.values())
                mixed = [
                    math.fsum(weights[j] * v[b][g][j][e] for j in seen) / (total or 1.0)
                    for e in range(x.v.shape[-1])
                ]
                out[b][h].append(mixed)
            for r in range(selectors):
                for j in range(keys):
                    if may_vote(x, b, here, j):
                        logit = dot(select_q[b][r][i], select_k[b][r][j]) * select_scale
                        votes[b][r][j] += max(logit, 0.0)
    return torch.tensor(out, dtype=torch.float64), torch.tensor(votes, dtype=torch.float64)


def dense(x: Inputs) -> tuple[Tensor, Tensor]:
    """The formula as few dense tensor operations, for gradients by autograd."""
    batch, heads, queries, size = x.q.shape
    groups, keys = x.k.shape[1:3]
    shape = (batch, queries, keys)
    visible, voted = torch.zeros(shape).double(), torch.zeros(shape).double()
    for b in range(batch):
        for i in range(queries):
            for j in range(keys):
                here = keys - queries + i
                visible[b, i, j] = j <= here and related(x, b, here, j)
                voted[b, i, j] = may_vote(x, b, here, j)
    select_q = x.q[:, :1] if x.select_q is None else x.select_q
    select_k = x.k[:, :1] if x.select_k is None else x.select_k
    select_scale = select_q.shape[-1] ** -0.5 if x.scale is None else x.scale
    votes = torch.einsum("brid,brjd->brij", select_q, select_k) * select_scale
    votes = votes.clamp(min=0) * voted[:, None]
    before = torch.ones(queries, queries).double().tril(-1)
    masks = torch.einsum("iu,bruj->brij", before, votes)
    final = votes.sum(2)
    if x.soft_mask is not None:
        start = torch.cat((x.soft_mask, x.soft_mask.new_zeros(*x.soft_mask.shape[:2], queries)), -1)
        masks, final = masks + start[:, :, None], final + start
    of_head = [h * masks.shape[1] // heads for h in range(heads)]
    of_group = [h * groups // heads for h in range(heads)]
    scale = size**-0.5 if x.scale is None else x.scale
    logits = torch.einsum("bhid,bhjd->bhij", x.q, x.k[:, of_group]) * scale - masks[:, of_head]
    weights = torch.exp(logits - logits.amax(-1, keepdim=True).detach()) * visible[:, None]
    weights = weights / (weights.sum(-1, keepdim=True) + (visible.sum(-1) == 0)[:, None, :, None])
    return torch.einsum("bhij,bhje->bhie", weights, x.v[:, of_group]), final


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@settings(max_examples=40)
@given(x=inputs())
def test_equals_the_formula(impl: str, dtype: torch.dtype, tolerance: float, x: Inputs):
    out, soft_mask = x.map(lambda t: t.to(dtype)).run(impl)
    expected, expected_mask = oracle(x.map(lambda t: t.to(dtype).double()))
    assert out.dtype == soft_mask.dtype == dtype
    close(out, expected, tolerance)
    close(soft_mask, expected_mask, tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@settings(max_examples=20)
@given(x=inputs())
def test_gradients_equal_the_formula(impl: str, dtype: torch.dtype, tolerance: float, x: Inputs):
    ours = x.map(lambda t: t.to(dtype).requires_grad_())
    theirs = x.map(lambda t: t.to(dtype).double().requires_grad_())
    results = []
    for given_inputs, outs in ((ours, ours.run(impl)), (theirs, dense(theirs))):
        # The final F flows on into the next call, so its gradient counts as well.
        torch.manual_seed(0)
        loss = sum((torch.randn(o.shape, dtype=torch.float64) * o).sum() for o in outs)
        wanted = list(given_inputs.floats().values())
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        results.append([torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)])
    for name, got, expected in zip(x.floats(), *results, strict=True):
        assert got.isfinite().all(), name
        close(got, expected, tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("selectors", [None, 2])
def test_gradcheck(impl: str, selectors: int | None):
    x = random_inputs(queries=4, earlier=2, padding="left", selectors=selectors)
    names = list(x.floats())

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return replace(x, **dict(zip(names, tensors, strict=True))).run(impl)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in x.floats().values()])


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("queries", [1, 5])
def test_no_row_at_all(impl: str, queries: int):
    q, k, v = torch.randn(0, 4, queries, 8), torch.randn(0, 2, 20, 8), torch.randn(0, 2, 20, 6)
    out, soft_mask = selective_attention(q, k, v, soft_mask=torch.zeros(0, 1, 20 - queries), impl=impl)
    assert out.shape == (0, 4, queries, 6) and soft_mask.shape == (0, 1, 20)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1, 2, 17, 63, 65])
def test_odd_lengths(impl: str, length: int):
    x = random_inputs(queries=length, earlier=0, soft_mask=False, groups=1, batch=1)
    for got, expected in zip(x.run(impl), oracle(x), strict=True):
        close(got, expected, 1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=20)
@given(x=inputs(), cuts=st.lists(st.integers(0, 9), max_size=4))
def test_any_split_chains_to_the_same(impl: str, x: Inputs, cuts: list[int]):
    length, keys = x.q.shape[2], x.k.shape[2]
    earlier = keys - length
    expected, expected_mask = x.run(impl)
    outs, soft_mask = [], x.soft_mask
    for start, stop in pairwise(sorted({0, length} | {min(c, length) for c in cuts}) + [length]):
        until = earlier + stop
        piece = Inputs(
            q=x.q[:, :, start:stop],
            k=x.k[:, :, :until],
            v=x.v[:, :, :until],
            select_q=None if x.select_q is None else x.select_q[:, :, start:stop],
            select_k=None if x.select_k is None else x.select_k[:, :, :until],
            soft_mask=soft_mask,
            key_mask=None if x.key_mask is None else x.key_mask[:, :until],
            segment_ids=None if x.segment_ids is None else x.segment_ids[:, :until],
            scale=x.scale,
        )
        out, soft_mask = piece.run(impl)
        outs.append(out)
    close(torch.cat(outs, dim=2), expected, 1e-10)
    close(soft_mask, expected_mask, 1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_flows_through_chained_calls(impl: str):
    x = random_inputs(queries=6, earlier=0, soft_mask=False, groups=1).map(lambda t: t.requires_grad_())
    whole = torch.autograd.grad(x.run(impl)[0].square().sum(), (x.q, x.k, x.v))
    first, soft_mask = selective_attention(x.q[:, :, :4], x.k[:, :, :4], x.v[:, :, :4], impl=impl)
    second, _ = selective_attention(x.q[:, :, 4:], x.k, x.v, soft_mask=soft_mask, impl=impl)
    loss = first.square().sum() + second.square().sum()
    for got, expected in zip(torch.autograd.grad(loss, (x.q, x.k, x.v)), whole, strict=True):
        close(got, expected, 1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_other_heads_train_the_selection_head(impl: str):
    x = random_inputs(queries=6, earlier=0, soft_mask=False, groups=4, repeats=1)
    x = x.map(lambda t: t.requires_grad_())
    out, _ = x.run(impl)
    for name, tensor in (("q", x.q), ("k", x.k)):
        (gradient,) = torch.autograd.grad(out[:, 1:].square().sum(), tensor, retain_graph=True)
        assert gradient[:, 0].abs().max() > 1e-3, f"no gradient from heads 1.. to {name} of head 0"


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_never_masked(impl: str):
    """The first real token, the previous and the current one have F = 0; F never shrinks."""
    x = random_inputs(queries=12, earlier=0, soft_mask=False, padding="left", seed=3)
    last = torch.zeros(2, 1, 12, dtype=torch.float64)
    for length in range(1, 13):
        part = replace(
            x,
            q=x.q[:, :, :length],
            k=x.k[:, :, :length],
            v=x.v[:, :, :length],
            key_mask=x.key_mask[:, :length],
        )
        _, soft_mask = part.run(impl)
        assert (soft_mask >= last[:, :, :length]).all()
        assert (soft_mask[:, :, -1] == 0).all()  # the newest: for the next query, the previous token
        for row, real in enumerate(part.key_mask):
            if real.any():
                assert soft_mask[row, 0, real.long().argmax()] == 0
            assert (soft_mask[row, 0, ~real] == 0).all()
        last = torch.nn.functional.pad(soft_mask, (0, 12 - length))
    assert (last > 0).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_vote_counts_for_later_queries_only(impl: str):
    """By hand: token 1 is voted away by token 2; token 2 itself still sees it, token 3 does not."""
    q = torch.tensor([0.0, 0.0, 1000.0, 0.0]).double().reshape(1, 1, 4, 1)
    k = torch.tensor([1.0, 1.0, 1.0, 1.0]).double().reshape(1, 1, 4, 1)
    v = torch.eye(4).double()[None, None]
    out, soft_mask = selective_attention(q, k, v, impl=impl)
    third = 1 / 3
    expected = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [third, third, third, 0], [third, 0, third, third]]
    close(out[0, 0], torch.tensor(expected), 1e-7)
    assert soft_mask.flatten().tolist() == [0, 1000, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_padding_is_zero_and_finite(impl: str, kind: str):
    x = random_inputs(batch=3, queries=7, earlier=0, soft_mask=False, padding=kind, seed=5)
    x.key_mask[0] = False
    x = x.map(lambda t: t.requires_grad_())
    out, soft_mask = x.run(impl)
    padded = ~x.key_mask
    assert (out.transpose(1, 2)[padded] == 0).all()
    (out.square().sum() + soft_mask.sum()).backward()
    for name, tensor in x.floats().items():
        assert tensor.grad.isfinite().all(), name
        assert (tensor.grad.transpose(1, 2)[padded] == 0).all(), f"padding gets a gradient in {name}"


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl: str):
    for queries, earlier in ((0, 3), (0, 0)):
        x = random_inputs(queries=queries, earlier=earlier)
        out, soft_mask = x.run(impl)
        assert out.shape == (2, 4, 0, 3)
        close(soft_mask, x.soft_mask, 0.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_sums_in_float32(impl: str):
    """Only the inputs are rounded: F of 300 votes is right to fp32, the output to one rounding."""
    x = random_inputs(
        queries=300, earlier=0, soft_mask=False, size=16, v_size=16, batch=1, dtype=torch.bfloat16
    )
    out, soft_mask = x.run(impl)
    expected, expected_mask = x.map(Tensor.double).run("reference")
    assert out.dtype == torch.bfloat16
    assert soft_mask.dtype == torch.float32
    assert expected_mask.max() > 50
    torch.testing.assert_close(soft_mask.double(), expected_mask, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_gradients_are_close(impl: str):
    low = random_inputs(queries=40, earlier=0, soft_mask=False, size=16, dtype=torch.bfloat16)
    low = low.map(lambda t: t.requires_grad_())
    high = low.map(lambda t: t.detach().double().requires_grad_())
    for x in (low, high):
        x.run(impl)[0].double().square().sum().backward()
    for name, tensor in low.floats().items():
        expected = high.floats()[name].grad
        assert tensor.grad.dtype == torch.bfloat16
        error = (tensor.grad.double() - expected).norm() / expected.norm()
        assert error < 0.01, f"{name}: {error:.3g}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("selectors", [None, 2])
def test_autocast_rounds_the_inputs_only(impl: str, selectors: int | None):
    x = random_inputs(queries=30, selectors=selectors, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, soft_mask = x.run(impl)
    rounded = replace(x.map(lambda t: t.bfloat16()), soft_mask=x.soft_mask)
    expected, expected_mask = rounded.run(impl)
    assert out.dtype == torch.bfloat16
    assert soft_mask.dtype == torch.float32
    close(out, expected, 0.0)
    close(soft_mask, expected_mask, 0.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl: str):
    x = random_inputs(queries=6, earlier=3, selectors=2, padding="left")
    strange = x.map(lambda t: t.transpose(1, -1).contiguous().transpose(1, -1))
    strange = replace(strange, key_mask=x.key_mask.t().contiguous().t())
    assert not strange.q.is_contiguous()
    for got, expected in zip(strange.run(impl), x.run(impl), strict=True):
        close(got, expected, 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_soft_mask_keeps_no_square_alive(impl: str):
    """A cache stores the returned F: it must not be a view of all the (T, S) masks."""
    x = random_inputs(queries=64, earlier=0, soft_mask=False, batch=1)
    _, soft_mask = x.run(impl)
    assert soft_mask.untyped_storage().nbytes() == soft_mask.numel() * soft_mask.element_size()


@pytest.mark.parametrize(
    "impl", [i if i == "auto" else pytest.param(i, marks=pytest.mark.exhaustive) for i in IMPLS]
)
def test_compiles_in_one_graph(impl: str):
    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        return x.run(impl)

    torch._dynamo.reset()  # it counts how often one function was compiled, over all tests
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for options in ({"soft_mask": False}, {"padding": "left", "segments": "packed", "selectors": 2}):
        x = random_inputs(**options).map(lambda t: t.requires_grad_())
        results = []
        for function in (compiled, run):
            out, soft_mask = function(x)
            loss = out.square().sum() + soft_mask.square().sum()
            results.append([out, soft_mask, *torch.autograd.grad(loss, list(x.floats().values()))])
        for got, expected in zip(*results, strict=True):
            close(got, expected, 1e-10)


@settings(max_examples=40)
@given(x=inputs(), tau=st.sampled_from([0.5, 1.0, 3.0]))
def test_unmasked_count_equals_the_formula(x: Inputs, tau: float):
    select_q = x.q[:, :1] if x.select_q is None else x.select_q
    select_k = x.k[:, :1] if x.select_k is None else x.select_k
    options = {"key_mask": x.key_mask, "segment_ids": x.segment_ids, "scale": x.scale}
    got = unmasked_count(select_q, select_k, tau=tau, soft_mask=x.soft_mask, **options)
    batch, selectors, length, _ = select_q.shape
    earlier = select_k.shape[2] - length
    assert got.shape == (batch, selectors, length)
    for i in range(length):
        # F before query i is the final F of the pass over the queries before it.
        until = earlier + i
        before = Inputs(
            q=x.q[:, :, :i],
            k=x.k[:, :, :until],
            v=x.v[:, :, :until],
            select_q=select_q[:, :, :i],
            select_k=select_k[:, :, :until],
            soft_mask=x.soft_mask,
            **{n: t if n == "scale" or t is None else t[:, :until] for n, t in options.items()},
        )
        votes = oracle(before)[1].tolist() if i else None
        start = None if x.soft_mask is None else x.soft_mask.tolist()
        for b in range(batch):
            for r in range(selectors):
                count = 0.0
                for j in range(until + 1):
                    if related(x, b, until, j):
                        f = 0.0
                        if j < until:
                            f = votes[b][r][j] if votes else start[b][r][j] if start else 0.0
                        count += 1 - min(f, tau) / tau
                assert got[b, r, i].item() == pytest.approx(count, abs=1e-9)


def test_unmasked_count_by_hand():
    q = torch.tensor([0.0, 0.0, 0.25, 9.0, 0.0]).double().reshape(1, 1, 5, 1)
    k = torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0]).double().reshape(1, 1, 5, 1)
    # After query 2 token 1 has F = 0.25; after query 3 tokens 1 and 2 are gone.
    assert unmasked_count(q, k).flatten().tolist() == [1, 2, 3, 3.75, 3]
    # Two more padded tokens on the left: nobody there, nothing counted.
    mask = torch.tensor([[False, False, True, True, True, True, True]])
    padded_q, padded_k = (torch.nn.functional.pad(t, (0, 0, 2, 0), value=3.0) for t in (q, k))
    count = unmasked_count(padded_q, padded_k, key_mask=mask)
    assert count.flatten().tolist() == [0, 0, 1, 2, 3, 3.75, 3]


def test_unmasked_count_has_gradients():
    x = random_inputs(queries=5, earlier=0, padding="left", seed=2)
    q, k = 0.3 * x.q[:, :1], x.k[:, :1]
    torch.autograd.gradcheck(
        lambda q, k: unmasked_count(q, k, tau=2.0, key_mask=x.key_mask),
        (q.requires_grad_(), k.requires_grad_()),
    )


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_tau_must_be_positive(tau: float):
    x = random_inputs()
    with pytest.raises(ValueError, match="tau must be greater than 0, got"):
        unmasked_count(x.q[:, :1], x.k[:, :1], tau=tau)


GOOD = random_inputs(queries=5, earlier=3, selectors=2, padding="left", segments="packed")
# What is wrong, the exception, what the message must say: the expectation, what came, and what to do.
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "impl": (
        {"impl": "refrence"},
        ValueError,
        ["auto, reference, sdpa", "'refrence'", "did you mean 'reference'"],
    ),
    "q type": ({"q": [1.0]}, TypeError, ["q must be a tensor", "(B, H, T, D)", "list"]),
    "q axes": ({"q": GOOD.q[0]}, ValueError, ["q must have shape (B, H, T, D)", "(4, 5, 4)"]),
    "q dtype": ({"q": GOOD.q.long()}, TypeError, ["q must be float16", "int64", "q.float()"]),
    "k axes": ({"k": GOOD.k[0]}, ValueError, ["k must have shape (B, G, S, D)"]),
    "k dtype": ({"k": GOOD.k.float()}, TypeError, ["k and q", "float32", "float64", "k.to(q.dtype)"]),
    "k size": ({"k": GOOD.k[..., :3]}, ValueError, ["k must have shape", "(2, 2, 8, 4)", "(2, 2, 8, 3)"]),
    "k batch": ({"k": GOOD.k[:1]}, ValueError, ["k must have shape", "(2, 2, 8, 4)", "(1, 2, 8, 4)"]),
    "v dtype": ({"v": GOOD.v.float()}, TypeError, ["v and q", "v.to(q.dtype)"]),
    "v keys": ({"v": GOOD.v[:, :, :7]}, ValueError, ["v must have shape", "(2, 2, 8, 3)", "(2, 2, 7, 3)"]),
    "heads": (
        {"k": torch.cat((GOOD.k, GOOD.k[:, :1]), 1), "v": torch.cat((GOOD.v, GOOD.v[:, :1]), 1)},
        ValueError,
        ["H must be a multiple of", "G (3), got 4; use 3 or 6"],
    ),
    "few keys": (
        {"k": GOOD.k[:, :, :4], "v": GOOD.v[:, :, :4], "select_q": None, "select_k": None},
        ValueError,
        ["S = 4", "T = 5", "pass the keys of all tokens so far"],
    ),
    "half a select": ({"select_k": None}, ValueError, ["select_q and select_k go together", "give both"]),
    "select batch": (
        {"select_q": GOOD.select_q[:1]},
        ValueError,
        ["select_q must have shape", "(2, 2, 5, 5)"],
    ),
    "select size": (
        {"select_k": GOOD.select_k[..., :4]},
        ValueError,
        ["select_k must have shape", "(2, 2, 8, 5)"],
    ),
    "select dtype": ({"select_q": GOOD.select_q.float()}, TypeError, ["select_q and q must have one dtype"]),
    "no selector": (
        {"select_q": GOOD.select_q[:, :0], "select_k": GOOD.select_k[:, :0]},
        ValueError,
        ["at least one selection head", "(2, 0, 5, 5)"],
    ),
    "soft_mask size": (
        {"soft_mask": GOOD.soft_mask[..., :2]},
        ValueError,
        ["(B, R, S-T) = (2, 2, 3)", "(2, 2, 2)"],
    ),
    "soft_mask dtype": (
        {"soft_mask": GOOD.soft_mask.long()},
        TypeError,
        ["soft_mask must be float", "int64"],
    ),
    "key_mask dtype": (
        {"key_mask": GOOD.key_mask.long()},
        TypeError,
        ["must be bool (True = real", ".bool()"],
    ),
    "key_mask size": (
        {"key_mask": GOOD.key_mask[:, :5]},
        ValueError,
        ["key_mask must have shape", "(2, 8)", "(2, 5)"],
    ),
    "segments dtype": (
        {"segment_ids": GOOD.segment_ids.float()},
        TypeError,
        ["segment_ids must be integers"],
    ),
    "segments size": (
        {"segment_ids": GOOD.segment_ids[:1]},
        ValueError,
        ["segment_ids must have shape", "(2, 8)"],
    ),
    "device": (
        {"k": GOOD.k.to("meta")},
        ValueError,
        ["k and q must be on one device", "meta", "k.to(q.device)"],
    ),
    "mask device": (
        {"key_mask": GOOD.key_mask.to("meta")},
        ValueError,
        ["key_mask and q must be on one device"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, monkeypatch: pytest.MonkeyPatch):
    def computes(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed something before the check")

    monkeypatch.setattr(api, "visible_keys", computes)
    wrong, exception, parts = ERRORS[case]
    with pytest.raises(exception) as raised:
        selective_attention(**{**vars(GOOD), **wrong})
    for part in parts:
        assert part in str(raised.value)


@settings(max_examples=60)
@given(
    x=inputs(),
    queries=st.integers(1, 45),
    block=st.integers(1, 48),
    width=st.integers(1, 48),
    fit=st.sampled_from([1, 100, 1000]),
    size=st.sampled_from([1.0, 1e-3, 30.0]),
)
def test_blocked_in_any_geometry(x: Inputs, queries: int, block: int, width: int, fit: int, size: float):
    """However the plane is cut, with small logits and with some that need a maximum: what the formula gives."""
    groups, heads, earlier = x.k.shape[1], x.q.shape[1], x.k.shape[2] - x.q.shape[2]
    x = random_inputs(
        batch=3,
        groups=groups,
        repeats=heads // groups,
        queries=queries,
        earlier=earlier,
        selectors=None if x.select_q is None else x.select_q.shape[1],
        soft_mask=x.soft_mask is not None,
        padding="none" if x.key_mask is None else "holes",
        segments="none" if x.segment_ids is None else "packed",
        seed=queries,
    )
    x = replace(x, q=x.q * size)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "BLOCK", block)
        patch.setattr(tiles, "WIDTH", width)
        patch.setattr(tiles, "TILE", block * width)
        patch.setattr(tiles, "TOGETHER", block * width * fit // 100 + 1)
        for impl in ("reference", "blocked"):
            leaves = x.map(lambda t: t.clone().requires_grad_())
            outs, wanted = leaves.run(impl), list(leaves.floats().values())
            torch.manual_seed(0)
            loss = sum((torch.randn(o.shape, dtype=torch.float64) * o).sum() for o in outs)
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            found = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
            results.append([*outs, *found])
    for expected, got in zip(*results, strict=True):
        close(got, expected, 1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("selectors", [None, 2])
@pytest.mark.parametrize("after_counts", [False, True])
@pytest.mark.parametrize("size", [2.0, 4.0])
def test_blocked_without_the_keys_that_nobody_needs(
    masked: bool, selectors: int | None, after_counts: bool, size: float, monkeypatch: pytest.MonkeyPatch
):
    """Keys that were voted away before a block are left out of it, and neither outputs nor gradients show it."""
    monkeypatch.setattr(tiles, "BLOCK", 48)
    monkeypatch.setattr(tiles, "WIDTH", 20)
    monkeypatch.setattr(tiles, "TILE", 960)
    left_out = []
    needed = blocked._needed

    def spy(*arguments: Any) -> Any:
        found = needed(*arguments)
        left_out.append(0 if found is None else len(found.others))
        return found

    monkeypatch.setattr(blocked, "_needed", spy)
    padding = "holes" if masked else "none"
    x = random_inputs(batch=2, queries=300, earlier=9, selectors=selectors, padding=padding)
    x = replace(x, q=x.q * size, select_q=None if x.select_q is None else 4 * x.select_q)
    results = []
    for impl in ("reference", "blocked"):
        leaves = x.map(lambda t: t.clone().requires_grad_())
        (out, soft_mask), wanted = leaves.run(impl), list(leaves.floats().values())
        loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
        if after_counts:
            loss = loss + (soft_mask * torch.linspace(0, 1, soft_mask.shape[-1])).sum()
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        found = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
        results.append([out, soft_mask, *found])
    for expected, got in zip(*results, strict=True):
        close(got, expected, 1e-9)
    assert max(left_out) > 10


@pytest.mark.parametrize("size", [0.5, 40.0])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_blocked_is_causal_softmax_attention(size: float, masked: bool):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 300, d, dtype=torch.float64) for h, d in ((4, 6), (2, 6), (2, 3)))
    leaves = [(size * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    key_mask = torch.rand(2, 300) > 0.3 if masked else None
    visible = visible_keys(300, 300, key_mask, None, q.device)
    results = []
    for out in (plain_blocked(*leaves, 0.4, key_mask), attention_reference(*leaves, visible, 0.4)):
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-10)


def test_blocked_refuses_double_backward():
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    out, _ = selective_attention(q, k, v, impl="blocked")
    gradient = torch.autograd.grad(out.sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_blocked_compiles_forward_and_backward():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 40, 8, requires_grad=True) for _ in range(3)]

    def loss(q, k, v):
        out, soft_mask = selective_attention(q, k, v, impl="blocked")
        return out.square().sum() + soft_mask.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for got, gradient in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        close(got, gradient, 1e-5)


@pytest.mark.parametrize("size", [0.5, 3.0, 20.0])
def test_blocked_stays_exact_where_weights_underflow(size: float):
    """Votes far above the logits make weights that are no normal numbers; they are dropped, nothing else is."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 8) * scale for scale in (size, size, 1.0))
    for got, expected in zip(
        selective_attention(q, k, v, impl="blocked"),
        selective_attention(q.double(), k.double(), v.double(), impl="reference"),
        strict=True,
    ):
        close(got / expected.abs().max(), expected / expected.abs().max(), 1e-5)


class DenormalsOf(TorchDispatchMode):
    """Counts the numbers that every operation makes below the normal ones."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (
            isinstance(made, Tensor)
            and made.is_floating_point()
            and not func.is_view
            and "empty" not in str(func)
        ):
            smallest = torch.finfo(made.dtype).tiny
            self.found += int(((made != 0) & (made.abs() < smallest)).sum())
        return made


@pytest.mark.parametrize("size", [0.5, 1.0, 5.0])
def test_blocked_makes_no_denormal_numbers_of_small_gradients(size: float, monkeypatch: pytest.MonkeyPatch):
    """They are right but a hundred times slower: no weight may be so small that its products become denormal."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 700, 8) * s for s in (size, size, 1.0))
    gradient = 1e-8 * torch.randn(1, 2, 700, 8)
    monkeypatch.setattr(
        blocked, "_forward", blocked._forward._init_fn
    )  # inside operators no mode sees anything
    monkeypatch.setattr(blocked, "_backward", blocked._backward._init_fn)
    scale = 8**-0.5
    with DenormalsOf() as counter:
        out, _, before, log_sum = blocked._forward(q, k, v, None, None, None, None, None, scale, scale, True)
        gradients = blocked._backward(
            q, k, v, None, None, None, None, out, before, log_sum, gradient, None, scale, scale, True
        )
    assert counter.found == 0
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    right, _ = selective_attention(*leaves, impl="reference")
    for got, expected in zip(gradients, torch.autograd.grad(right, leaves, gradient.double()), strict=False):
        close(got / expected.abs().max(), expected / expected.abs().max(), 1e-5)


@pytest.mark.parametrize("votes", [1e6, -100.0, "first"])
def test_blocked_takes_any_votes_already_cast(votes: float | str):
    """Also such as no earlier call makes: on the first key, and negative ones."""
    x = random_inputs(batch=1, queries=600, earlier=100, groups=1, selectors=None)
    mask = torch.full((1, 1, 100), 500.0, dtype=torch.float64) if votes == "first" else x.soft_mask * votes
    x = replace(x, soft_mask=mask)
    for got, expected in zip(x.run("blocked"), x.run("reference"), strict=True):
        close(got, expected, 1e-9)


def test_bfloat16_gradients_do_not_suffer_from_values_far_from_zero():
    torch.manual_seed(0)
    q, k, v, gradient = torch.randn(4, 1, 2, 400, 16).bfloat16()
    v = v + 30
    results = []
    for impl, dtype in (("blocked", torch.bfloat16), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out, _ = selective_attention(*leaves, impl=impl)
        results.append(torch.autograd.grad(out, leaves, gradient.to(dtype)))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() / expected.norm() < 1e-2


def test_forward_mode_raises_instead_of_giving_zeros():
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    for function in (
        lambda q: selective_attention(q, k, v, impl="blocked")[0],
        lambda q: unmasked_count(q[:, :1], k[:, :1]),
    ):
        with pytest.raises(NotImplementedError, match=r"forward-mode|torch\.func transforms"):
            torch.func.jvp(function, (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("length", [127, 129, 150, 255, 257])
def test_blocked_takes_several_rows_of_shared_key_heads_together(length: int):
    """As they come: short rows, keys that several heads share, and the tiles of the kernel itself."""
    x = random_inputs(batch=5, queries=length, earlier=0, soft_mask=False, groups=2, repeats=2)
    leaves = x.map(lambda t: t.requires_grad_())
    results = []
    for impl in ("reference", "blocked"):
        out, _ = leaves.run(impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), [leaves.q, leaves.k, leaves.v])))
    for expected, got in zip(*results, strict=True):
        close(got, expected, 1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("length", "n_keys"), [(9, 9), (5, 9), (1, 9)])
def test_whatever_padding_holds(impl, bad, length, n_keys):
    """Values, F and gradients are those with zeros in its place."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, n_keys, dtype=torch.bool)
    mask[0, :3] = mask[1, 4:6] = mask[1, -1] = False
    sizes = {"q": (4, length, 6), "k": (2, n_keys, 6), "v": (2, n_keys, 5)}
    sizes |= {"select_q": (2, length, 3), "select_k": (2, n_keys, 3)}

    def results(filled):
        generator.manual_seed(0)
        tensors = {}
        for name, (heads, tokens, size) in sizes.items():
            x = torch.randn(2, heads, tokens, size, generator=generator, dtype=torch.float64)
            tensors[name] = x.masked_fill_(~mask[:, None, n_keys - tokens :, None], filled).requires_grad_()
        out, after = selective_attention(**tensors, key_mask=mask, impl=impl)
        (out.square().sum() + after.sum()).backward()
        return out, after, *(x.grad for x in tensors.values())

    for found, expected in zip(results(bad), results(0.0), strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", ["blocked", "auto", "reference", "sdpa"])
def test_transforms_of_torch_func(impl):
    q, k, v = (torch.randn(2, 2, 7, 4, dtype=torch.float64) for _ in range(3))

    def loss(q):
        return selective_attention(q, k, v, impl=impl)[0].square().sum()

    if impl == "blocked":
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
            with pytest.raises(
                NotImplementedError, match=r"has no torch\.func transforms.*use impl='reference'"
            ):
                transform(loss)(q)
        return
    leaf = q.clone().requires_grad_()
    selective_attention(leaf, k, v, impl="reference")[0].square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(q), leaf.grad)
