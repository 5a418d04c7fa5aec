"""The C++ operator beyond what every implementation has to pass (test_selective.py)."""

import math

import pytest
import torch
from torch import Tensor

from heedful.ops.dot_product import attention_reference
from heedful.ops.masks import visible_keys
from heedful.ops.native import status
from heedful.ops.selective import selective_attention
from heedful.ops.selective.native import selective as native
from heedful.ops.selective.native.selective import plain_native

ACCURACY = {torch.float64: 1e-12, torch.float32: 2e-5}

pytestmark = pytest.mark.skipif(not status().active, reason=status().reason)


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def results(impl: str, leaves: list[Tensor], **options: Tensor | None) -> list[Tensor]:
    """Outputs and gradients in float64; both outputs count."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    q, k, v, *start = leaves
    out, after = selective_attention(q, k, v, soft_mask=start[0] if start else None, impl=impl, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    loss = (out.double() * weights).sum() + 0.01 * after.double().sum()
    return [x.detach().double() for x in (out, after, *torch.autograd.grad(loss, leaves))]


def agree(got: list[Tensor], expected: list[Tensor], accuracy: float) -> None:
    for a, b in zip(got, expected, strict=True):
        a, b = a.detach(), b.detach()
        error = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        assert error <= accuracy, f"off by {error:.2g}"


@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 95, 96, 97, 129, 193, 257, 400])
def test_odd_lengths(length: int, dtype: torch.dtype):
    x = drawn((2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 16), dtype=dtype)
    agree(results("native", x), results("reference", [t.double() for t in x]), ACCURACY[dtype])


@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
@pytest.mark.parametrize(
    ("size", "v_size"), [(1, 1), (7, 3), (8, 8), (16, 16), (40, 40), (64, 64), (96, 64), (128, 128)]
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sizes_and_shared_heads(size: int, v_size: int, groups: int, dtype: torch.dtype):
    x = drawn((1, 4, 110, size), (1, groups, 130, size), (1, groups, 130, v_size), (1, 1, 20), dtype=dtype)
    x[3].abs_()
    agree(results("native", x), results("reference", [t.double() for t in x]), ACCURACY[dtype])


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("selectors", [None, 1, 2])
def test_masks_and_selection_heads_over_several_tiles(padding: str, segments: bool, selectors: int | None):
    x = drawn((2, 4, 250, 8), (2, 2, 300, 8), (2, 2, 300, 5))
    key = torch.arange(300)
    real = {"left": key >= 90, "right": key < 230, "holes": key * 7 % 10 > 2}[padding]
    options = {"key_mask": torch.stack((real, torch.ones_like(real)))}
    if segments:
        options["segment_ids"] = torch.stack((key // 110, key % 2))
    if selectors:
        options["select_q"], options["select_k"] = drawn(
            (2, selectors, 250, 6), (2, selectors, 300, 6), seed=1
        )
    agree(results("native", x, **options), results("reference", x, **options), 1e-11)


@pytest.mark.parametrize("size", [0.05, 1.0, 4.0])
def test_keys_that_nobody_needs_are_left_out(size: float):
    """With small logits none is, with large ones whole tiles are; both give what the formula says."""
    q, k, v = drawn((1, 4, 700, 16), (1, 2, 700, 16), (1, 2, 700, 16))
    x = [size * q, k, v]
    agree(results("native", x), results("reference", x), 1e-11)
    leaves = [t.clone().requires_grad_() for t in x]  # only here may the backward pass leave them out too
    got, expected = (
        torch.autograd.grad(selective_attention(*leaves, impl=impl)[0].sin().sum(), leaves)
        for impl in ("native", "reference")
    )
    agree(list(got), list(expected), 1e-11)


def test_chunks_chain_to_the_bits_of_the_whole():
    """Pieces that end where blocks end are the same blocks."""
    q, k, v = drawn((2, 4, 384, 16), (2, 2, 384, 16), (2, 2, 384, 16), dtype=torch.float32)
    whole, mask = selective_attention(q, k, v, impl="native")
    outs, held = [], None
    for start in range(0, 384, 2 * native.BLOCK):
        stop = start + 2 * native.BLOCK
        out, held = selective_attention(
            q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], soft_mask=held, impl="native"
        )
        outs.append(out)
    assert torch.equal(torch.cat(outs, 2), whole)
    assert torch.equal(held, mask)


@pytest.mark.parametrize("batch", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(batch: int):
    x = drawn((batch, 4, 500, 16), (batch, 2, 500, 16), (batch, 2, 500, 16), dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results("native", x))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e3, 0.0])
@pytest.mark.parametrize(("length", "cut"), [(200, 1), (200, 50), (200, 97), (200, 199), (700, 650)])
def test_what_comes_later_changes_at_most_how_it_is_rounded(length: int, cut: int, bad: float):
    """The longest query and key of all say which keys weigh nothing, so that it may round otherwise."""
    x = drawn((1, 4, length, 16), (1, 2, length, 16), (1, 2, length, 16), dtype=torch.float32)
    expected, _ = selective_attention(*x, impl="native")
    for t in x:
        t[:, :, cut:] = bad
    out, _ = selective_attention(*x, impl="native")
    torch.testing.assert_close(out[:, :, :cut], expected[:, :, :cut], rtol=1e-6, atol=1e-6)
    assert math.isfinite(bad) or out[:, :, cut:].isnan().all()


def test_a_nan_spreads_to_later_tokens_as_in_the_formula():
    x = drawn((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    x[1][:, :, 4] = torch.nan
    got, expected = (selective_attention(*x, impl=impl)[0].isnan() for impl in ("native", "reference"))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_gradients_of_any_size(size: float):
    x = drawn((1, 2, 150, 16), (1, 2, 150, 16), (1, 2, 150, 16))
    found = []
    for impl, dtype in (("native", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in x]
        out, _ = selective_attention(*leaves, impl=impl)
        grads = torch.autograd.grad(out, leaves, torch.full_like(out, size))
        found.append([g.double() / size for g in grads])
    agree(*found, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_float32(dtype: torch.dtype):
    x = drawn((1, 4, 200, 16), (1, 4, 200, 16), (1, 4, 200, 16), dtype=dtype)
    out, mask = selective_attention(*x, impl="native")
    wide, wide_mask = selective_attention(*(t.float() for t in x), impl="native")
    assert out.dtype == dtype and torch.equal(out, wide.to(dtype))
    assert mask.dtype == torch.float32 and torch.equal(mask, wide_mask)


@pytest.mark.parametrize("layout", ["tokens first", "features first"])
def test_layouts(layout: str):
    x = drawn((2, 4, 130, 16), (2, 2, 130, 16), (2, 2, 130, 16))
    axes = (1, 2) if layout == "tokens first" else (2, 3)
    other = [t.transpose(*axes).contiguous().transpose(*axes) for t in x]
    assert all(torch.equal(a, b) for a, b in zip(results("native", x), results("native", other), strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_plain_native_is_causal_softmax_attention(masked: bool):
    leaves = [t.requires_grad_() for t in drawn((2, 4, 300, 6), (2, 2, 300, 6), (2, 2, 300, 3))]
    key_mask = torch.arange(300) * torch.tensor([[1], [7]]) % 10 > 2 if masked else None
    visible = visible_keys(300, 300, key_mask, None, leaves[0].device)
    found = []
    for out in (plain_native(*leaves, 0.4, key_mask), attention_reference(*leaves, visible, 0.4)):
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    agree(*found, 1e-11)


def test_operator_is_registered_as_it_should():
    q, k, v = (t.requires_grad_() for t in drawn((1, 2, 100, 8), (1, 1, 100, 8), (1, 1, 100, 8)))
    arguments = (q, k, v, None, None, None, None, None, 0.3, 0.3, True)
    torch.library.opcheck(torch.ops.heedful.selective_native.default, arguments)


def test_compiles_in_one_graph_with_gradients():
    x = [
        t.requires_grad_() for t in drawn((2, 4, 100, 8), (2, 4, 100, 8), (2, 4, 100, 8), dtype=torch.float32)
    ]

    def loss(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        out, mask = selective_attention(q, k, v, impl=impl)
        return out.square().sum() + mask.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*x, "native"), x)
    for impl in ("native", "auto"):
        for got, gradient in zip(torch.autograd.grad(compiled(*x, impl), x), expected, strict=True):
            assert torch.equal(got, gradient)


def test_auto_takes_it_on_the_cpu_but_not_in_float64(monkeypatch: pytest.MonkeyPatch):
    from heedful.ops.selective import api

    called = []
    monkeypatch.setitem(api.BLOCKED, "native", lambda *a: called.append(a[0].dtype) or a[:2])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        selective_attention(*drawn((1, 2, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), dtype=dtype))
    assert called == [torch.float32, torch.bfloat16]
