"""The fused and the readable softmax attention against each other and a formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heedful.ops.dot_product import (
    attention_reference,
    attention_sdpa,
    masked_softmax,
    repeat_kv,
    wide_logits,
)

SMALL = st.integers(1, 4)


@given(groups=SMALL, repeats=SMALL, keys=st.integers(1, 9), size=SMALL, v_size=SMALL, seed=st.integers(0, 99))
def test_sdpa_equals_reference(groups: int, repeats: int, keys: int, size: int, v_size: int, seed: int):
    torch.manual_seed(seed)
    q = torch.randn(2, groups * repeats, keys, size, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, groups, keys, size, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, groups, keys, v_size, dtype=torch.float64, requires_grad=True)
    visible = torch.ones(keys, keys, dtype=torch.bool).tril()[None]
    expected = attention_reference(q, k, v, visible, 0.7)
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(repeats, 1)) * 0.7
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    torch.testing.assert_close(expected, weights @ v.repeat_interleave(repeats, 1))
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for out in (
        attention_sdpa(q, k, v, 0.7, causal=True),
        attention_sdpa(q, k, v, 0.7, mask=visible[:, None]),
    ):
        torch.testing.assert_close(out, expected)
        for got, wanted in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_keys_is_zero(dtype: torch.dtype):
    logits = torch.randn(1, 1, 2, 3, dtype=dtype, requires_grad=True)
    visible = torch.tensor([[False, False, False], [True, False, True]])
    weights = masked_softmax(logits, visible)
    assert (weights[0, 0, 0] == 0).all()
    assert weights[0, 0, 1].sum().item() == pytest.approx(1.0)
    assert weights[0, 0, 1, 1] == 0
    weights.square().sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 0, 0] == 0).all()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask_heads", [0, 1, 4])
def test_one_query_of_shared_keys_copies_none(groups: int, mask_heads: int, monkeypatch: pytest.MonkeyPatch):
    """With no mask, one for all heads, or one for each."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 6, dtype=torch.float64) for heads, n in ((4, 1), (groups, 7), (groups, 7))
    )
    bias = torch.randn(2, mask_heads, 1, 7, dtype=torch.float64) if mask_heads else None
    logits = q @ repeat_kv(k, 4).mT * 0.3
    expected = (logits + (0.0 if bias is None else bias)).softmax(-1) @ repeat_kv(v, 4)
    monkeypatch.setattr("heedful.ops.dot_product.repeat_kv", None)
    torch.testing.assert_close(attention_sdpa(q, k, v, 0.3, mask=bias), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wide_logits(q, k, 0.3), logits, rtol=1e-12, atol=1e-12)


def test_keys_whose_features_lie_apart_take_the_fused_kernel():
    """It keeps no logits, so that it saves for the gradient less than they take."""
    torch.manual_seed(0)
    q, v = torch.randn(2, 1, 2, 128, 8)
    k = torch.randn(1, 2, 8, 128, requires_grad=True).mT
    kept = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        out = attention_sdpa(q, k, v, 0.3, causal=True)
    assert max(kept) < 2 * 128 * 128
    expected = attention_reference(q, k, v, torch.ones(1, 128, 128, dtype=torch.bool).tril(), 0.3)
    torch.testing.assert_close(out, expected)
