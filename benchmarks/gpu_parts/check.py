"""Every kernel against the formula in float64: outputs, F, all gradients; prefixes, chunks, a decoding step.

Compiling takes most of the time, so the cases are spread over processes: one each, as an illegal memory access ends
all that a process could still do on the GPU.
"""

import itertools
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from gpu_parts.common import Run
from heedful.ops import selective_attention
from heedful.ops.selective.triton import attend_slots_triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # of the largest element
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"groups": 2},
    "after a prefix": {"earlier": 75},
    "padding": {"padding": True, "groups": 1},
    "segments": {"segments": True, "earlier": 20},
    "own selectors": {"selectors": 2, "padding": True, "segments": True},
}
# Values of SAS are narrower than its queries.
NARROW: dict[str, dict[str, Any]] = {
    "narrow values": {"v_size": 64},
    "narrow values, segments": {"v_size": 64, "segments": True, "padding": True},
}
Results = dict[str, Tensor]


def main(run: Run) -> None:
    add = run.rows("checks.jsonl")
    dtypes = (torch.float32, torch.bfloat16) if run.tiny else tuple(TOLERANCE)
    sizes = (16,) if run.tiny else (64, 128, 40, 96)
    names = ("grouped", "decode") if run.tiny else (*CASES, *NARROW, "chunks", "decode")
    cases = itertools.product(dtypes, sizes, names)
    # In 16 bits a step takes multiples of 16.
    work = [
        (run.device, run.tiny, *c)
        for c in cases
        if (c[0] == torch.float32 or c[1] % 16 == 0 or c[2] != "decode")
        and (c[1] == 96 or c[2] not in NARROW)
    ]
    wrong: list[str] = []

    def keep(found: Iterable[dict[str, Any]]) -> None:
        for row in found:
            add(row)
            if not row["ok"]:
                why = row.get("failure") or f"{row['tensor']}: {row['error']:.1e}"
                wrong.append(f"{row['case']}, {row['dtype']}, D {row['D']}, {why}")

    if run.tiny:
        for each in work:
            keep(compare(*each))
    else:
        processes = min(len(work), max(1, (os.cpu_count() or 1) - 1))
        with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
            futures = [pool.submit(compare, *each) for each in work]
            for (_, _, *named), future in zip(work, futures, strict=True):
                try:
                    keep(future.result())
                except Exception as failed:
                    keep([_case(*named) | {"ok": False, "failure": f"{type(failed).__name__}: {failed}"}])
    if wrong:
        raise SystemExit("not equal to the formula:\n" + "\n".join(wrong))


def compare(device: str, tiny: bool, dtype: torch.dtype, size: int, name: str) -> list[dict[str, Any]]:
    """One case: a row for each tensor."""
    length = 18 if tiny else 330
    if name == "decode":
        got, expected = decode(device, dtype, size, 33 if tiny else 1000)
    elif name == "chunks":
        got, expected = chunks(device, dtype, size, length)
    else:
        got, expected = both(device, dtype, size, length, **(CASES | NARROW)[name])
    rows = []
    for tensor, value in expected.items():
        largest = value.abs().max().item() or 1.0
        error = (got[tensor].double() - value).abs().max().item() / largest
        ok = error <= TOLERANCE[dtype]  # False for NaN
        told = {"tensor": tensor, "error": error, "tolerance": TOLERANCE[dtype], "ok": ok}
        rows.append(_case(dtype, size, name) | told)
    return rows


def _case(dtype: torch.dtype, size: int, name: str) -> dict[str, Any]:
    return {"case": name, "dtype": str(dtype).removeprefix("torch."), "D": size}


def both(
    device: str,
    dtype: torch.dtype,
    size: int,
    length: int,
    groups: int = 4,
    earlier: int = 0,
    selectors: int = 0,
    padding: bool = False,
    segments: bool = False,
    v_size: int | None = None,
) -> tuple[Results, Results]:
    """Outputs and gradients by the kernels, and by the formula in float64."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    keys = length + earlier
    inputs = {
        "q": 2 * normal(2, 4, length, size),
        "k": normal(2, groups, keys, size),
        "v": normal(2, groups, keys, v_size or size),
    }
    if selectors:
        inputs["select_q"] = 2 * normal(2, selectors, length, size)
        inputs["select_k"] = normal(2, selectors, keys, size)
    if earlier:
        inputs["soft_mask"] = normal(2, selectors or 1, earlier).abs().float()
    options: dict[str, Any] = {}
    if padding:
        options["key_mask"] = (torch.rand(2, keys, generator=draw) > 0.3).to(device)
    if segments:
        options["segment_ids"] = torch.randint(0, 2, (2, keys), generator=draw).to(device)
    gradients = [normal(2, 4, length, v_size or size), normal(2, selectors or 1, keys).float()]
    found = []
    for impl in ("triton", "reference"):
        leaves = {n: (x.double() if impl == "reference" else x.clone()) for n, x in inputs.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        outputs = selective_attention(**leaves, **options, impl=impl)
        given = [g.to(x.dtype) for g, x in zip(gradients, outputs, strict=True)]
        found_gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
        named = {f"d_{n}": g for n, g in zip(leaves, found_gradients, strict=True)}
        found.append({"out": outputs[0].detach(), "F": outputs[1].detach()} | named)
    return found[0], found[1]


def chunks(device: str, dtype: torch.dtype, size: int, length: int) -> tuple[Results, Results]:
    """A sequence in three pieces by the kernels, and in one by the formula."""
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, length, size, generator=draw).to(device, dtype) for h in (4, 2, 2))
    cuts = [0, length // 3, length // 2 + 1, length]
    soft_mask, pieces = None, []
    for start, end in itertools.pairwise(cuts):
        out, soft_mask = selective_attention(
            q[:, :, start:end], k[:, :, :end], v[:, :, :end], soft_mask=soft_mask, impl="triton"
        )
        pieces.append(out)
    assert soft_mask is not None
    out, after = selective_attention(q.double(), k.double(), v.double(), impl="reference")
    return {"out": torch.cat(pieces, 2), "F": soft_mask}, {"out": out, "F": after}


def decode(device: str, dtype: torch.dtype, size: int, n_slots: int) -> tuple[Results, Results]:
    """One step over slots that lie in any order, some of them empty."""
    draw = torch.Generator().manual_seed(2)
    batch, heads, groups = 3, 8, 2
    q = torch.randn(batch, heads, 1, size, generator=draw).to(device, dtype)
    k, v = (torch.randn(batch, groups, n_slots, size, generator=draw).to(device, dtype) for _ in range(2))
    order = torch.stack([torch.randperm(n_slots - 1, generator=draw) + 1 for _ in range(batch)])
    positions = torch.cat((torch.zeros(batch, 1, dtype=torch.long), order), 1)
    positions[1, 5] = positions[1, 9] = -1
    positions = positions.to(device)
    newest = positions.argmax(-1, keepdim=True)
    soft_mask = torch.rand(batch, n_slots, generator=draw).to(device)
    out, mask, slot = attend_slots_triton(q, k, v, soft_mask, positions, newest, size**-0.5)
    wide = k.double().repeat_interleave(heads // groups, 1), v.double().repeat_interleave(heads // groups, 1)
    logits = (q.double() @ wide[0].mT) * size**-0.5  # (B, H, 1, C)
    hidden = (positions < 0)[:, None, None]
    weights = (logits - soft_mask.double()[:, None, None]).masked_fill(hidden, -torch.inf).softmax(-1)
    votes = logits[:, 0, 0].relu().masked_fill(positions <= 0, 0.0).scatter(1, newest, 0.0)
    after = soft_mask.double() + votes
    rated = after.masked_fill(positions == 0, -1.0).masked_fill(positions < 0, torch.inf)
    got = {"out": out, "F": mask, "slot": slot}
    return got, {"out": weights @ wide[1], "F": after, "slot": rated.argmax(-1, keepdim=True).double()}
