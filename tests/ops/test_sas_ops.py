"""The steps of SAS against plain layers and loops."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from heedful.ops import aggregate_heads, simulate_features, simulate_heads

SMALL = st.integers(1, 4)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@given(
    heads=SMALL,
    sim=SMALL,
    half_width=st.integers(0, 2),
    size=SMALL,
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_simulate_heads_is_a_convolution_over_features(
    heads: int, sim: int, half_width: int, size: int, bias: bool, seed: int
):
    torch.manual_seed(seed)
    width = 2 * half_width + 1
    x, weight1, weight2 = randn(2, heads, 3, size), randn(sim, heads, width), randn(sim, sim, width)
    bias1, bias2 = (randn(sim), randn(sim)) if bias else (None, None)
    got = simulate_heads(x, weight1, bias1, weight2, bias2)
    expected = torch.empty_like(got)
    for b in range(2):
        for t in range(3):
            wide = F.conv1d(x[b, :, t], weight1, bias1, padding="same")
            expected[b, :, t] = wide + F.conv1d(wide.relu(), weight2, bias2, padding="same")
    torch.testing.assert_close(got, expected)
    inputs = [t for t in (x, weight1, weight2, bias1, bias2) if t is not None]
    ours = torch.autograd.grad(got.square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_width_one_is_an_mlp_over_heads():
    x, weight1, weight2 = randn(2, 3, 4, 5), randn(6, 3, 1), randn(6, 6, 1)
    wide = torch.einsum("gh,bhtd->bgtd", weight1[..., 0], x)
    expected = wide + torch.einsum("gh,bhtd->bgtd", weight2[..., 0], wide.relu())
    torch.testing.assert_close(simulate_heads(x, weight1, None, weight2, None), expected)


def test_simulate_features_shares_one_mlp():
    x, weight1, weight2, bias1, bias2 = randn(2, 3, 4, 5), randn(7, 5), randn(7, 7), randn(7), randn(7)
    got = simulate_features(x, weight1, bias1, weight2, bias2)
    for h in range(3):
        for t in range(4):
            wide = x[0, h, t] @ weight1.t() + bias1
            torch.testing.assert_close(got[0, h, t], wide + wide.relu() @ weight2.t() + bias2)


@given(heads=SMALL, groups=SMALL, size=SMALL, bias=st.booleans(), seed=st.integers(0, 99))
def test_averaging_and_projecting_commute(heads: int, groups: int, size: int, bias: bool, seed: int):
    """PEAA as published: every group through the projection, then the mean."""
    torch.manual_seed(seed)
    x, weight = randn(2, groups * heads, 3, size), randn(6, heads * size)
    offset = randn(6) if bias else None
    projected = [
        F.linear(x[:, g * heads : (g + 1) * heads].transpose(1, 2).flatten(2), weight, offset)
        for g in range(groups)
    ]
    torch.testing.assert_close(aggregate_heads(x, heads, weight, offset), torch.stack(projected).mean(0))


def test_no_tokens():
    assert simulate_heads(randn(2, 3, 0, 4), randn(6, 3, 3), None, randn(6, 6, 3), None).shape == (2, 6, 0, 4)
    assert aggregate_heads(randn(2, 6, 0, 4), 3, randn(8, 12)).shape == (2, 0, 8)


X = torch.zeros(2, 3, 4, 5)
ERRORS: dict[str, tuple[Any, tuple[Any, ...], type[Exception], list[str]]] = {
    "even kernel": (
        simulate_heads,
        (X, torch.zeros(6, 3, 2), None, torch.zeros(6, 6, 2), None),
        ValueError,
        ["W must be odd", "got 2", "use 1 or 3"],
    ),
    "conv1 heads": (
        simulate_heads,
        (X, torch.zeros(6, 4, 3), None, torch.zeros(6, 6, 3), None),
        ValueError,
        ["weight1 must have shape (Ĥ, H, W) = (6, 3, 3)", "(6, 4, 3)"],
    ),
    "conv2": (
        simulate_heads,
        (X, torch.zeros(6, 3, 3), None, torch.zeros(6, 3, 3), None),
        ValueError,
        ["weight2 must have shape (Ĥ, Ĥ, W) = (6, 6, 3)", "(6, 3, 3)"],
    ),
    "x axes": (
        simulate_heads,
        (X[0], torch.zeros(6, 3, 3), None, torch.zeros(6, 6, 3), None),
        ValueError,
        ["x must have shape (B, H, T, D)", "(3, 4, 5)"],
    ),
    "lin1": (
        simulate_features,
        (X, torch.zeros(8, 4), None, torch.zeros(8, 8), None),
        ValueError,
        ["weight1 must have shape (D̂, D) = (8, 5)", "(8, 4)"],
    ),
    "lin2": (
        simulate_features,
        (X, torch.zeros(8, 5), None, torch.zeros(8, 5), None),
        ValueError,
        ["weight2 must have shape (D̂, D̂) = (8, 8)", "(8, 5)"],
    ),
    "integers": (
        simulate_features,
        (X.long(), torch.zeros(8, 5), None, torch.zeros(8, 8), None),
        TypeError,
        ["x must be float16", "int64", "x.float()"],
    ),
    "groups": (aggregate_heads, (X, 2, torch.zeros(8, 10)), ValueError, ["n_heads (2), got 3; use 2 or 4"]),
    "projection": (
        aggregate_heads,
        (X, 3, torch.zeros(8, 12)),
        ValueError,
        ["weight must have shape (C, H*E) = (8, 15)", "(8, 12)"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str):
    function, arguments, exception, parts = ERRORS[case]
    with pytest.raises(exception) as raised:
        function(*arguments)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("name", ["weight1", "bias1", "weight2", "bias2"])
def test_a_parameter_of_another_dtype_or_device_is_refused(name):
    x = torch.randn(1, 2, 3, 4)
    good = {
        "weight1": torch.randn(4, 2, 3),
        "bias1": torch.randn(4),
        "weight2": torch.randn(4, 4, 3),
        "bias2": torch.randn(4),
    }
    with pytest.raises(TypeError, match=f"{name} and x must have one dtype"):
        simulate_heads(x, **{**good, name: good[name].double()})
    with pytest.raises(ValueError, match=f"{name} and x must be on one device"):
        simulate_heads(x, **{**good, name: good[name].to("meta")})
