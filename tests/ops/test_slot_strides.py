"""Slot operations take tensors of any strides: the numbers of float64 loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from heedful.ops.selective.one_query import selective_one_query
from heedful.ops.selective.pruned import attend_pruned
from heedful.ops.selective.slots import attend_slots


def swapped(x: Tensor, a: int, b: int) -> Tensor:
    """The same values, the axes a and b swapped in memory."""
    return x.transpose(a, b).contiguous().transpose(a, b)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "heads after tokens": lambda x: swapped(x, 1, 2),
    "features outermost": lambda x: swapped(x, 0, -1),
    "features before tokens": lambda x: swapped(x, -2, -1),
    "part of more features": lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]],
    "every other feature": lambda x: torch.stack((x, -x), dim=-1).flatten(-2)[..., ::2],
    "part of more tokens": lambda x: torch.cat((x, x), dim=-2).narrow(-2, 0, x.shape[-2]),
    "every other row": lambda x: torch.stack((x, -x), dim=1).flatten(0, 1)[::2],
    "every other head": lambda x: torch.stack((x, -x), dim=2).flatten(1, 2)[:, ::2],
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "one row for all": lambda x: x[:1].expand_as(x),
}
LAYOUT = st.sampled_from(sorted(LAYOUTS))
FLAT = st.sampled_from(["contiguous", "part of more tokens", "features outermost", "every other feature"])
SIZES = st.tuples(st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1)]), st.integers(2, 9))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
ACCURACY = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}


def laid(x: Tensor, layout: str) -> Tensor:
    """The tensor in another layout; the expanded ones have other values."""
    return LAYOUTS[layout](x)


def flat(x: Tensor, layout: str) -> Tensor:
    """A (B, S) tensor in another layout, through (B, S) as tokens and features."""
    if layout == "features outermost":
        return x.t().contiguous().t()
    if layout == "every other feature":
        return torch.stack((x, x), dim=-1).flatten(-2)[:, ::2]
    return torch.cat((x, x), dim=1)[:, : x.shape[1]] if layout == "part of more tokens" else x.contiguous()


def loop(
    q: Tensor, k: Tensor, v: Tensor, before: Tensor, visible: Tensor, voted: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(L - F) v and the F after all queries, one number at a time; F before: (B, S)."""
    batch, heads, length, _ = q.shape
    shared = heads // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    out, after = q.new_zeros(*q.shape[:3], v.shape[-1]), before.double().clone()
    for b in range(batch):
        for t in range(length):
            seen = [j for j in range(k.shape[2]) if visible[b, t, j]]
            for h in range(heads):
                logits = [float(q[b, h, t] @ k[b, h // shared, j]) * scale - float(after[b, j]) for j in seen]
                weights = [math.exp(logit - max(logits)) for logit in logits]
                for j, weight in zip(seen, weights, strict=True):
                    out[b, h, t] += weight / sum(weights) * v[b, h // shared, j]
            for j in range(k.shape[2]):
                if voted[b, t, j]:
                    after[b, j] += max(0.0, float(q[b, 0, t] @ k[b, 0, j]) * scale)
    return out, after


def draw(seed: int, sizes, length: int, dtype: torch.dtype, layouts) -> tuple[list[Tensor], torch.Generator]:
    """Q of `length` queries, k and v of at least as many keys."""
    batch, (heads, groups), n = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, length, 4), (batch, groups, n, 4), (batch, groups, n, 3)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [laid(x, layout) for x, layout in zip(drawn, layouts, strict=True)], generator


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=ACCURACY[dtype], atol=ACCURACY[dtype])


@given(st.integers(0, 10**6), SIZES, DTYPES, st.tuples(LAYOUT, LAYOUT, LAYOUT), st.tuples(FLAT, FLAT))
def test_attend_slots(seed, sizes, dtype, layouts, others):
    (q, k, v), generator = draw(seed, sizes, 1, dtype, layouts)
    batch, n = k.shape[0], k.shape[2]
    wide = torch.promote_types(dtype, torch.float32)
    soft_mask = flat(torch.rand(batch, n, generator=generator, dtype=torch.float64).to(wide), others[0])
    order = 1 + torch.stack([torch.randperm(n - 1, generator=generator) for _ in range(batch)])
    positions = flat(torch.cat((torch.zeros(batch, 1, dtype=torch.long), order), dim=1), others[1])
    newest = positions.argmax(-1, keepdim=True)
    everywhere = torch.ones(batch, 1, n, dtype=torch.bool)
    voted = (positions > 0).scatter(1, newest, False)[:, None]
    expected, after = loop(q, k, v, soft_mask, everywhere, voted, 0.4)
    out, slot = attend_slots(q, k, v, soft_mask, positions, newest, 0.4)
    close(out, expected, dtype)
    close(soft_mask, after, dtype)
    held = soft_mask[:, 1:]
    assert torch.equal(held.gather(1, slot - 1)[:, 0], held.amax(1))


@given(st.integers(0, 10**6), SIZES, DTYPES, st.tuples(LAYOUT, LAYOUT, LAYOUT), st.booleans(), st.booleans())
def test_selective_one_query(seed, sizes, dtype, layouts, masked, earlier):
    (q, k, v), generator = draw(seed, sizes, 1, dtype, layouts)
    batch, n = k.shape[0], k.shape[2]
    soft_mask = torch.rand(batch, n - 1, 1, generator=generator, dtype=torch.float64).to(dtype).mT
    before = torch.nn.functional.pad(soft_mask.double(), (0, 1))[:, 0]
    visible = torch.rand(batch, 1, n, generator=generator) > 0.3 if masked else torch.ones(batch, 1, n) > 0
    visible[..., -1] = True
    voted = visible.clone()
    voted[..., 0] = voted[..., -1] = False
    expected, after = loop(q, k, v, before if earlier else 0 * before, visible, voted, 0.4)
    masks = (visible, voted) if masked else (None, None)
    out, got = selective_one_query(q, k, v, None, soft_mask if earlier else None, *masks, 0.4)
    close(out, expected, dtype)
    close(got[:, 0], after, dtype)


@given(
    st.integers(0, 10**6),
    SIZES,
    st.integers(2, 9),
    DTYPES,
    st.tuples(LAYOUT, LAYOUT, LAYOUT),
    FLAT,
    st.booleans(),
)
def test_attend_pruned(seed, sizes, length, dtype, layouts, other, evicted):
    length = min(length, sizes[2])
    (q, k, v), generator = draw(seed, sizes, length, dtype, layouts)
    batch, n = k.shape[0], k.shape[2]
    held = n - length
    soft_mask = torch.rand(batch, 1, held, generator=generator, dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    positions = torch.arange(n).expand(batch, -1).clone()
    positions = flat(positions, other)
    gone_at = torch.randint(0, length + 1, (batch, n), generator=generator)
    gone_at = torch.maximum(gone_at, torch.arange(n) - held + 1)  # nobody goes before it arrived
    gone_at[:, 0] = length
    query = torch.arange(length)[:, None]
    causal = torch.arange(n) <= query + held
    visible = (causal & (query < gone_at[:, None])) if evicted else causal.expand(batch, -1, -1)
    voted = (causal & (torch.arange(n) < query + held))[None] & (positions > 0)[:, None]
    before = torch.nn.functional.pad(soft_mask[:, 0], (0, length))
    expected, after = loop(q, k, v, before, visible, voted, 0.4)
    out, got = attend_pruned(
        q, k, v, soft_mask if held else None, positions, 0.4, lambda rows: gone_at if evicted else None
    )
    close(out, expected, dtype)
    close(got[:, 0], after, dtype)


def test_layouts_hold_what_they_say():
    x = torch.arange(2 * 4 * 3 * 5).view(2, 4, 3, 5)
    for name, layout in LAYOUTS.items():
        if not name.startswith("one "):
            assert torch.equal(layout(x), x), name
        assert name == "contiguous" or layout(x).stride() != x.stride(), name
    y = x[0, 0]
    for name in ("features outermost", "every other feature", "part of more tokens"):
        assert torch.equal(flat(y, name), y) and flat(y, name).stride() != y.stride(), name


@pytest.mark.parametrize("layout", ["heads after tokens", "one head for all"])
def test_grouped_heads_of_the_layout_that_a_projection_gives(layout: str):
    """Heads side by side in one projection: (B, T, H * D) seen as (B, H, T, D)."""
    (q, k, v), _ = draw(0, (2, (4, 2), 6), 6, torch.float64, (layout, layout, layout))
    positions = torch.arange(6).expand(2, -1)
    visible = torch.ones(6, 6).tril() > 0
    voted = (visible & (torch.arange(6) > 0)).tril(-1).expand(2, -1, -1)
    expected, _ = loop(q, k, v, torch.zeros(2, 6), visible.expand(2, -1, -1), voted, 0.4)
    out, _ = attend_pruned(q, k, v, None, positions, 0.4, lambda rows: None)
    close(out, expected, torch.float64)
