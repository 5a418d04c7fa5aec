"""Registers, spills, shared memory and tensor core instructions of every Triton kernel, compiled for sm_90.

No GPU is needed: Triton compiles for a card that is not there, and its own ptxas says what the code takes. A
kernel that spills registers inside its loop is slow; `heedful.ops.selective.triton.tilings` says which do not.
The defaults take about a minute on one core, `--search` a quarter of an hour per head size.

    python benchmarks/compile_triton.py --out results/triton/sm90.jsonl
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from heedful.ops.selective.triton import op, slots, tilings
from heedful.ops.selective.triton.tilings import Launch

CAPABILITY = 90
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# The kernels that take the time, and the entry of a tiling that launches each.
SEARCHED = {
    "attend": "attend",
    "query_gradient": "query",
    "key_gradient": "key",
    "within_blocks": "selection",
}


class NoDevice:
    """Stands in for a GPU that code is compiled for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


@contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Kernels, with their arguments, that would have been launched."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: found.append((kernel, args, options))

    original = triton.JITFunction.__getitem__
    triton.JITFunction.__getitem__ = launcher
    try:
        yield found
    finally:
        triton.JITFunction.__getitem__ = original


def assembled(ptx: str) -> dict[str, int]:
    """What ptxas reports of a kernel."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        command = [ptxas, "-v", f"--gpu-name=sm_{CAPABILITY}a", source, "-o", source.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spilled and registers, report
    return {"registers": int(registers[1]), "spill_bytes": int(spilled[1]) + int(spilled[2])}


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The report on one kernel."""
    driver.set_active(NoDevice())
    code = kernel.warmup(*args, grid=(1,), **options)
    ptx = code.asm["ptx"]
    chosen = ("BLOCK", "KEYS", "ROWS", "HEADS", "SPAN", "num_warps", "num_stages")
    return {
        "kernel": kernel.__name__,
        **{name.removeprefix("num_").lower(): options[name] for name in chosen if name in options},
        **assembled(ptx),
        "shared": code.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
    }


def report(dtype: str, size: int, coded: bool = False, only: Any = None) -> Iterator[dict[str, Any]]:
    """One row for each kernel that a forward and a backward pass and a decoding step launch."""
    q, k, v = (torch.zeros(1, 16, 1088, size, dtype=DTYPES[dtype]) for _ in range(3))
    code = torch.zeros(1, 1088, dtype=torch.int32) if coded else None
    held = torch.zeros(1, 1088), torch.zeros(1, 1088, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    with recorded() as found:
        out, after, before, log_sum = op._forward(q, k, v, None, None, None, code, 0.125, 0.125)
        op._backward(q, k, v, None, None, code, out, before, log_sum, out, after, 0.125, 0.125)
        if not coded:
            slots._attend_slots(q[:, :, :1], k[:, :4], v[:, :4], *held, 0.125, 64, 4)
    seen = set()
    for kernel, args, options in found:
        if kernel.__name__ not in seen and (only is None or only(kernel.__name__, options)):
            seen.add(kernel.__name__)
            shape = {"dtype": dtype, "D": size, "E": size, "coded": coded}
            yield shape | compiled(kernel, args, options)


def searched(dtype: str, size: int) -> Iterator[dict[str, Any]]:
    """Rows for other tilings of the kernels that take the time."""
    table = tilings.SINGLE if dtype == "float32" else tilings.HALF
    default = table[size]
    choices = itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3), (1, 2), (16, 32, 64))
    for keys, warps, stages, heads, rows in choices:
        launch = Launch(keys, warps, stages, heads, rows=rows)
        table[size] = dataclasses.replace(default, **dict.fromkeys(SEARCHED.values(), launch))

        def new(kernel: str, options: dict[str, Any], heads: int = heads, rows: int = rows) -> bool:
            return (
                kernel in SEARCHED
                and (dtype == "float32" or kernel != "within_blocks")  # which is float32 for all
                and (heads == 1 or "HEADS" in options)
                and (rows == 32 or "ROWS" in options)
                and rows <= default.block
            )

        yield from report(dtype, size, only=new)
    table[size] = default


def show(row: dict[str, Any]) -> str:
    tiling = " ".join(
        f"{n} {row[n]:<3}" for n in ("block", "keys", "rows", "heads", "warps", "stages") if n in row
    )
    return (
        f"{row['kernel']:29}{row['dtype']:9} D {row['D']:<4}{'coded ' if row['coded'] else ''}{tiling}: "
        f"{row['registers']} registers, {row['spill_bytes']} bytes spilled, {row['shared']} shared, "
        f"{row['wgmma']} wgmma, {row['mma']} mma"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--search", type=int, metavar="SIZE", help="other tilings, for this head size")
    parser.add_argument(
        "--brief", action="store_true", help="the main kernels only, for bfloat16 and head size 64"
    )
    parser.add_argument("--out", type=Path, help="write JSON lines there as well")
    chosen = parser.parse_args()
    if chosen.search:
        rows = searched("bfloat16", chosen.search)
    elif chosen.brief:
        rows = report("bfloat16", 64, only=lambda kernel, _: kernel in (*SEARCHED, "attend_and_vote"))
    else:
        cases = itertools.product(("bfloat16", "float32"), (64, 128), (False, True))
        rows = itertools.chain.from_iterable(report(*case) for case in cases)
    lines = []
    for row in rows:
        print(show(row), flush=True)
        lines.append(json.dumps(row | {"triton": triton.__version__}))
    if chosen.out:
        chosen.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
