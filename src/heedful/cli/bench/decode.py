"""`heedful bench decode`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from heedful.cli.bench.common import (
    DTYPES,
    Report,
    check_positive,
    check_run,
    disturbance,
    dtype_flag,
    numbers,
    run_flags,
    thread_counts,
    threads_flag,
)
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, parse
from heedful.screen import Column, counted, table, text

DESCRIPTION = """Measure the attention part of a decoding step.

    heedful bench decode
    heedful bench decode --context 2048,8192,32768 --out results/decode

Plain SDPA over a full cache, selective attention over a full cache, and a cache of slots that holds a part of the
context (T/4, T/16, ...): the whole step, the choice of the slot to overwrite, and the compiled step. The time is
that of one layer of several, each with a cache of its own. Writes
decode.jsonl and decode.txt. Ctrl-C keeps the rows measured so far."""

TURNS = 50


def run(arguments: Sequence[str]) -> int:
    """Measure decoding."""
    values = parse(
        "bench decode",
        DESCRIPTION,
        [
            flag("context", str, "8192", "tokens read, separated by commas"),
            flag("budget_share", str, "4,16", "parts of the context that are kept: 4 keeps a quarter"),
            flag("heads", int, 8, "query heads"),
            flag("kv_heads", int | None, None, "key/value heads; as many as query heads if left out"),
            flag("head_dim", int, 64, "size of a head"),
            dtype_flag("precision of queries, keys and values"),
            threads_flag(),
            flag("compiled", bool, True, "measure the compiled step too; needs a C++ compiler on the CPU"),
            *run_flags("decode", str(TURNS), "the raw figures and the tables"),
        ],
        arguments,
    )
    contexts = numbers("context", values["context"])
    shares = numbers("budget-share", values["budget_share"])
    _check(values, contexts, shares)
    device = check_run(values)
    threads = thread_counts(values["threads"], device)
    settings = {name: values[name] for name in ("heads", "kv_heads", "head_dim", "dtype", "device")}
    report = Report("decode", values["out"], arguments, device, settings)
    with report.interruptible():
        report.start()
        for count in threads:
            torch.set_num_threads(count)
            for context in contexts:
                result = _decode(report, context, shares, values)
                _show(report, result, context, count, values)
                report.write([_row(case, timing, result, count) for case, timing in result])
        report.finish()
    return 0


def _check(values: dict[str, Any], contexts: Sequence[int], shares: Sequence[int]) -> None:
    check_positive(values, "heads", "kv_heads", "head_dim")
    if values["kv_heads"] is not None and values["heads"] % values["kv_heads"]:
        raise UsageError(f"--kv-heads must divide --heads {values['heads']}, got {values['kv_heads']}")
    if min(contexts) // max(shares) < 2:
        raise UsageError(f"a context of {min(contexts)} leaves fewer than 2 tokens at T/{max(shares)}")


def _decode(
    report: Report, context: int, shares: Sequence[int], values: dict[str, Any]
) -> list[tuple[Any, Any]]:
    from heedful.bench.decode import bench_decode, decode_cases

    cases = decode_cases(
        context,
        shares,
        n_heads=values["heads"],
        n_kv_heads=values["kv_heads"],
        head_dim=values["head_dim"],
        dtype=DTYPES[values["dtype"]],
        device=values["device"],
        compiled=values["compiled"],
    )
    with report.watch(f"decode, {context:,} tokens") as progress:
        return bench_decode(cases, turns=values["turns"] or TURNS, progress=progress)


def _ratios(case: Any, timing: Any, result: list[tuple[Any, Any]]) -> tuple[float, float]:
    """Time over its baseline's, and over that of the first case."""
    seconds = {other.name: measured.seconds for other, measured in result}
    return timing.seconds / seconds[case.baseline], timing.seconds / result[0][1].seconds


def _show(
    report: Report, result: list[tuple[Any, Any]], context: int, threads: int, values: dict[str, Any]
) -> None:
    title = (
        f"one decoding step at {context:,} tokens: {counted(values['heads'], 'head')} of {values['head_dim']}, "
        f"{values['dtype']}, {values['device']}, {counted(threads, 'thread')}, {result[0][1].turns} turns of "
        f"{counted(len(result[0][0].layers), 'layer')}; the time is that of one; "
        "vs plain: SDPA on as many keys"
    )
    rows = []
    for case, timing in result:
        plain, full = _ratios(case, timing, result)
        cells = (
            case.name,
            f"{case.kept:,}",
            f"{timing.seconds * 1e6:,.0f} us",
            "-" if timing.disturbed else f"{full:.3f}",
            ("-" if timing.disturbed else f"{plain:.2f}")
            if case.baseline.startswith("plain SDPA, T/")
            else "",
        )
        rows.append(cells)
    columns = [text(""), *map(Column, ("kept", "median", "vs full", "vs plain"))]
    report.table(lambda width: table(columns, rows, title=title, width=width))
    report.warn(disturbance(timing for _, timing in result))


def _row(case: Any, timing: Any, result: list[tuple[Any, Any]], threads: int) -> dict[str, Any]:
    twin, full = _ratios(case, timing, result)
    return {
        **{"case": case.name.strip(), "context": case.context, "kept": case.kept, "baseline": case.baseline},
        **dataclasses.asdict(timing),
        **({} if timing.disturbed else {"ratio_to_baseline": twin, "ratio_to_full": full}),
        "threads": threads,
    }
