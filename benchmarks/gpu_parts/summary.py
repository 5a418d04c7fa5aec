"""One page from what the parts left."""

import json
from pathlib import Path
from typing import Any


def summary(out: Path) -> str:
    """summary.md, from the files that are there."""
    environment = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    names = ("device", "torch", "triton", "transformers", "python", "commit", "time")
    lines = [f"# {environment['device']}", ""]
    if environment["interpreted"]:
        lines += [
            "**Triton's interpreter on the CPU: a trial of the script; no time here means anything.**",
            "",
        ]
    lines += [", ".join(f"{name} {environment[name]}" for name in names[1:]), ""]
    parts = _rows(out / "parts.jsonl")
    ended = [(r["part"], "done" if r["ok"] else "FAILED", f"{r['seconds']:.0f}") for r in parts]
    lines += _table(("part", "", "seconds"), ended)
    for row in parts:
        if not row["ok"]:
            lines += ["", f"`{row['part']}` failed:", "", "```", row["error"].rstrip(), "```"]
    lines += [*_checks(out), *_timings(out), *_steps(out), *_training(out), *_adaptation(out), *_tilings(out)]
    return "\n".join(lines) + "\n"


def _checks(out: Path) -> list[str]:
    rows = _rows(out / "checks.jsonl")
    if not rows:
        return []
    bad = [row for row in rows if not row["ok"]]
    worst: dict[str, float] = {}
    for row in rows:
        worst[row["dtype"]] = max(worst.get(row["dtype"], 0.0), row.get("error", 0.0))
    said = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
    lines = [
        "",
        "## Against float64",
        "",
        f"{len(rows) - len(bad)} of {len(rows)} agree; largest errors: {said}",
    ]
    whys = [
        r["failure"].splitlines()[0] if "failure" in r else f"{r['tensor']}: {r['error']:.1e}" for r in bad
    ]
    return lines + [f"- {r['case']} {r['dtype']} D {r['D']} {why}" for r, why in zip(bad, whys, strict=True)]


def _timings(out: Path) -> list[str]:
    rows = _rows(out / "timings.jsonl")
    if not rows:
        return []
    cells = []
    for row in rows:
        shape = (row.get("workload", ""), row.get("T", ""), row.get("D", ""), row.get("case", ""))
        if "missing" in row:
            cells.append((*shape, row["missing"].splitlines()[0][:80], ""))
        else:
            ratio = "" if row["to_best_sdpa"] is None else f"{row['to_best_sdpa']:.2f}"
            cells.append((*shape, f"{row['ms']:.3f}", ratio))
    return ["", "## Times", "", *_table(("workload", "T", "D", "case", "ms", "to the best SDPA"), cells)]


def _steps(out: Path) -> list[str]:
    cells = [
        (
            row["form"],
            "compiled" if row["compiled"] else "",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['to_mha']:.2f}",
        )
        for row in _rows(out / "steps.jsonl")
    ]
    return ["", "## Training steps", "", *_table(("form", "", "ms", "of MHA"), cells)] if cells else []


def _training(out: Path) -> list[str]:
    ends = [row for row in _rows(out / "train.jsonl") if "validation_loss" in row]
    cells = [
        (
            row["form"],
            f"{row['parameters'] / 1e6:.1f}M",
            row["steps"],
            f"{row['seconds']:.0f}",
            "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
            f"{row['validation_loss']:.4f}",
        )
        for row in ends
    ]
    heads = ("form", "parameters", "steps", "seconds", "tokens per second", "validation loss, nats per byte")
    return ["", "## Training", "", *_table(heads, cells)] if ends else []


def _adaptation(out: Path) -> list[str]:
    rows = [row for row in _rows(out / "adapt.jsonl") if "kl" in row]
    cells = [
        (
            row["parameters"],
            row["context"],
            *(
                ""
                if row[f"{stage}_tokens_per_second"] is None
                else f"{row[f'{stage}_tokens_per_second']:,.0f}"
                for stage in ("local", "distill")
            ),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        )
        for row in rows
    ]
    heads = ("parameters", "context", "first stage, tokens per second", "second stage", "peak, GiB")
    return ["", "## Adapting a checkpoint", "", *_table(heads, cells)] if rows else []


def _tilings(out: Path) -> list[str]:
    file = out / "tilings.json"
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    better = [trial for trial in found["trials"] if trial["better"]]
    lines = ["", "## Tilings", "", f"{len(found['trials'])} tried, {len(better)} faster."]
    if not found["finished"]:
        lines[-1] += " Stopped by the time limit."
    if better:
        lines += ["To adopt them, replace these entries of src/heedful/ops/selective/triton/tilings.py:", ""]
        lines += ["```python"]
        changed = {f"{trial['table']}[{trial['D']}]" for trial in better}
        lines += [f"{name} = {found['tilings'][name]['python']}" for name in sorted(changed)]
        lines += ["```"]
    return lines


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return [f"| {' | '.join(str(x) for x in row)} |" for row in (heads, ("---",) * len(heads), *rows)]
