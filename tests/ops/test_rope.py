"""rope: what rotary positions promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heedful.ops import rope


def scores(q: torch.Tensor, k: torch.Tensor, at_q: torch.Tensor, at_k: torch.Tensor, **options: float):
    return rope(q, at_q, **options) @ rope(k, at_k, **options).transpose(-1, -2)


@given(half=st.integers(1, 8), length=st.integers(1, 7), shift=st.integers(0, 5000), seed=st.integers(0, 99))
def test_scores_depend_on_relative_positions(half: int, length: int, shift: int, seed: int):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 2, length, 2 * half, dtype=torch.float64)
    at = torch.randint(0, 50, (length,))
    for base_dim in (None, max(half, 2)):
        moved = scores(q, k, at + shift, at + shift, base_dim=base_dim)
        torch.testing.assert_close(moved, scores(q, k, at, at, base_dim=base_dim))
    if length > 1 and at.unique().numel() > 1:
        assert not torch.allclose(scores(q, k, 2 * at, 2 * at), scores(q, k, at, at))


def test_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).reshape(1, 1, 1, 4)
    got = rope(x, torch.tensor([3]), theta=100.0).flatten().tolist()
    a, b = 3.0, 3.0 / 10.0  # 3 * 100^0 and 3 * 100^(-2/4), on the pairs (0, 2) and (1, 3)
    expected = [
        math.cos(a) - 3 * math.sin(a),
        2 * math.cos(b) - 4 * math.sin(b),
        3 * math.cos(a) + math.sin(a),
        4 * math.cos(b) + 2 * math.sin(b),
    ]
    assert got == pytest.approx(expected, abs=1e-12)


@given(half=st.integers(1, 6), extra=st.integers(0, 6), seed=st.integers(0, 99))
def test_base_dim_keeps_the_narrow_frequencies(half: int, extra: int, seed: int):
    """Features of each half of D, placed at the start of that half of D̂, turn as they did."""
    torch.manual_seed(seed)
    wide = half + extra
    x = torch.randn(2, 3, 5, 2 * half, dtype=torch.float64)
    at = torch.randint(0, 100, (2, 5))
    padded = torch.zeros(2, 3, 5, 2, wide, dtype=torch.float64)
    padded[..., :half] = x.unflatten(-1, (2, half))
    got = rope(padded.flatten(-2), at, base_dim=2 * half).unflatten(-1, (2, wide))
    torch.testing.assert_close(got[..., :half].flatten(-2), rope(x, at))
    assert (got[..., half:] == 0).all()


def test_positions_per_row_and_shared():
    x = torch.randn(2, 3, 5, 4)
    at = torch.arange(5)
    expected = rope(x, at)
    torch.testing.assert_close(rope(x, at[None]), expected)
    torch.testing.assert_close(rope(x, at.expand(2, -1)), expected)
    torch.testing.assert_close(rope(x, torch.stack((at, at + 1)))[0], expected[0])
    torch.testing.assert_close(rope(x, torch.zeros(5, dtype=torch.long)), x)


def test_low_precision_keeps_its_dtype_and_far_positions():
    """The angles are fp32: in bf16 position 4001 would be position 4000."""
    x = torch.randn(1, 1, 1, 8)
    got = rope(x.bfloat16(), torch.tensor([4001]))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(
        got.float(), rope(x.bfloat16().double(), torch.tensor([4001])).float(), rtol=0.01, atol=0.01
    )


def test_gradcheck():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: rope(x, torch.tensor([0, 4, 9])), (x,))


@pytest.mark.parametrize(
    ("shape", "positions", "message"),
    [
        ((1, 1, 3, 5), (3,), r"D must be even, got 5"),
        ((2, 1, 3, 4), (4,), r"\(T,\) = \(3,\) or \(B, T\) = \(2, 3\), got \(4,\)"),
        ((2, 1, 3, 4), (3, 3), r"\(B, T\) = \(2, 3\), got \(3, 3\)"),
        ((2, 3, 4), (3,), r"x must have shape \(B, H, T, D\), got \(2, 3, 4\)"),
    ],
    ids=["odd", "length", "batch", "axes"],
)
def test_errors(shape: tuple[int, ...], positions: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        rope(torch.zeros(shape), torch.zeros(positions, dtype=torch.long))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"x must be float16.*int64"):
        rope(torch.zeros(1, 1, 2, 4, dtype=torch.long), torch.arange(2))
