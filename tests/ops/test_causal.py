"""Causal attention with values narrower than the queries."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heedful.ops import causal
from heedful.ops.causal import causal_attention
from heedful.ops.dot_product import attention_reference
from heedful.ops.native.library import preferred

SMALL = st.integers(1, 4)


@given(
    groups=SMALL, repeats=SMALL, length=st.integers(2, 20), size=SMALL, v_size=SMALL, seed=st.integers(0, 99)
)
def test_both_ways_equal_the_reference(
    groups: int, repeats: int, length: int, size: int, v_size: int, seed: int
):
    torch.manual_seed(seed)
    q = torch.randn(2, groups * repeats, length, size, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, groups, length, size, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, groups, length, v_size, dtype=torch.float64, requires_grad=True)
    visible = torch.ones(1, length, length, dtype=torch.bool).tril()
    expected = attention_reference(q, k, v, visible, 0.7)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for impl in ("auto", "sdpa"):
        with mock.patch.object(causal, "LONG", 1):
            out = causal_attention(q, k, v, 0.7, impl=impl)
        torch.testing.assert_close(out, expected)
        for got, wanted in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("tiles", "dtype", "length", "v_size", "impl"),
    [
        (True, torch.float32, 256, 4, "auto"),
        (False, torch.float32, 256, 4, "sdpa"),
        (False, torch.float32, 256, 6, "auto"),
        (False, torch.float32, 255, 4, "auto"),
        (False, torch.bfloat16, 256, 4, "auto"),
    ],
)
def test_tiles_are_for_long_texts_and_narrow_values_in_full_precision(
    tiles: bool, dtype: torch.dtype, length: int, v_size: int, impl: str
):
    q = torch.randn(1, 2, length, 6, dtype=dtype)
    v = torch.randn(1, 2, length, v_size, dtype=dtype)
    name = "plain_native" if preferred("cpu", dtype) else "plain_blocked"
    with mock.patch.object(causal, name, return_value=v) as blocked:
        causal_attention(q, q, v, 0.4, impl=impl)
        assert blocked.called == tiles
        blocked.reset_mock()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert causal_attention(q, q, v, 0.4, impl=impl).dtype == torch.bfloat16
        assert not blocked.called


def test_a_single_query_sees_every_key():
    q, k, v = torch.randn(1, 2, 1, 6), torch.randn(1, 2, 300, 6), torch.randn(1, 2, 300, 4)
    expected = attention_reference(q, k, v, torch.ones(1, 1, 300, dtype=torch.bool), 0.4)
    torch.testing.assert_close(causal_attention(q, k, v, 0.4), expected)


def test_no_tokens():
    empty = torch.zeros(2, 2, 0, 6)
    assert causal_attention(empty, empty, empty[..., :4], 0.4).shape == (2, 2, 0, 4)
