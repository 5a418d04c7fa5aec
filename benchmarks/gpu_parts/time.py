"""Forward, training, prefill and decode against every SDPA backend, and FoX where it is installed.

Selection keeps every key here, except in `decode`, where T / 16 slots stand against SDPA over all T keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.common import Run, interleaved
from heedful.ops import selective_attention
from heedful.ops.selective.triton import attend_slots_triton

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


def main(run: Run) -> None:
    add = run.rows("timings.jsonl")
    fox = forgetting()
    if fox is None:
        add({"case": "fox", "missing": "flash-linear-attention is not installed"})
    sizes = (16,) if run.tiny else (64, 128)
    turns = 2 if run.tiny else 20
    for size in sizes:
        for workload, batch, length in work(run.tiny):
            if run.left() <= 0:
                add({"workload": workload, "T": length, "D": size, "missing": "out of time"})
                continue
            heads = 2 if run.tiny else 2048 // size
            cases = (decoding if workload == "decode" else attending)(
                run, workload, batch, heads, length, size, fox
            )
            timings, reasons = interleaved(run, cases, turns, inner=10 if workload == "decode" else 1)
            best = min((ms[1] for name, ms in timings.items() if name.startswith("sdpa")), default=None)
            shape = {
                "workload": workload,
                "B": batch,
                "H": heads,
                "T": length,
                "D": size,
                "dtype": "bfloat16",
            }
            for name, (low, median, high) in timings.items():
                ratio = None if best is None else median / best
                add(shape | {"case": name, "ms": median, "low": low, "high": high, "to_best_sdpa": ratio})
            for name, reason in reasons.items():
                add(shape | {"case": name, "missing": reason})
            if "heedful triton" in reasons:
                raise SystemExit(f"{workload}, T {length}, D {size}: {reasons['heedful triton']}")


def work(tiny: bool) -> list[tuple[str, int, int]]:
    """Workload, batch, T."""
    if tiny:
        return [("training", 1, 17), ("decode", 1, 32)]
    short = [(name, 16384 // n, n) for n in (1024, 4096) for name in ("forward", "training")]
    return [*short, ("prefill", 1, 16384), ("decode", 8, 8192), ("decode", 8, 32768)]


def forgetting() -> Callable[..., Any] | None:
    try:
        from fla.ops.forgetting_attn import parallel_forgetting_attn
    except ImportError:
        return None
    return parallel_forgetting_attn


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def backends(run: Run) -> dict[str, SDPBackend]:
    return BACKENDS if run.device == "cuda" else {"sdpa math": SDPBackend.MATH}


def attending(
    run: Run, workload: str, batch: int, heads: int, length: int, size: int, fox: Callable[..., Any] | None
) -> dict[str, Callable[[], Any]]:
    """Causal attention over T tokens."""
    train = workload == "training"
    shape = (batch, heads, length, size)
    q, k, v = (
        torch.randn(shape, device=run.device, dtype=torch.bfloat16, requires_grad=train) for _ in range(3)
    )
    given = torch.randn(shape, device=run.device, dtype=torch.bfloat16)

    def case(attend: Callable[[], Tensor], leaves: tuple[Tensor, ...] = (q, k, v)) -> Callable[[], Any]:
        def once() -> None:
            out = attend()
            if train:
                torch.autograd.grad(out, leaves, given.view_as(out))

        return once

    cases = {"heedful triton": case(lambda: selective_attention(q, k, v, impl="triton")[0])}
    if length <= 2048:
        cases["heedful sdpa"] = case(lambda: selective_attention(q, k, v, impl="sdpa")[0])
    for name, backend in backends(run).items():
        cases[name] = case(lambda b=backend: sdpa(b, q, k, v, True))
    if fox is not None:
        rows = [x.detach().transpose(1, 2).contiguous().requires_grad_(train) for x in (q, k, v)]
        gate = F.logsigmoid(torch.randn(batch, length, heads, device=run.device) + 4).requires_grad_(train)
        cases["fox"] = case(
            lambda: _first(fox(*rows, gate)),
            (*rows, gate),
        )
    return cases


def _first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def decoding(
    run: Run, workload: str, batch: int, heads: int, length: int, size: int, fox: Any
) -> dict[str, Callable[[], Any]]:
    """One token: T / 16 slots, against T keys."""
    q = torch.randn(batch, heads, 1, size, device=run.device, dtype=torch.bfloat16)
    k, v = (
        torch.randn(batch, heads, length, size, device=run.device, dtype=torch.bfloat16) for _ in range(2)
    )
    n_slots = max(length // 16, 2)
    kept = k[:, :, :n_slots].contiguous(), v[:, :, :n_slots].contiguous()
    positions = torch.arange(n_slots, device=run.device).expand(batch, -1).contiguous()
    newest = torch.full((batch, 1), n_slots - 1, device=run.device)
    soft_mask = torch.rand(batch, n_slots, device=run.device)
    cases: dict[str, Callable[[], Any]] = {
        "heedful triton": lambda: attend_slots_triton(q, *kept, soft_mask, positions, newest, size**-0.5),
    }
    for name, backend in backends(run).items():
        cases[name] = lambda b=backend: sdpa(b, q, k, v, False)
        cases[f"T / 16 keys, {name}"] = lambda b=backend: sdpa(b, q, *kept, False)
    return cases
