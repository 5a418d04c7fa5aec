"""Other tilings against those in `tilings.py`, one kernel at a time; the faster one stays for the next kernel.

To adopt what was found: the last block of summary.md holds the lines that replace entries of
`src/heedful/ops/selective/triton/tilings.py`; run the part `check` again with them.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from gpu_parts.common import Run, interleaved
from heedful.ops import selective_attention
from heedful.ops.selective.triton import tilings
from heedful.ops.selective.triton.tilings import Launch

GAIN = 0.97  # of the time, at most, or the tiling in the table stays
CANDIDATES = {
    "attend": [Launch(64), Launch(64, stages=3), Launch(32, stages=2, heads=2), Launch(64, warps=8)],
    "key": [Launch(64, rows=64), Launch(32, rows=32), Launch(64, rows=32, stages=3), Launch(64, warps=8)],
    "query": [Launch(32, stages=2), Launch(64, stages=2), Launch(64, stages=2, warps=8)],
    "votes": [Launch(128), Launch(64, stages=3)],
}


def main(run: Run) -> None:
    tables = [("HALF", tilings.HALF, torch.bfloat16, size) for size in ((16,) if run.tiny else (64, 128))]
    length, turns = (17, 2) if run.tiny else (4096, 15)
    found: dict[str, Any] = {"tilings": {}, "trials": [], "finished": False}

    def save() -> None:
        (run.out / "tilings.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for entry, launches in list(CANDIDATES.items())[: 1 if run.tiny else None]:
        for name, table, dtype, size in tables:
            work = _work(run, dtype, size, length, backward=entry not in ("votes", "attend"))
            for launch in launches[:1] if run.tiny else launches:
                if run.left() <= 0:
                    save()
                    print("out of time; the trials so far are kept")
                    return
                old = table[size]
                new = replace(old, **{entry: launch})

                def use(tiling: Any, table: Any = table, size: int = size, work: Any = work) -> None:
                    table[size] = tiling
                    work()

                timed, reasons = interleaved(
                    run, {"old": lambda u=use, t=old: u(t), "new": lambda u=use, t=new: u(t)}, turns
                )
                better = "new" in timed and timed["new"][1] < GAIN * timed["old"][1]
                table[size] = new if better else old
                trial = {"table": name, "D": size, "kernel": entry, "launch": asdict(launch)}
                trial |= {"ms": {case: ms[1] for case, ms in timed.items()}, "better": better}
                found["trials"].append(trial | {"failed": reasons.get("new")})
                found["tilings"][f"{name}[{size}]"] = {"python": repr(table[size]), **asdict(table[size])}
                print(found["trials"][-1], flush=True)
                save()
    found["finished"] = True
    save()


def _work(run: Run, dtype: torch.dtype, size: int, length: int, backward: bool) -> Callable[[], None]:
    heads, batch = (2, 1) if run.tiny else (16, 2)
    q, k, v = (
        torch.randn(batch, heads, length, size, device=run.device, dtype=dtype, requires_grad=backward)
        for _ in range(3)
    )

    def work() -> None:
        out, _ = selective_attention(q, k, v, impl="triton")
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return work
