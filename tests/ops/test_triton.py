"""The Triton kernels against the reference in float64: on a GPU if there is one, else in Triton's interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heedful.ops import selective_attention
from heedful.ops.eviction import least_needed_slot
from heedful.ops.selective.triton import attend_slots_triton, available, unavailable
from heedful.ops.selective.triton.arguments import in_heads, in_sixteens

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """The shape of one call."""

    queries: int
    earlier: int = 0
    batch: int = 1
    heads: int = 2
    groups: int = 2
    size: int = 32
    v_size: int = 32
    selectors: int | None = None  # None: head 0 selects
    select_size: int = 24
    padding: bool = False
    segments: bool = False
    scale: float | None = None

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        keys = self.queries + self.earlier
        found = {
            "q": 2 * randn(self.batch, self.heads, self.queries, self.size),
            "k": randn(self.batch, self.groups, keys, self.size),
            "v": randn(self.batch, self.groups, keys, self.v_size),
        }
        if self.selectors:
            found["select_q"] = 2 * randn(self.batch, self.selectors, self.queries, self.select_size)
            found["select_k"] = randn(self.batch, self.selectors, keys, self.select_size)
        if self.earlier:
            found["soft_mask"] = randn(self.batch, self.selectors or 1, self.earlier).abs().float()
        return found

    def options(self) -> dict[str, object]:
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.queries + self.earlier)
        real = torch.rand(shape, generator=generator) > 0.3
        ids = torch.randint(-1, 2, shape, generator=generator) * 2**40
        return {
            "key_mask": real.to(DEVICE) if self.padding else None,
            "segment_ids": ids.to(DEVICE) if self.segments else None,
            "scale": self.scale,
        }


def results(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype, impl: str) -> dict[str, Tensor]:
    """Both outputs, and the gradients of every input from both of them."""
    leaves = {
        name: (x.double() if impl == "reference" else x).detach().requires_grad_()
        for name, x in inputs.items()
    }
    outputs = selective_attention(**leaves, **case.options(), impl=impl)
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    gradients[0] = gradients[0].to(dtype).to(gradients[0].dtype)  # the same rounded ones for both
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return {"out": outputs[0], "after": outputs[1], **dict(zip(leaves, found, strict=True))}


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, x in expected.items():
        assert got[name].isfinite().all(), name
        size = x.abs().max().item() or 1.0  # where all is 0, as with a single token: what is summed is near 1
        error = (got[name].double() - x).abs().max().item() / size
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: Tensor) -> Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


CASES = {
    "one token": Case(1, size=33, v_size=40),
    "odd": Case(17, batch=2),
    "several blocks, grouped": Case(130, groups=1, size=64),
    "96 and 64, earlier keys": Case(37, 70, heads=1, groups=1, size=96, v_size=64),
    "64": Case(70, heads=2, groups=1, size=64, v_size=64),
    "128": Case(67, heads=1, groups=1, size=128, v_size=128, scale=0.2),
    "padding": Case(70, 21, batch=2, heads=1, groups=1, padding=True),
    "segments": Case(83, heads=1, groups=1, segments=True),
    "two selectors": Case(70, 5, heads=4, selectors=2, padding=True, segments=True),
    "a selector across groups": Case(40, heads=3, groups=1, selectors=2, select_size=40),
}


INTERPRETED_SLOWLY = {
    "several blocks, grouped": pytest.mark.slow,
    **dict.fromkeys(("padding", "a selector across groups", "two selectors"), pytest.mark.exhaustive),
    **dict.fromkeys(("64", "128", "segments"), pytest.mark.exhaustive),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=INTERPRETED_SLOWLY.get(name, ())) for name, case in CASES.items()],
)
def test_equals_the_formula(case: Case, poisoned: None):
    inputs = case.inputs(torch.float32)
    got, expected = (results(case, inputs, torch.float32, impl) for impl in ("triton", "reference"))
    close(got, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("several blocks, grouped", torch.bfloat16, marks=pytest.mark.exhaustive),
        ("96 and 64, earlier keys", torch.float16),
        ("64", torch.bfloat16),
        pytest.param("several blocks, grouped", torch.float16, marks=pytest.mark.exhaustive),
        pytest.param("96 and 64, earlier keys", torch.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param("128", torch.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param("two selectors", torch.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param("two selectors", torch.float16, marks=pytest.mark.exhaustive),
        ("one token", torch.bfloat16),
        pytest.param("a selector across groups", torch.float16, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_half_precision(name: str, dtype: torch.dtype, poisoned: None):
    case = CASES[name]
    inputs = case.inputs(dtype)
    got, expected = (results(case, inputs, dtype, impl) for impl in ("triton", "reference"))
    close(got, expected, TOLERANCE[dtype])
    assert got["out"].dtype == dtype and got["after"].dtype == torch.float32
    # Votes are summed in float32, whatever the inputs are.
    assert (got["after"].double() - expected["after"]).abs().max() <= 1e-5 * expected["after"].abs().max()


def test_inputs_may_lie_anywhere():
    """Batch, heads and tokens in another order, heads that are one tensor, features that are not neighbours."""
    case = Case(35, batch=2, heads=2, groups=2)
    plain = case.inputs(torch.float32)
    moved = {
        "q": plain["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": plain["k"][:, :1].expand(-1, 2, -1, -1),
        "v": plain["v"].transpose(2, 3).contiguous().transpose(2, 3),
    }
    assert not any(x.is_contiguous() for x in moved.values())
    got, expected = (results(case, moved, torch.float32, impl) for impl in ("triton", "reference"))
    close(got, expected, TOLERANCE[torch.float32])


def test_half_precision_is_aligned():
    """To 16 elements: other rows are copied, other head sizes filled up with zeros."""
    x = torch.zeros(1, 2, 5, 64 + 4, dtype=torch.bfloat16)
    rows = in_heads(x[..., :64])
    assert (rows.row, rows.head) == (64, 5 * 64) and rows.data.data_ptr() != x.data_ptr()
    assert in_heads(x.float()[..., :64]).row == 68
    turned = torch.zeros(1, 5, 2, 64, dtype=torch.bfloat16).transpose(1, 2)
    assert in_heads(turned).data.data_ptr() == turned.data_ptr()
    filled = in_sixteens(torch.ones(1, 2, 5, 40, dtype=torch.bfloat16))
    assert filled.shape[-1] == 48 and not filled[..., 40:].any() and filled[..., :40].all()


def test_one_of_the_outputs_is_enough():
    case = Case(20)
    for which in (0, 1):
        found = []
        for impl in ("triton", "reference"):
            inputs = case.inputs(torch.float32)
            leaves = [(x if impl == "triton" else x.double()).requires_grad_() for x in inputs.values()]
            out = selective_attention(*leaves, impl=impl)[which]
            gradients = torch.autograd.grad(out.sum(), leaves, materialize_grads=True)
            found.append({str(n): g for n, g in enumerate(gradients)})
        close(*found, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("selectors", [None, 2])
def test_no_tokens(dtype: torch.dtype, selectors: int | None, poisoned: None):
    """Of no queries: what held votes get is the gradient of the votes held afterwards."""
    for earlier in (0, 70):
        case = Case(0, earlier, batch=2, heads=4, groups=4, size=8, v_size=8, selectors=selectors)
        inputs = case.inputs(dtype)
        got, expected = (results(case, inputs, dtype, impl) for impl in ("triton", "reference"))
        for name, x in expected.items():
            assert got[name].shape == x.shape
            torch.testing.assert_close(got[name].double(), x, msg=name)
        leaves = [x.requires_grad_() for x in list(inputs.values())[:3]]
        out, _ = selective_attention(*leaves, impl="triton")
        for gradient in torch.autograd.grad(out.sum(), leaves):  # the interpreter's bfloat16 has no exact 0
            torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.slow
def test_large_votes_keep_their_precision():
    """F in the hundreds beside logits of order one: what bfloat16 sums of votes would get wrong by whole units."""
    case = Case(130, heads=1, groups=1)
    inputs = case.inputs(torch.bfloat16)
    inputs["q"] = inputs["q"] * 4
    got, expected = (results(case, inputs, torch.bfloat16, impl) for impl in ("triton", "reference"))
    assert expected["after"].max() > 300
    close(got, expected, TOLERANCE[torch.bfloat16])


def test_compiles_forward_and_backward():
    case = Case(20, padding=True)
    options = case.options()
    inputs = [x.requires_grad_() for x in case.inputs(torch.float32).values()]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, soft_mask = selective_attention(q, k, v, **options, impl="triton")
        return out.square().sum() + soft_mask.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for got, gradient in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(got, gradient)


def test_fake_kernels_say_what_the_real_ones_give():
    inputs = Case(9, 4, selectors=2).inputs(torch.bfloat16)
    q, k, v, select_q, select_k, soft_mask = inputs.values()
    code = torch.zeros(1, 13, dtype=torch.int32, device=DEVICE)
    for held in ((select_q, select_k, soft_mask, code), (None, None, None, None)):
        torch.library.opcheck(
            torch.ops.heedful.selective_triton,
            (*(x.detach().requires_grad_() for x in (q, k, v)), *held, 0.2, 0.2),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_double_backward_is_refused():
    inputs = [x.requires_grad_() for x in Case(5).inputs(torch.float32).values()]
    out, _ = selective_attention(*inputs, impl="triton")
    gradient = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_deterministic_algorithms_are_refused_where_a_gradient_is_wanted():
    inputs = [x.requires_grad_() for x in Case(5).inputs(torch.float32).values()]
    out, _ = selective_attention(*inputs, impl="triton")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"no deterministic gradient.*use impl='sdpa'"):
            out.sum().backward()
        with pytest.raises(ValueError, match=r"deterministic algorithms were asked for.*no_grad"):
            selective_attention(*inputs, impl="triton")
        with torch.no_grad():
            selective_attention(*inputs, impl="triton")
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch):
    def refused(*inputs: Tensor) -> str:
        with pytest.raises(ValueError, match="impl='triton' cannot run here: ") as raised:
            selective_attention(*inputs, impl="triton")
        assert unavailable(inputs[0], inputs[2]) in str(raised.value)
        return str(raised.value)

    good = tuple(Case(5).inputs(torch.float32).values())
    assert unavailable(good[0], good[2]) is None
    message = refused(*(x.double() for x in good))
    assert "takes float16, bfloat16 and float32, got torch.float64; use impl='sdpa'" in message
    wide = torch.zeros(1, 2, 5, 129, device=DEVICE)
    assert "head sizes from 1 to 128, got D = 129" in refused(wide, wide, good[2])
    assert "got E = 129" in refused(good[0], good[1], wide)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = refused(*(x.cpu() for x in good))
    assert "needs an NVIDIA GPU, got tensors on cpu; use impl='blocked', or set TRITON_INTERPRET=1" in on_cpu
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed; pip install triton" in refused(*good)


def decoded(
    q: Tensor, k: Tensor, v: Tensor, soft_mask: Tensor, positions: Tensor, newest: Tensor, scale: float
) -> tuple[Tensor, Tensor, list[int]]:
    """One step over slots, row by row, in float64: out, the new soft mask, the next slot."""
    batch, heads, _, _ = q.shape
    out, mask, slots = [], soft_mask.double().clone(), []
    for b in range(batch):
        held = (positions[b] >= 0).nonzero()[:, 0]
        for h in range(heads):
            g = h * k.shape[1] // heads
            logits = k[b, g].double()[held] @ q[b, h, 0].double() * scale
            out.append((logits - soft_mask[b, held]).softmax(0) @ v[b, g].double()[held])
            if h == 0:
                votes = logits.relu()
                votes[(positions[b, held] == 0) | (held == newest[b])] = 0
                mask[b, held] += votes
        empty = (positions[b] < 0).nonzero()
        if len(empty):
            slots.append(int(empty[0]))
        else:
            slots.append(int(least_needed_slot(mask[b : b + 1], positions[b : b + 1])))
    return torch.stack(out).view(batch, heads, 1, -1), mask, slots


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("full", [True, False])
def test_a_step_over_slots(dtype: torch.dtype, full: bool, poisoned: None):
    torch.manual_seed(0)
    batch, heads, groups, n_slots = 3, 6, 2, 77
    size, v_size = (40, 24) if dtype == torch.float32 else (48, 32)
    q, k, v = (
        torch.randn(shape).to(DEVICE, dtype)
        for shape in (
            (batch, heads, 1, size),
            (batch, groups, n_slots, size),
            (batch, groups, n_slots, v_size),
        )
    )
    positions = torch.stack([torch.randperm(n_slots - 1) + 1 for _ in range(batch)])
    positions = torch.cat((torch.zeros(batch, 1, dtype=torch.long), positions[:, 1:] * 3), 1).to(DEVICE)
    soft_mask = torch.rand(batch, positions.shape[1], device=DEVICE)
    k, v = k[:, :, : positions.shape[1]], v[:, :, : positions.shape[1]]
    if not full:
        positions[:, [9, 40, 76 - 1]] = -1
        v = v.clone()
        v[:, :, 40] = torch.nan
    newest = positions.argmax(-1, keepdim=True)
    out, mask, slot = attend_slots_triton(q, k, v, soft_mask, positions, newest, 0.3)
    expected = decoded(q, k, v, soft_mask, positions, newest, 0.3)
    close({"out": out, "mask": mask}, {"out": expected[0], "mask": expected[1]}, TOLERANCE[dtype])
    assert out.dtype == dtype and mask.dtype == torch.float32
    assert slot[:, 0].tolist() == expected[2]


def test_a_step_in_half_precision_takes_multiples_of_16():
    q = torch.zeros(1, 1, 1, 40, dtype=torch.bfloat16, device=DEVICE)
    k = torch.zeros(1, 1, 4, 40, dtype=torch.bfloat16, device=DEVICE)
    held = torch.zeros(1, 4, device=DEVICE), torch.arange(4, device=DEVICE)[None]
    with pytest.raises(ValueError, match=r"multiples of 16, got \(40, 40\); use impl='products'"):
        attend_slots_triton(q, k, k, *held, torch.tensor([[3]], device=DEVICE), 1.0)


def test_next_slot():
    """Among equals the oldest; never the first token; nothing to take gives 0; an empty slot comes first."""
    q = torch.zeros(6, 1, 1, 16, device=DEVICE)  # no votes
    k = torch.zeros(6, 1, 4, 16, device=DEVICE)
    positions = torch.tensor(
        [[0, 7, 3, 9], [0, 7, 3, 9], [5, 0, 7, 9], [0, -1, 3, -1], [-1, -1, -1, -1], [0, 9, 4, 7]],
        device=DEVICE,
    )
    soft_mask = torch.tensor(
        [[9.0, 1, 1, 1], [9, 1, 1, 2], [1, 9, 1, 0], [9, 0, 8, 0], [0, 0, 0, 0], [0, 0, 0, 0]], device=DEVICE
    )
    newest = torch.tensor([[3], [3], [3], [2], [0], [1]], device=DEVICE)
    out, mask, slot = attend_slots_triton(q, k, k, soft_mask, positions, newest, 1.0)
    assert slot[:, 0].tolist() == [2, 3, 0, 1, 0, 2]
    assert torch.equal(mask, soft_mask)
    assert not out.any()
    alone = attend_slots_triton(
        q[:1], k[:1, :, :1], k[:1, :, :1], soft_mask[:1, :1], positions[:1, :1], newest[5:] * 0, 1.0
    )
    assert alone[2].tolist() == [[0]]


@pytest.mark.slow
def test_default_tilings_spill_in_one_kernel(tmp_path: Path):
    """Compiled for sm_90, which needs no GPU."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.exists():
        pytest.skip(f"triton came without {ptxas}")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "compile_triton.py", "--brief", "--out", tmp_path / "rows"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["kernel"] for row in rows} >= {
        "attend",
        "query_gradient",
        "key_gradient",
        "within_blocks",
        "attend_and_vote",
    }
    # That of the selection heads spills; it was faster on a GPU than tilings that do not (results/gpu).
    assert {row["kernel"] for row in rows if row["spill_bytes"]} == {"within_blocks"}
