"""`heedful bench`."""

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, parse, positional, split

DESCRIPTION = """Measure speed: cases that take turns in one process, as ratios of their medians.

    heedful bench decode                                    # the attention part of a decoding step
    heedful bench decode --context 2048,8192,32768 --threads 2 --out results/decode

decode: plain SDPA over a full cache, selective attention over a full cache, and a cache of slots that holds a
part of the context (T/4, T/16, ...): the whole step, the choice of the slot to overwrite, and the compiled step."""


def run(arguments: Sequence[str]) -> int:
    """Run a benchmark."""
    values = parse(
        "bench",
        DESCRIPTION,
        [
            positional("what", Literal["decode"], "decode", "decode"),
            flag("context", str, "8192", "tokens read, separated by commas"),
            flag("budget_share", str, "4,16", "parts of the context that are kept: 4 keeps a quarter"),
            flag("heads", int, 8, "query heads"),
            flag("kv_heads", int | None, None, "key/value heads; as many as query heads if left out"),
            flag("head_dim", int, 64, "size of a head"),
            flag("dtype", Literal["fp32", "bf16"], "fp32", "precision of queries, keys and values"),
            flag("device", str, "cpu", "where to run: cpu, cuda, ..."),
            flag("threads", int, 1, "threads on the CPU"),
            flag("turns", int, 50, "times each case is measured"),
            flag("compiled", bool, True, "measure the compiled step too; needs a C++ compiler on the CPU"),
            flag("out", str | None, None, "folder for decode.jsonl; none is written if left out"),
        ],
        arguments,
    )
    contexts = split("--context", values["context"], int)
    shares = split("--budget-share", values["budget_share"], int)
    _check(values, contexts, shares)
    torch.set_num_threads(values["threads"])
    console, rows = Console(highlight=False), []
    for context in contexts:
        result = _decode(context, shares, values)
        console.print(_table(result, context, values))
        rows += [_row(case, timing, result, values) for case, timing in result]
    if values["out"] is not None:
        path = Path(values["out"]) / "decode.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        console.print(f"written: {path}")
    return 0


def _check(values: dict[str, Any], contexts: Sequence[int], shares: Sequence[int]) -> None:
    for name in ("heads", "head_dim", "threads"):
        if values[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {values[name]}")
    if values["turns"] < 2:
        raise UsageError(f"--turns must be 2 or more, got {values['turns']}")
    if values["kv_heads"] is not None and (values["kv_heads"] < 1 or values["heads"] % values["kv_heads"]):
        raise UsageError(f"--kv-heads must divide --heads {values['heads']}, got {values['kv_heads']}")
    if not contexts or not shares or min(shares) < 1:
        raise UsageError("--context and --budget-share need whole numbers from 1 on")
    if min(contexts) // max(shares) < 2:
        raise UsageError(f"a context of {min(contexts)} leaves fewer than 2 tokens at T/{max(shares)}")
    try:
        torch.zeros(1, device=values["device"])
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {values['device']}: {str(error).splitlines()[0]}") from None


def _decode(context: int, shares: Sequence[int], values: dict[str, Any]) -> list[tuple[Any, Any]]:
    from heedful.bench.decode import bench_decode, decode_cases

    cases = decode_cases(
        context,
        shares,
        n_heads=values["heads"],
        n_kv_heads=values["kv_heads"],
        head_dim=values["head_dim"],
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[values["dtype"]],
        device=values["device"],
        compiled=values["compiled"],
    )
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"context {context:,}", total=None)
        return bench_decode(
            cases,
            turns=values["turns"],
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _ratios(case: Any, timing: Any, result: list[tuple[Any, Any]]) -> tuple[float, float]:
    """Time over its baseline's, and over that of the first case."""
    seconds = {other.name: measured.seconds for other, measured in result}
    return timing.seconds / seconds[case.baseline], timing.seconds / result[0][1].seconds


def _table(result: list[tuple[Any, Any]], context: int, values: dict[str, Any]) -> Table:
    title = (
        f"one decoding step at {context:,} tokens: {values['heads']} heads of {values['head_dim']}, "
        f"{values['dtype']},\n{values['device']}, {values['threads']} thread(s), {values['turns']} turns; "
        f"vs plain: SDPA on as many keys"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, name in enumerate(("", "kept", "median", "vs full", "vs plain")):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for case, timing in result:
        plain, full = _ratios(case, timing, result)
        table.add_row(
            case.name,
            f"{case.kept:,}",
            f"{timing.seconds * 1e6:,.0f} us",
            f"{full:.3f}",
            f"{plain:.2f}" if case.baseline.startswith("plain SDPA, T/") else "",
        )
    return table


def _row(case: Any, timing: Any, result: list[tuple[Any, Any]], values: dict[str, Any]) -> dict[str, Any]:
    twin, full = _ratios(case, timing, result)
    return {
        **{"case": case.name.strip(), "context": case.context, "kept": case.kept, "baseline": case.baseline},
        **dataclasses.asdict(timing),
        **{"ratio_to_baseline": twin, "ratio_to_full": full},
        **{name: values[name] for name in ("heads", "kv_heads", "head_dim", "dtype", "device", "threads")},
        **{"torch": torch.__version__, "machine": platform.machine(), "day": time.strftime("%Y-%m-%d")},
    }
