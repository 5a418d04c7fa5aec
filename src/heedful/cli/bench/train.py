"""`heedful bench train`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from heedful.bench.workload import Figures, Workload
from heedful.cli.bench.common import (
    DTYPES,
    Report,
    check_positive,
    check_run,
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
from heedful.screen import counted, spinner

if TYPE_CHECKING:
    from heedful.bench.models import ModelSizes

DESCRIPTION = """Measure training steps of whole models: forward, backward and AdamW.

    heedful bench train
    heedful bench train --lengths 512,1024,2048 --threads 1,all --out results/train

The same model with MHA and softmax (the baseline), selective attention, selective attention with its memory loss,
SAS (3x heads, 1.5x features), and SAS with selective attention. Writes train.jsonl, train.txt and train.png.
Ctrl-C keeps the rows measured so far."""


def run(arguments: Sequence[str]) -> int:
    """Measure training steps."""
    values = parse(
        "bench train",
        DESCRIPTION,
        [
            flag("lengths", str, "1024", "T, separated by commas"),
            flag("n_layers", int, 6, "blocks"),
            flag("d_model", int, 512, "width, C"),
            flag("n_heads", int, 8, "heads"),
            flag("vocab_size", int, 8192, "tokens"),
            flag("batch", int, 1, "texts in a step"),
            flag("dtype", Literal["fp32", "bf16"], "fp32", "bf16: autocast; the weights stay fp32"),
            flag(
                "compiled",
                bool,
                False,
                "the same models under torch.compile as well, and how long that takes",
            ),
            threads_flag(),
            seconds_flag(60.0),
            memory_flag(),
            *run_flags("train"),
        ],
        arguments,
    )
    shape = ("n_layers", "d_model", "n_heads", "vocab_size", "batch")
    check_positive(values, *shape, "seconds")
    lengths = numbers("lengths", values["lengths"], least=2)
    device = check_run(values)
    threads = thread_counts(values["threads"], device)
    from heedful.bench.models import (
        FORMS,
        ModelSizes,
        train_workload,
    )  # brings transformers, which takes seconds

    sizes, dtype = ModelSizes(**{name: values[name] for name in shape}), DTYPES[values["dtype"]]
    try:
        for form in FORMS.values():
            sizes.config(max(lengths), **form)
    except ValueError as error:
        raise UsageError(str(error)) from None
    settings = {name: values[name] for name in (*shape, "dtype", "device")}
    report = Report("train", values["out"], arguments, device, settings)
    with report.interruptible():
        report.start()
        rows: list[Figures] = []
        for count in threads:
            torch.set_num_threads(count)
            ceilings = run_ceilings(report, dtype, count)
            own: list[Figures] = []
            for length in lengths:
                workload = train_workload(length, sizes, device, dtype, compiled=values["compiled"])
                _compile(report, workload)
                own += run_workload(report, workload, ceilings, count, values)
            rows = rows or own
        report.finish(lambda: _plot(report, rows, sizes, counted(threads[0], "thread"), values["dtype"]))
    return 0


def _compile(report: Report, workload: Workload) -> None:
    """Run once what compiles at its first run, and say how long each took."""
    from heedful.bench.models import COMPILED

    for case in workload.cases:
        if case.name.endswith(COMPILED):
            started = time.perf_counter()
            with spinner(report.stderr, f"compiling {case.name.removesuffix(COMPILED)}"):
                case.run()
            report.print(f"{case.name}: the first step took {time.perf_counter() - started:.0f} s")


def _plot(report: Report, rows: Sequence[Figures], sizes: "ModelSizes", threads: str, dtype: str) -> Path:
    from heedful.bench.plot import plot_bars

    path = report.folder / "train.png"
    shape = f"{counted(sizes.n_layers, 'layer')}, C = {sizes.d_model}, {counted(sizes.n_heads, 'head')}"
    plot_bars(
        rows,
        path,
        "Training steps: time over the same model with MHA",
        report.caption(threads, f"{dtype}, {shape}"),
    )
    return path
