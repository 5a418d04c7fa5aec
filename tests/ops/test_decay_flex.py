"""FlexAttention with decay against the formula in float64: outputs anywhere, gradients on a GPU."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.ops.decay import RunningSums, decay_reference
from heedful.ops.decay_flex import attend_flex, flex_pays, flex_unavailable
from heedful.ops.dot_product import masked_softmax, repeat_kv, wide_logits
from heedful.ops.masks import visible_keys

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """The shape of one call."""

    batch: int = 2
    heads: int = 4
    groups: int = 4
    size: int = 64
    v_size: int = 64
    queries: int = 67
    earlier: int = 0
    segments: bool = False
    padding: bool = False
    gate: float = 0.0  # before the sigmoid


CASES = {
    "plain": Case(3),
    "one row": Case(1, size=128, v_size=128, queries=130),
    "padding, grouped": Case(groups=2, padding=True, queries=330),
    "segments and padding": Case(segments=True, padding=True, queries=330),
    "narrow values": Case(size=96, v_size=64, segments=True, padding=True, queries=130),
    "earlier keys": Case(earlier=75, segments=True, padding=True, queries=130),
    "40": Case(size=40, v_size=40, padding=True),
    "16": Case(size=16, v_size=16, queries=130, padding=True),
    "long": Case(1, 2, 2, queries=4096, gate=-2.0),
}
names = pytest.mark.parametrize("name", CASES)


def both(case: Case, dtype: torch.dtype, device: str, gradients: bool) -> list[list[Tensor]]:
    """The output and, if wanted, the gradients of q, k, v and the steps: of `attend_flex` and of the formula."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    batch, heads, groups, size, v_size, queries, earlier, segments, padding, gate = case
    keys = queries + earlier
    q, k, v = (
        2 * randn(batch, heads, queries, size),
        randn(batch, groups, keys, size),
        randn(batch, groups, keys, v_size),
    )
    dtype_of_sums = torch.promote_types(dtype, torch.float32)
    steps = F.softplus(-(gate + randn(batch, heads, queries).to(dtype_of_sums)))
    before = randn(batch, heads, earlier).abs().to(dtype_of_sums) if earlier else None
    real = (torch.rand(batch, keys, generator=draw) > 0.2).to(device) if padding else None
    ids = torch.randint(0, 3, (batch, keys), generator=draw).to(device) if segments else None
    visible = visible_keys(queries, keys, real, ids, q.device)
    silent = ~visible.any(-1)[:, None]
    grad, found = randn(batch, heads, queries, v_size), []
    for exact in (False, True):
        leaves = [(x.double() if exact else x.clone()).requires_grad_(gradients) for x in (q, k, v, steps)]
        a, b, c, given = leaves
        given = given.masked_fill(silent, 0.0)
        if exact:
            held = None if before is None else before.double()
            decay = decay_reference(given, held, visible.tril(earlier - 1))
            weights = masked_softmax(wide_logits(a, b, size**-0.5) - decay, visible[:, None])
            out = weights @ repeat_kv(c, heads)
        else:
            sums = RunningSums.of(F.pad(given, (earlier, 0)), ids)
            out = attend_flex(a, b, c, sums, before, visible, size**-0.5)
            assert out.dtype == dtype
        found.append([out, *(torch.autograd.grad(out, leaves, grad.to(out.dtype)) if gradients else ())])
    return found


def close(found: list[list[Tensor]], tolerance: float) -> None:
    for got, expected in zip(*found, strict=True):
        assert got.isfinite().all()
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, error


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_outputs(name: str, dtype: torch.dtype):
    case = CASES[name] if name != "long" else CASES[name]._replace(queries=1100)
    close(both(case, dtype, "cpu", gradients=False), TOLERANCE[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has gradients on a GPU alone")
@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients(name: str, dtype: torch.dtype):
    close(both(CASES[name], dtype, "cuda", gradients=True), TOLERANCE[dtype])


@pytest.mark.parametrize("trained", range(4))
def test_where_it_cannot_run(trained: int):
    tensors = [torch.zeros(1, 2, 5, 16, requires_grad=n == trained) for n in range(4)]
    reason = flex_unavailable(*tensors)
    assert reason is not None and "has gradients on NVIDIA GPUs alone, got tensors on cpu" in reason
    with torch.no_grad():
        assert flex_unavailable(*tensors) is None
        reason = flex_unavailable(*(x.to("meta") for x in tensors))
    assert reason is not None and "takes tensors on cpu, cuda, xpu, hpu, mps, got meta; use impl=" in reason
    assert not flex_pays(*tensors)
