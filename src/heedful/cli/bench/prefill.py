"""`heedful bench prefill`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from heedful.bench.kernels import Sizes
from heedful.bench.prefill import BUDGET, prefill_workload, pruned_name
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

DESCRIPTION = """Measure the reading of a long prompt.

    heedful bench prefill
    heedful bench prefill --lengths 4096,8192,16384 --budget 512 --out results/prefill

Attention alone: plain causal SDPA, selective attention, and selective attention that holds a budget of tokens and
evicts as it reads, by the same rule as token by token. Then the whole model (6 layers, C = 512): MHA, selective,
and selective under the budget, each with the cache that decoding goes on from. Writes prefill.jsonl, prefill.txt
and prefill.png. Ctrl-C keeps the rows measured so far."""


def run(arguments: Sequence[str]) -> int:
    """Measure prefill."""
    values = parse(
        "bench prefill",
        DESCRIPTION,
        [
            flag("lengths", str, "8192,16384", "T, separated by commas"),
            flag("budget", int, BUDGET, "tokens that a layer holds"),
            flag("evict_every", int, 1, "evict only at positions divisible by it"),
            flag("heads", int, 8, "query heads"),
            flag("kv_heads", int | None, None, "key/value heads; as many as query heads if left out"),
            flag("head_dim", int, 64, "size of a head"),
            flag("batch", int, 1, "prompts at once"),
            flag("model_lengths", str, "4096", 'T for the whole model; "" for none'),
            dtype_flag("precision of queries, keys and values, and of the whole model"),
            threads_flag(),
            seconds_flag(20.0),
            memory_flag(),
            *run_flags("prefill"),
        ],
        arguments,
    )
    check_positive(values, "evict_every", "heads", "kv_heads", "head_dim", "batch", "seconds")
    if values["budget"] < 2:
        raise UsageError(f"--budget must be 2 or more, got {values['budget']}")
    groups = values["kv_heads"] or values["heads"]
    if values["heads"] % groups:
        raise UsageError(f"--kv-heads must divide --heads {values['heads']}, got {groups}")
    lengths = numbers("lengths", values["lengths"], least=2)
    model_lengths = (
        numbers("model-lengths", values["model_lengths"], least=2) if values["model_lengths"] else ()
    )
    device = check_run(values)
    threads = thread_counts(values["threads"], device)
    dtype, size = DTYPES[values["dtype"]], values["head_dim"]
    sizes = Sizes(values["heads"], groups, size, size, values["batch"])
    names = ("budget", "evict_every", "heads", "kv_heads", "head_dim", "batch", "dtype", "device")
    settings = {**{name: values[name] for name in names}, "kv_heads": groups}
    report = Report("prefill", values["out"], arguments, device, settings)
    budget = values["budget"]
    with report.interruptible():
        report.start()
        rows: list[Figures] = []
        for count in threads:
            torch.set_num_threads(count)
            ceilings = run_ceilings(report, dtype, count)
            own: list[Figures] = []
            for length in lengths:
                workload = prefill_workload(length, budget, values["evict_every"], sizes, device, dtype)
                own += run_workload(report, workload, ceilings, count, values)
            for length in model_lengths:
                from heedful.bench.models import ModelSizes, model_prefill_workload

                workload = model_prefill_workload(length, budget, ModelSizes(), device, dtype)
                own += run_workload(report, workload, ceilings, count, values)
            rows = rows or own
        report.finish(lambda: _plot(report, rows, counted(threads[0], "thread"), values))
    return 0


def _plot(report: Report, rows: Sequence[Figures], threads: str, values: dict[str, Any]) -> Path:
    from heedful.bench.plot import plot_ratios

    path = report.folder / "prefill.png"
    shape = f"{values['dtype']}, {counted(values['heads'], 'head')} of {values['head_dim']}"
    plot_ratios(
        rows,
        ("prefill",),
        path,
        "Reading a prompt: time over plain attention",
        report.caption(threads, shape),
        pruned_name(int(str(values["budget"]))),
    )
    return path
