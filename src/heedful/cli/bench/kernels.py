"""`heedful bench kernels`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from heedful.bench.kernels import Kernels, Sizes, Work
from heedful.bench.workload import Figures
from heedful.cli.bench.common import (
    DTYPES,
    Report,
    check_positive,
    check_run,
    dtype_flag,
    memory_flag,
    numbers,
    run_ceilings,
    run_flags,
    run_workload,
    seconds_flag,
    thread_counts,
    threads_flag,
)
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, parse
from heedful.screen import counted

DESCRIPTION = """Measure attention alone: forward ("prefill"), and forward and backward ("train").

    heedful bench kernels                                       # some minutes on one core
    heedful bench kernels --lengths 1024,2048,4096 --threads 1,all --out results/kernels
    heedful bench kernels --device cuda --dtype bf16 --heads 16 --lengths 2048,4096,8192,16384

Every implementation of selective attention that runs here, against plain SDPA (on CUDA its fastest backend), our
kernel with selection off (its twin), the naive form, torch.compile of it, x-transformers and
flash-linear-attention where installed. Each is first checked to compute what
it should. The star marks what impl="auto" picks. GFLOP/s count what causal attention needs; GEMM and copy are
shares of the fastest matrix product and copy that were measured; ± is half the distance between the quartiles.
With several --threads, of the forms that keep T*T values only x-transformers is measured with all numbers.
Writes kernels.jsonl, kernels.txt and kernels.png. Ctrl-C keeps the rows measured so far."""


def run(arguments: Sequence[str]) -> int:
    """Measure the kernels."""
    values = parse(
        "bench kernels",
        DESCRIPTION,
        [
            flag("lengths", str, "1024,2048,4096", "T, separated by commas"),
            flag("heads", int, 8, "query heads"),
            flag("kv_heads", int | None, None, "key/value heads; as many as query heads if left out"),
            flag("head_dim", int, 64, "size of queries and keys"),
            flag("value_dim", int | None, None, "size of values; that of the keys if left out"),
            flag("batch", int, 1, "sequences at once"),
            dtype_flag("precision of queries, keys and values"),
            threads_flag(),
            seconds_flag(10.0),
            flag(
                "dense_up_to",
                int,
                1024,
                "longest T for all forms that keep T*T values; beyond it x-transformers stands for them",
            ),
            flag(
                "compiled",
                bool,
                True,
                "measure torch.compile of the naive form; needs a C++ compiler on the CPU",
            ),
            memory_flag(),
            *run_flags("kernels"),
        ],
        arguments,
    )
    check_positive(values, "heads", "kv_heads", "head_dim", "value_dim", "batch", "seconds")
    if values["dense_up_to"] < 0:
        raise UsageError(f"--dense-up-to must be 0 or more, got {values['dense_up_to']}")
    groups = values["kv_heads"] or values["heads"]
    if values["heads"] % groups:
        raise UsageError(f"--kv-heads must divide --heads {values['heads']}, got {groups}")
    lengths = numbers("lengths", values["lengths"], least=2)
    device = check_run(values)
    threads = thread_counts(values["threads"], device)
    sizes = Sizes(
        values["heads"],
        groups,
        values["head_dim"],
        values["value_dim"] or values["head_dim"],
        values["batch"],
    )
    dtype = DTYPES[values["dtype"]]
    settings = {
        name: values[name]
        for name in ("heads", "kv_heads", "head_dim", "value_dim", "batch", "dtype", "device")
    }
    settings |= {"kv_heads": groups, "value_dim": sizes.value_dim}
    report = Report("kernels", values["out"], arguments, device, settings)
    with report.interruptible():
        report.start()
        torch.set_num_threads(threads[0])
        with report.watch("checking that the forms agree"):
            kernels = Kernels(sizes, device, dtype, compiled=values["compiled"])
        shown: list[Figures] = []
        for count in threads:
            torch.set_num_threads(count)
            rows = _measure(report, kernels, lengths, count, not shown, values)
            shown = shown or rows
        report.finish(lambda: _plot(report, shown, kernels, threads[0], values["dtype"]))
    return 0


def _measure(
    report: Report,
    kernels: Kernels,
    lengths: Sequence[int],
    threads: int,
    first: bool,
    values: dict[str, Any],
) -> list[Figures]:
    """All workloads with one number of threads; of the dense forms, later numbers see x-transformers only."""
    ceilings = run_ceilings(report, kernels.dtype, threads)
    works: tuple[Work, ...] = ("prefill", "train")
    rows: list[Figures] = []
    for length in lengths:
        for work in works:
            workload = kernels.workload(work, length, values["dense_up_to"] if first else 0)
            if not first:
                workload = dataclasses.replace(workload, left_out={})
            rows += run_workload(report, workload, ceilings, threads, values, kernels.picked(length))
    return rows


def _plot(report: Report, rows: Sequence[Figures], kernels: Kernels, threads: int, dtype: str) -> Path:
    from heedful.bench.plot import plot_ratios

    path = report.folder / "kernels.png"
    plot_ratios(
        rows,
        ("prefill", "train"),
        path,
        "Selective attention: time over plain attention",
        report.caption(
            counted(threads, "thread"),
            f"{dtype}, {counted(kernels.sizes.n_heads, 'head')} of {kernels.sizes.head_dim}",
        ),
        kernels.picked(max(row.length for row in rows)),
    )
    return path
