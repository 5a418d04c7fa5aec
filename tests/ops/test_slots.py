"""A decoding step over slots: the numbers of `selective_attention`, and the slot that goes next."""

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from heedful.ops.eviction import Rule, least_needed_slot, most_voted_slot
from heedful.ops.native import status
from heedful.ops.selective import selective_attention
from heedful.ops.selective.slots import attend_slots

WITH_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
WITH_NATIVE = pytest.mark.skipif(not status().active, reason=status().reason)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def drawn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@given(
    st.lists(
        st.sampled_from([0.0, 0.0, 1e-45, 1e-38, 0.1, 0.5, 0.5000001, 1.0, 3e38, float("inf")]),
        min_size=2,
        max_size=40,
    ),
    st.randoms(use_true_random=False),
    st.sampled_from([1, 10**6, 2**28]),
)
def test_the_slot_with_most_votes_the_oldest_among_equals(votes, draw, spread):
    positions = [0, *draw.sample(range(1, 1 + spread * len(votes)), len(votes) - 1)]
    for dtype in (torch.float32, torch.float64):
        held = torch.tensor([votes], dtype=torch.float32).to(dtype)
        slots = torch.tensor([positions])
        exact = [v.item() for v in held[0]]
        expected = min(range(1, len(exact)), key=lambda slot: (-exact[slot], positions[slot]))
        assert most_voted_slot(held, slots).item() == expected
        assert least_needed_slot(held, slots).item() == expected


@pytest.mark.parametrize(
    "impl",
    [
        "auto",
        "products",
        pytest.param("native", marks=WITH_NATIVE),
        pytest.param("triton", marks=WITH_TRITON),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 4, 4), (2, 4, 2), (3, 2, 1)]),
    st.integers(2, 40),
    st.sampled_from([(1, 1), (1, 1), (3, 1), (1, 4), (6, 2)]),
)
def test_attend_slots(impl, dtype, seed, sizes, n, safe):
    """In any order of the slots: what the last query of the whole gets, its votes, and who goes next."""
    batch, heads, groups = sizes
    if impl == "triton" and dtype == torch.float64:
        return
    size, v_size = (16, 32) if (impl, dtype) == ("triton", torch.bfloat16) else (8, 5)
    shapes = (batch, heads, 1, size), (batch, groups, n, size), (batch, groups, n, v_size)
    q, k, v = drawn(seed, *shapes, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randint(0, 4, (batch, 1, n - 1), generator=generator).to(wide) * 0.75
    votes[..., 0] = 0
    out, after = selective_attention(
        q.double(), k.double(), v.double(), soft_mask=votes.double(), scale=0.3, impl="reference"
    )
    order = torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.randperm(n - 1, generator=generator)))
    mask = torch.nn.functional.pad(votes[:, 0], (0, 1))[:, order]
    positions = order.expand(batch, -1).contiguous()
    newest = (order == n - 1).nonzero().expand(batch, -1)
    grace, first = safe if n >= sum(safe) else (1, 1)
    shuffled = q, k[:, :, order], v[:, :, order], mask, positions, newest
    got, slot = attend_slots(*shuffled, 0.3, impl, grace=grace, first=first)
    accuracy = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), out, atol=accuracy, rtol=accuracy)
    torch.testing.assert_close(mask.double(), after[:, 0, order], atol=accuracy, rtol=accuracy)
    following = torch.full((batch, 1), n)
    assert torch.equal(slot, least_needed_slot(mask, positions, following, grace, first))
    rule, alive = Rule(n, grace=grace, first=first), torch.ones_like(positions, dtype=torch.bool)
    left = rule.evict(alive, mask, positions, following, room=1)
    assert torch.equal(left.int().argmin(-1, keepdim=True), slot)


@pytest.mark.parametrize("impl", ["products", pytest.param("native", marks=WITH_NATIVE)])
@pytest.mark.parametrize("subtract", [True, False])
@given(st.integers(0, 10**6), st.integers(2, 30), st.booleans(), st.sampled_from([1, 7, 8, 32]))
def test_a_selection_head_of_its_own(impl, subtract, seed, n, own, size):
    """Its votes, or those of head 0, subtracted from the logits or not; keys may lie in a larger cache."""
    shapes = (2, 4, 1, 8), (2, 2, n, 8), (2, 2, n, 5), (2, 1, 1, size), (2, 1, n + 3, size)
    q, k, v, select_q, wide_k = drawn(seed, *shapes, dtype=torch.float64)
    select = (select_q, wide_k[:, :, :n]) if own else None
    before = drawn(seed + 1, (2, n), dtype=torch.float64)[0].abs()
    before[:, 0] = 0
    mask, positions = before.clone(), torch.arange(n).expand(2, -1).contiguous()
    newest = torch.full((2, 1), n - 1)
    out, _ = attend_slots(q, k, v, mask, positions, newest, 0.3, impl, select=select, subtract=subtract)
    logits = q @ k.repeat_interleave(2, 1).mT * 0.3
    chosen = logits[:, 0, 0] if select is None else (select[0] @ select[1].mT * 0.3)[:, 0, 0]
    votes = chosen.relu()
    votes[:, [0, n - 1]] = 0
    torch.testing.assert_close(mask, before + votes)
    weights = (logits - before[:, None, None] * subtract).softmax(-1)
    torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1))


def test_triton_has_no_selection_head_of_its_own():
    q, k, v = drawn(0, (1, 2, 1, 8), (1, 2, 9, 8), (1, 2, 9, 8), dtype=torch.float32)
    places = torch.arange(9)[None], torch.tensor([[8]])
    with pytest.raises(ValueError, match="impl='triton' takes the votes of head 0"):
        attend_slots(q, k, v, torch.zeros(1, 9), *places, 0.3, "triton", subtract=False)


def test_under_autocast_votes_stay_float32():
    q, k, v = drawn(0, (1, 2, 1, 8), (1, 2, 9, 8), (1, 2, 9, 8), dtype=torch.float32)
    mask, positions, newest = torch.zeros(1, 9), torch.arange(9)[None], torch.tensor([[8]])
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend_slots(q, k, v, mask, positions, newest, 0.3)
    assert out.dtype == torch.bfloat16
    rounded = [x.bfloat16().double() for x in (q, k, v)]
    _, after = selective_attention(*rounded, scale=0.3, impl="reference")
    assert mask.dtype == torch.float32
    torch.testing.assert_close(
        mask[:, 1:-1].double(), (rounded[0][:, 0] @ rounded[1][:, 0].mT * 0.3).relu()[:, 0, 1:-1]
    )
    assert after.shape == (1, 1, 9)


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = drawn(0, (1, 2, 1, 8), (1, 2, 9, 8), (1, 2, 9, 8), dtype=torch.float32)
    with pytest.raises(ValueError, match="cannot run here"):
        attend_slots(
            q, k, v, torch.zeros(1, 9), torch.arange(9)[None], torch.tensor([[8]]), 0.3, impl="triton"
        )


@pytest.mark.parametrize("impl", ["sdpa", "blocked", "reference", "fast"])
def test_what_it_does_not_have_raises(impl: str) -> None:
    q, k, v = drawn(0, (1, 2, 1, 8), (1, 2, 9, 8), (1, 2, 9, 8), dtype=torch.float32)
    mask = torch.zeros(1, 9)
    with pytest.raises(
        ValueError, match=f"impl must be 'auto' or 'native' or 'products' or 'triton', got {impl!r}"
    ):
        attend_slots(q, k, v, mask, torch.arange(9)[None], torch.tensor([[8]]), 0.3, impl)
    assert not mask.any()


@WITH_NATIVE
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [64, 24])
def test_native_step_in_place_on_slots_of_a_larger_cache(threads, size):
    """Keys are views of a buffer with room for more; votes are added to a row of it."""
    q, keys, values = drawn(0, (2, 4, 1, size), (2, 2, 900, size), (2, 2, 900, size), dtype=torch.float32)
    k, v, n = keys[:, :, :700], values[:, :, :700], 700
    held = torch.rand(2, 900)
    held[:, 0] = 0
    positions, newest = torch.arange(900).expand(2, -1), torch.full((2, 1), n - 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mask = held.clone()
        out, slot = attend_slots(q, k, v, mask[:, :n], positions[:, :n], newest, 0.1, "native")
    finally:
        torch.set_num_threads(before)
    other = held.clone()
    expected, other_slot = attend_slots(q, k, v, other[:, :n], positions[:, :n], newest, 0.1, "products")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mask, other, atol=1e-5, rtol=1e-5)
    assert torch.equal(mask[:, n:], held[:, n:])
    assert torch.equal(slot, other_slot)


@WITH_NATIVE
def test_native_step_is_registered_as_it_should():
    q, k, v = drawn(0, (1, 4, 1, 8), (1, 2, 9, 8), (1, 2, 9, 8), dtype=torch.float32)
    arguments = (q, k, v, torch.zeros(1, 9), torch.arange(9)[None], torch.tensor([[8]]), 0.3, 3, 2)
    for own in ((None, None, True), (*drawn(1, (1, 1, 1, 5), (1, 1, 9, 5), dtype=torch.float32), False)):
        torch.library.opcheck(torch.ops.heedful.attend_slots_native.default, (*arguments, *own))


def test_who_looks_sees_the_operator():
    """Under no_grad the C++ operator is called directly, but not where somebody records what is called."""
    q, k, v = drawn(0, (1, 2, 1, 8), (1, 2, 9, 8), (1, 2, 9, 8), dtype=torch.float32)
    positions, newest = torch.arange(9)[None], torch.tensor([[8]])

    def step(q: torch.Tensor) -> torch.Tensor:
        return attend_slots(q, k, v, torch.zeros(1, 9), positions, newest, 0.3)[0]

    other = 2 * q
    with torch.no_grad():
        traced = torch.jit.trace(step, q, check_trace=False)
        made = make_fx(step)(q)
        torch.testing.assert_close(traced(other), step(other))
        torch.testing.assert_close(made(other), step(other))


@pytest.mark.parametrize("impl", ["products", pytest.param("native", marks=WITH_NATIVE)])
def test_no_row_at_all(impl: str):
    q, k = torch.zeros(0, 4, 1, 8), torch.zeros(0, 2, 9, 8)
    none = torch.zeros(0, 9)
    out, slot = attend_slots(q, k, k, none, none.long(), none[:, :1].long(), 0.3, impl)
    assert out.shape == (0, 4, 1, 8) and slot.shape == (0, 1)
