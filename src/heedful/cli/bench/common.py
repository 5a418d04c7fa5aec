"""What the benchmarks share: flags, checks, progress, tables, the files that are written."""

import dataclasses
import io
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

import heedful
from heedful.bench.ceilings import Ceilings, measure_ceilings
from heedful.bench.timing import Timing
from heedful.bench.workload import Figures, Workload, measure
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, split
from heedful.errors import Interrupted
from heedful.files import write_text
from heedful.machine import cpu_name
from heedful.screen import FILE_WIDTH, Column, counted, progress_bar, screen_width, table, text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_flags(
    name: str,
    turns: str = "as many as --seconds allow",
    files: str = "the raw figures, the tables and the plot",
) -> list[Any]:
    """Flags about the run; `turns` says how many there are by default, `files` what is written."""
    return [
        flag("device", str, "cpu", "where to run: cpu, cuda, ..."),
        flag("turns", int | None, None, f"times each case is measured; {turns} if left out"),
        flag("out", str, f"runs/bench/{name}", f"folder for {files}"),
    ]


def threads_flag(default: str = "1") -> Any:
    """`--threads`, for benchmarks that compare thread counts."""
    return flag("threads", str, default, 'threads on the CPU, separated by commas; "all": every core')


def seconds_flag(default: float) -> Any:
    """`--seconds`."""
    return flag("seconds", float, default, "for the cases of a table together; each runs 3 times at least")


def memory_flag() -> Any:
    """`--memory`."""
    return flag("memory", bool, True, "measure the peak of extra memory: one more run of each case")


def dtype_flag(help: str) -> Any:
    """`--dtype`."""
    return flag("dtype", Literal["fp32", "bf16", "fp16"], "fp32", help)


def check_positive(values: Mapping[str, Any], *names: str) -> None:
    """Raise UsageError unless these are None or above 0."""
    for name in names:
        if values[name] is not None and not values[name] > 0:
            least = "1 or more" if isinstance(values[name], int) else "more than 0"
            raise UsageError(f"--{name.replace('_', '-')} must be {least}, got {values[name]}")


def check_run(values: Mapping[str, Any]) -> torch.device:
    """The device, after checking what every benchmark has."""
    if values["turns"] is not None and values["turns"] < 2:
        raise UsageError(f"--turns must be 2 or more, got {values['turns']}")
    try:
        torch.zeros(1, device=values["device"])
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {values['device']}: {str(error).splitlines()[0]}") from None
    return torch.device(values["device"])


def numbers(name: str, text: str, least: int = 1) -> tuple[int, ...]:
    """Whole numbers separated by commas, ascending, without repetition."""
    values = split(f"--{name}", text, int)
    if not values or min(values) < least:
        raise UsageError(f"--{name} needs whole numbers from {least} on, separated by commas, got {text!r}")
    return tuple(sorted(set(values)))


def thread_counts(text: str, device: torch.device) -> list[int]:
    """`--threads` as numbers; on an accelerator one entry, what PyTorch has."""
    if device.type != "cpu":
        return [torch.get_num_threads()]
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = split("--threads", text.replace("all", str(every)), int)
    if not counts or min(counts) < 1:
        raise UsageError(f'--threads needs whole numbers from 1 on, or "all", got {text!r}')
    return list(dict.fromkeys(counts))


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "heedful": heedful.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "day": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str | None:
    """The commit of the checkout that runs, "+" where it has changes; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno", ".") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


class Report:
    """The screen and the folder of one benchmark.

    Args:
        name: of the benchmark: NAME.jsonl, NAME.txt and NAME.png are written.
        out: the folder.
        arguments: of the command, to be written beside every figure.
        device: where it runs.
        settings: written beside every figure.
        program: what the arguments were given to, if not `heedful bench NAME`.
    """

    def __init__(
        self,
        name: str,
        out: str,
        arguments: Sequence[str],
        device: torch.device,
        settings: Mapping[str, Any],
        program: Sequence[str] = (),
    ) -> None:
        self.name, self.folder, self.device = name, Path(out), device
        self.console = Console(highlight=False, width=screen_width())
        self.record = Console(highlight=False, file=io.StringIO(), width=FILE_WIDTH)
        self.stderr = Console(stderr=True)
        self.command = shlex.join([*(program or ("heedful", "bench", name)), *arguments])
        self.about = {**settings, "command": self.command, **machine(device)}
        self.n_rows = 0
        self.disturbed = False
        self.folder.mkdir(parents=True, exist_ok=True)

    def print(self, line: str) -> None:
        """Show a line, and keep it for the file."""
        for console in (self.console, self.record):
            console.print(line)

    def table(self, make: Callable[[int], Table]) -> None:
        """Show what `make` lays out for a number of columns: for the screen, and for the file."""
        for console in (self.console, self.record):
            console.print(make(console.width))

    @property
    def path(self) -> Path:
        """The raw figures."""
        return self.folder / f"{self.name}.jsonl"

    def start(self) -> None:
        """Say where this runs."""
        where = self.about["gpu"] or self.about["cpu"]
        self.print(f"{where}, torch {self.about['torch']}, commit {self.about['commit'] or 'unknown'}")

    def caption(self, threads: str, what: str) -> str:
        """What a plot says below it."""
        where = self.about["gpu"] or f"{self.about['cpu']}, {threads}"
        about = f"torch {self.about['torch']}, commit {self.about['commit'] or 'unknown'}"
        return f"{where}; {what}\nmedians of interleaved runs; {about}"

    def warn(self, why: str | None) -> None:
        """Say that the last figures were disturbed; then there is no plot, which would rank them."""
        if why is not None:
            self.disturbed = True
            self.print(f"[bold]{why}[/]")

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append figures; the first ones replace the file of an earlier run."""
        with self.path.open("a" if self.n_rows else "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({**row, **self.about}) + "\n")
        self.n_rows += len(rows)

    def finish(self, plot: Callable[[], Path] | None = None) -> None:
        """Draw the plot, write what was on the screen and name the files."""
        if self.disturbed:
            (self.folder / f"{self.name}.png").unlink(
                missing_ok=True
            )  # of an earlier run, not of these figures
        plots = [plot()] if plot is not None and not self.disturbed else []
        path = self.folder / f"{self.name}.txt"
        assert isinstance(self.record.file, io.StringIO)
        write_text(path, f"$ {self.command}\n\n" + _stripped(self.record.file.getvalue()))
        self.console.print(f"\nwritten: {', '.join(map(str, (self.path, path, *plots)))}", soft_wrap=True)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C says what is there."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.n_rows:
                raise Interrupted("interrupted before anything was measured; nothing is written") from None
            raise Interrupted(
                f"interrupted; the {self.n_rows} rows measured so far are in {self.path}"
            ) from None

    @contextmanager
    def watch(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar on a terminal; a line elsewhere."""
        if not self.stderr.is_terminal:
            self.stderr.print(f"measuring {what}", soft_wrap=True)
            yield lambda done, total: None
            return
        with progress_bar(self.stderr, remaining=False) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n"


def as_row(figures: Figures, ceilings: Ceilings, **more: Any) -> dict[str, Any]:
    """One line of raw figures."""
    row = dataclasses.asdict(figures)
    timing = row.pop("timing")
    timing.pop("name")
    timing["samples"] = [float(f"{seconds:.5g}") for seconds in timing["samples"]]
    if timing["disturbed"]:
        row["ratios"] = {}
    return {
        **row,
        **timing,
        "gemm_flops_per_second": ceilings.gemm,
        "copy_bytes_per_second": ceilings.copy,
        **more,
    }


def figures_table(
    title: str, workload: Workload, rows: Sequence[Figures], mark: str = "", width: int = FILE_WIDTH
) -> Table:
    """A line per case, laid out for `width` columns; the case named `mark` gets a star."""
    columns = [
        text(""),
        Column("median"),
        *map(Column, workload.baselines),
        Column("±", optional=True),
        Column("extra MB", optional=True),
        Column("tokens/s", optional=True),
        Column("GFLOP/s", optional=True),
        Column("GEMM", optional=True),
        Column("copy", optional=True),
    ]
    cells = [
        (
            row.case + (" *" if row.case == mark else ""),
            shown_time(row.timing.seconds),
            *(
                "-" if row.timing.disturbed else f"{row.ratios[name]:.2f}"
                for name in workload.baselines.values()
            ),
            f"{(row.timing.high - row.timing.low) / 2 / row.timing.seconds:.0%}",
            "" if row.extra_bytes is None else _three_digits(row.extra_bytes / 1e6),
            f"{row.tokens_per_second:,.0f}",
            _three_digits(row.flops_per_second / 1e9),
            f"{row.of_gemm:.0%}",
            f"{row.of_copy:.0%}",
        )
        for row in rows
    ]
    return table(columns, cells, title=title, width=width)


def disturbance(timings: Iterable[Timing]) -> str | None:
    """Why these times are not compared, in a sentence; None if they may be."""
    why = next((timing.disturbed for timing in timings if timing.disturbed), None)
    return why and f"foreign load: {why}; no ratios, no ranking: repeat it on a quiet machine"


def _three_digits(number: float) -> str:
    return f"{number:,.{0 if number >= 100 else 1}f}"


def shown_time(seconds: float) -> str:
    """With three digits, about."""
    if seconds >= 10:
        return f"{seconds:,.1f} s"
    return (
        f"{seconds * 1e3:,.{0 if seconds >= 0.1 else 1}f} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:,.0f} us"
    )


def run_ceilings(report: Report, dtype: torch.dtype, threads: int) -> Ceilings:
    """Measure what the shares in the tables are shares of, and say it."""
    with report.watch("the ceilings of the machine"):
        ceilings = measure_ceilings(report.device, dtype)
    report.print("\n" + ceilings_line(ceilings, threads, report.device))
    return ceilings


def run_workload(
    report: Report,
    workload: Workload,
    ceilings: Ceilings,
    threads: int,
    values: Mapping[str, Any],
    mark: str = "",
) -> list[Figures]:
    """Measure, write the rows, show the table; the case named `mark` is what `impl="auto"` picks."""
    with report.watch(f"{workload.name}, T = {workload.length:,}") as progress:
        rows = measure(
            workload,
            ceilings,
            report.device,
            turns=values["turns"],
            seconds=values["seconds"],
            memory=values["memory"],
            progress=progress,
        )
    report.write([as_row(row, ceilings, threads=threads, picked=row.case == mark) for row in rows])
    title = f"{workload.name}, T = {workload.length:,}, {counted(threads, 'thread')}, {values['dtype']}"
    report.table(lambda width: figures_table(title, workload, rows, mark, width))
    report.warn(disturbance(row.timing for row in rows))
    for name, why in workload.left_out.items():
        report.print(f"left out: {name}: {why}")
    return rows


def ceilings_line(ceilings: Ceilings, threads: int, device: torch.device) -> str:
    """What the shares in the tables are shares of."""
    rows, inner, columns = ceilings.gemm_shape
    where = counted(threads, "thread") if device.type == "cpu" else device.type
    return (
        f"{where}: GEMM {ceilings.gemm / 1e9:,.0f} GFLOP/s at {rows} x {inner} x {columns}, "
        f"copy {ceilings.copy / 1e9:,.1f} GB/s"
    )
