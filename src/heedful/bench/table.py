"""The measurements behind `impl="auto"`: every implementation at every length, forward and backward."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from heedful.bench.forms import available, ours
from heedful.bench.kernels import Sizes, read, trained
from heedful.bench.timing import interleaved
from heedful.files import write_text

LENGTHS = tuple(2**i for i in range(4, 14))  # 16 to 8,192
HOPELESS = 3.0


def measure_implementations(
    device: torch.device,
    dtype: torch.dtype,
    *,
    sizes: Sizes | None = None,
    lengths: Sequence[int] | None = None,
    seconds: float = 4.0,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Time the implementations of `selective_attention`, forward alone plus forward and backward.

    One that took more than three times as long as the fastest is not measured at longer lengths.

    Args:
        device: where to run.
        dtype: of q, k and v.
        sizes: of the attention; 8 heads of 64 by default.
        lengths: T to measure, ascending; 16 to 8,192 by default.
        seconds: for each length.
        progress: called with each length and its result.

    Returns:
        T -> implementation -> seconds, the sum of both medians.
    """
    sizes = sizes or Sizes()
    left, _ = available(device, dtype)
    result: dict[str, dict[str, float]] = {}
    for length in lengths or LENGTHS:
        q, k, v = sizes.draw(length, device, dtype)
        leaf_q, leaf_k, leaf_v = (x.clone().requires_grad_() for x in (q, k, v))
        both = {
            **{f"{impl} read": read(ours(impl), q, k, v) for impl in left},
            **{f"{impl} trained": trained(ours(impl), leaf_q, leaf_k, leaf_v) for impl in left},
        }
        timings = interleaved(both, seconds=seconds, device=device)
        took = {impl: timings[f"{impl} read"].seconds + timings[f"{impl} trained"].seconds for impl in left}
        result[str(length)] = took
        left = [impl for impl in left if took[impl] <= HOPELESS * min(took.values())]
        if progress is not None:
            progress(length, took)
    return result


def write_entry(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    seconds: Mapping[str, Mapping[str, float]],
    about: Mapping[str, Any],
) -> None:
    """Replace the entry of one device type and precision in the table at `path`."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rounded = {
        length: {impl: float(f"{took:.4g}") for impl, took in entry.items()}
        for length, entry in seconds.items()
    }
    table.setdefault(device.type, {})[str(dtype).removeprefix("torch.")] = {**about, "seconds": rounded}
    write_text(path, json.dumps(table, indent=1) + "\n")
