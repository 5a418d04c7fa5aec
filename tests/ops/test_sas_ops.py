"""The steps of SAS against plain layers and loops."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from heedful.ops import aggregate_heads, simulate_features, simulate_heads
from heedful.ops.native import status
from heedful.ops.rope import rope, rotation
from heedful.ops.sas import NOWHERE, Features, Placement, expand
from heedful.ops.sas.pieces import Layers, pieces
from heedful.ops.sas.placing import place

SMALL = st.integers(1, 4)
FAST = ("unfolded", "blocked", "native") if status().active else ("unfolded", "blocked")


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


def expansion(
    heads: int,
    sim: int,
    width: int,
    size: int,
    wide: int | None,
    bias: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[torch.Tensor | None], Features | None]:
    """Weights for `expand`."""

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, dtype=torch.float64) / shape[-1]).to(dtype).requires_grad_()

    def offset(n: int) -> torch.Tensor | None:
        return draw(n) if bias else None

    conv = [draw(sim, heads, width), offset(sim), draw(sim, sim, width), offset(sim)]
    if wide is None:
        return conv, None
    return conv, Features(draw(wide, size), offset(wide), draw(wide, wide), offset(wide))


def placement(
    wide: int, batch: int, length: int, norm: bool, rotated: bool, norm_first: bool, by_row: bool
) -> Placement:
    """A norm and a rotation; the positions of each row are its own, or those of all."""
    cos, sin = None, None
    if rotated:
        positions = torch.randint(0, 50, (batch if by_row else 1, length))
        cos, sin = rotation(positions, wide, torch.float64)
    return Placement(randn(wide) if norm else None, 1e-3, cos, sin, norm_first)


def gradients(out: torch.Tensor, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return torch.autograd.grad(out.square().sum(), wanted)


@given(
    batch=SMALL,
    length=st.integers(1, 9),
    heads=SMALL,
    sim=SMALL,
    half_width=st.integers(0, 2),
    size=SMALL,
    wide=st.none() | st.integers(1, 6),
    bias=st.booleans(),
    piece=st.sampled_from([1, 40, 100, 10**6]),
    frozen=st.sets(st.integers(0, 9)),
    impl=st.sampled_from(FAST),
    placed=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_the_expansion_equals_its_steps(
    batch: int,
    length: int,
    heads: int,
    sim: int,
    half_width: int,
    size: int,
    wide: int | None,
    bias: bool,
    piece: int,
    frozen: set[int],
    impl: str,
    placed: tuple[bool, bool, bool, bool],
    seed: int,
):
    torch.manual_seed(seed)
    wide = wide and 2 * wide
    conv, features = expansion(heads, sim, 2 * half_width + 1, size, wide, bias)
    at = NOWHERE if wide is None else placement(wide, batch, length, *placed)
    x = randn(batch, length, size, heads).transpose(1, 3)  # (B, H, D, T): every stride is unusual
    x = x.transpose(2, 3).detach().requires_grad_()
    inputs = [x, *conv, *(features or ()), at.norm]
    for i in frozen:
        if i < len(inputs) and inputs[i] is not None:
            inputs[i].requires_grad_(False)
    expected = expand(x, *conv, features, at, impl="reference")
    with mock.patch("heedful.ops.sas.pieces.PIECE", piece):
        got = expand(x, *conv, features, at, impl=impl)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert got.requires_grad == expected.requires_grad
        if not got.requires_grad:
            return
        pairs = zip(gradients(got, *inputs), gradients(expected, *inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize(("batch", "length"), [(1, 50), (7, 3), (3, 25), (2, 1)])
def test_pieces_cover_every_token_once(batch: int, length: int):
    x, conv = torch.zeros(batch, length, 2, 4), expansion(2, 4, 3, 4, 6, True)
    layers = Layers.of(*conv[0], *conv[1])  # type: ignore[arg-type, misc]
    with mock.patch("heedful.ops.sas.pieces.PIECE", 10 * 4 * 6):
        for rows, tokens in pieces(x, layers):
            assert 1 <= x[rows, tokens].numel() // 8 <= 10
            x[rows, tokens] += 1
    assert (x == 1).all()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("wide", [None, 12])
def test_the_expansion_in_low_precision(impl: str, dtype: torch.dtype, tolerance: float, wide: int | None):
    """Against float64 from the same inputs, many pieces: errors do not add up in the sums over pieces."""
    torch.manual_seed(0)
    conv, features = expansion(4, 12, 3, 8, wide, True, dtype)
    inputs = [torch.randn(2, 4, 300, 8).to(dtype).requires_grad_(), *conv, *(features or ())]
    double = [t.detach().double().requires_grad_() for t in inputs]
    with mock.patch("heedful.ops.sas.pieces.PIECE", 4000):
        if impl == "native" and dtype == torch.bfloat16:
            with pytest.raises(ValueError, match="one dtype, float32 or float64"):
                expand(*inputs[:5], Features(*inputs[5:]) if features else None, impl=impl)
            return
        got = expand(*inputs[:5], Features(*inputs[5:]) if features else None, impl=impl)
        found = gradients(got, *inputs)
    expected = expand(*double[:5], Features(*double[5:]) if features else None, impl="reference")
    for ours, theirs in zip((got, *found), (expected, *gradients(expected, *double)), strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < tolerance, f"{tuple(ours.shape)}: {error:.1e}"


@pytest.mark.skipif(not status().active, reason=status().reason)
@pytest.mark.parametrize(
    ("heads", "sim", "width", "size", "wide"),
    [
        (8, 24, 5, 64, 96),
        (8, 24, 3, 16, 24),
        (3, 42, 7, 10, 70),
        (4, 12, 5, 33, 50),
        (1, 5, 1, 1, 2),
        (2, 6, 9, 4, 6),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_native_expansion_at_many_sizes(
    heads: int, sim: int, width: int, size: int, wide: int, dtype: torch.dtype
):
    """Whole and broken tiles, kernels wider than a head; the same for any number of threads, to the bit."""
    torch.manual_seed(0)
    conv, features = expansion(heads, sim, width, size, wide, True, dtype)
    at = placement(wide, 2, 113, True, True, True, True)
    at = Placement(*(x.detach().to(dtype) if isinstance(x, Tensor) else x for x in at))
    x = torch.randn(2, heads, 113, size, dtype=dtype, requires_grad=True)
    runs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = expand(x, *conv, features, at, impl="native")
            runs.append((out, *gradients(out, x, *conv, *features)))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    double = [w.detach().double().requires_grad_() for w in (x, *conv, *features)]
    wide_at = Placement(*(x.double() if isinstance(x, Tensor) else x for x in at))
    expected = expand(*double[:5], Features(*double[5:]), wide_at, impl="reference")
    for ours, theirs in zip(runs[0], (expected, *gradients(expected, *double)), strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-14), f"{tuple(ours.shape)}: {error:.1e}"


@pytest.mark.skipif(not status().active, reason=status().reason)
def test_the_native_expansion_spreads_nan_as_its_steps_do():
    conv, features = expansion(2, 4, 3, 4, 6, True)
    x = randn(1, 2, 3, 4).detach()
    x[0, 1, 1, 2] = torch.nan
    for case in (features, None):
        ours, theirs = (expand(x, *conv, case, impl=impl) for impl in ("native", "reference"))
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert ours[:, :, 1].isnan().any() and not ours[:, :, ::2].isnan().any()


def test_auto_takes_the_native_expansion_in_float32_alone():
    active = status().active
    for dtype, expected in ((torch.float32, active), (torch.float64, False), (torch.bfloat16, False)):
        conv, features = expansion(2, 4, 3, 4, 6, True, dtype)
        x = torch.randn(1, 2, 3, 4, dtype=dtype)
        with mock.patch("heedful.ops.sas.expand.run_expand", side_effect=InterruptedError) as called:
            if expected:
                with pytest.raises(InterruptedError):
                    expand(x, *conv, features)
            else:
                expand(x, *conv, features)
            assert called.called == expected
    conv, features = expansion(2, 4, 3, 4, 6, True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        expand(torch.randn(1, 2, 3, 4), *conv, features, impl="native")


def test_the_expansion_keeps_its_input_alone():
    conv, features = expansion(2, 6, 3, 4, 8, True)
    x, sizes = randn(1, 2, 500, 4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        expand(x, *conv, features)
    weights = sum(w.numel() for w in (*conv, *features) if w is not None)
    assert sum(sizes) == x.numel() + weights


def test_placing_is_norm_and_rope():
    x, gains = randn(2, 3, 4, 6), randn(6)
    positions = torch.tensor([[3, 5, 8, 9], [0, 0, 1, 2]])
    cos, sin = rotation(positions, 6, torch.float64, theta=100.0, base_dim=4)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * gains

    def turn(x: torch.Tensor) -> torch.Tensor:
        return rope(x, positions, theta=100.0, base_dim=4)

    for first, expected in ((True, turn(norm(x))), (False, norm(turn(x)))):
        torch.testing.assert_close(place(x, Placement(gains, 0.1, cos, sin, first)), expected)
    torch.testing.assert_close(place(x, Placement(None, 0.1, cos, sin, True)), turn(x))
    torch.testing.assert_close(place(x, Placement(gains, 0.1, None, None, True)), norm(x))
    assert place(x, NOWHERE) is x


def test_the_expansion_is_a_proper_operator():
    everywhere = placement(6, 2, 3, True, True, True, True)
    for wide, bias, at in ((6, True, everywhere), (6, False, NOWHERE), (None, False, NOWHERE)):
        conv, features = expansion(2, 4, 3, 4, wide, bias)
        arguments = (randn(2, 3, 2, 4), *conv, *(features or [None] * 4), *at)
        for native in (False, True) if status().active else (False,):
            torch.library.opcheck(torch.ops.heedful.sas_expand.default, (*arguments, native))


@pytest.mark.parametrize("impl", FAST)
def test_the_expansion_compiles(impl: str):
    conv, features = expansion(2, 4, 3, 4, 6, True)
    x, at = randn(2, 2, 5, 4), placement(6, 2, 5, True, True, False, False)
    expected = expand(x, *conv, features, at, impl=impl)
    got = torch.compile(expand, fullgraph=True, backend="aot_eager")(x, *conv, features, at, impl=impl)
    torch.testing.assert_close(got, expected)
    inputs = (x, *conv, *features, at.norm)
    for ours, theirs in zip(gradients(got, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("fast", ["blocked", "unfolded"])
def test_the_expansion_under_autocast_equals_its_steps(fast: str, placed: bool):
    torch.manual_seed(0)
    conv, features = expansion(4, 8, 3, 8, 12, True, torch.float32)
    at, x = NOWHERE, torch.randn(2, 4, 30, 8, requires_grad=True)
    if placed:
        gains = torch.randn(12, requires_grad=True)
        at = Placement(gains, 1e-6, *rotation(torch.arange(30), 12, torch.float32), True)
    inputs, found = [t for t in (x, *conv, *features, at.norm) if t is not None], []
    weight = torch.randn(2, 8, 30, 12)
    for impl in (fast, "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = expand(x, *conv, features, at, impl=impl)
        found.append((out, *torch.autograd.grad((out.float() * weight).sum(), inputs)))
    assert found[0][0].dtype == (torch.float32 if placed else torch.bfloat16)
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() < 2e-2 * theirs.double().norm()


def test_the_expansion_has_no_second_derivative():
    conv, features = expansion(2, 4, 3, 4, 6, True)
    x = randn(1, 2, 3, 4)
    (grad,) = torch.autograd.grad(expand(x, *conv, features).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="sas_expand_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", FAST)
def test_the_expansion_on_meta_tensors_and_without_tokens(impl: str):
    conv, features = expansion(2, 4, 3, 4, 6, True)
    meta = [None if w is None else w.to("meta") for w in (*conv, *features)]
    out = expand(
        torch.empty(2, 2, 5, 4, dtype=torch.float64, device="meta"), *meta[:4], Features(*meta[4:]), impl=impl
    )
    assert out.shape == (2, 4, 5, 6)
    for shape in ((2, 2, 0, 4), (0, 2, 5, 4)):
        x = randn(*shape)
        out = expand(x, *conv, features, impl=impl)
        assert out.shape == (shape[0], 4, shape[2], 6)
        out.sum().backward()
        assert conv[0].grad.eq(0).all()


def test_the_expansion_refuses_what_its_steps_refuse():
    conv, features = expansion(3, 6, 3, 5, 8, True, torch.float32)
    at = placement(8, 1, 4, True, False, True, False)
    with pytest.raises(ValueError, match="a placement needs features"):
        expand(X, *conv, None, at)
    with pytest.raises(ValueError, match=r"impl must be .*'blocked' or 'native', got 'fast'"):
        expand(X, *conv, features, impl="fast")
    for impl in ("blocked", "reference"):
        with pytest.raises(ValueError, match="W must be odd"):
            expand(X, conv[0][..., :2], *conv[1:], features, impl=impl)
        with pytest.raises(ValueError, match=r"weight1 must have shape \(D̂, D\) = \(8, 5\)"):
            expand(X, *conv, features._replace(weight1=torch.zeros(8, 4)), impl=impl)
        with pytest.raises(TypeError, match="weight2 and x must have one dtype"):
            expand(X, *conv, features._replace(weight2=torch.zeros(8, 8).double()), impl=impl)
