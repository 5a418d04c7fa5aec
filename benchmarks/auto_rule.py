"""What `impl="auto"` goes by on the CPU: the forms of selective attention, interleaved, over head size and T.

    python benchmarks/auto_rule.py --threads 1 --head-dims 16,32    # some minutes; once per pair and thread count
    python benchmarks/auto_rule.py --table                          # all rows so far

No key is left out, so that times do not depend on the inputs. A form that took more than 2.5 times as long as the
fastest at T >= 512 is not measured at longer T. Rows are appended to auto.jsonl of the folder; auto.txt is their
table.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from heedful.bench.forms import Form, ours, plain
from heedful.bench.kernels import Sizes, read, trained, with_every_key
from heedful.bench.timing import interleaved
from heedful.cli.bench.common import machine

FORMS = ("reference", "sdpa", "blocked", "native")
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
HOPELESS = 2.5


def measure(
    batch: int, head_dim: int, threads: int, seconds: float, lengths: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Rows of one head size: 8 heads, prefill and train at each length."""
    for work, bind in (("prefill", read), ("train", trained)):
        left: dict[str, Form] = {"plain SDPA": plain, **{impl: ours(impl) for impl in FORMS}}
        for length in lengths:
            inputs = Sizes(8, 8, head_dim, head_dim, batch).draw(length, torch.device("cpu"), torch.float32)
            if work == "train":
                inputs = tuple(x.requires_grad_() for x in inputs)  # type: ignore[assignment]
            cases = {name: with_every_key(bind(form, *inputs)) for name, form in left.items()}
            turns = 3 if length >= 1024 else None
            timings = interleaved(cases, turns=turns, seconds=seconds, warmup=1 if turns else 2)
            took = {name: timing.seconds for name, timing in timings.items()}
            best = min(took[name] for name in left if name in FORMS)
            for name, timing in timings.items():
                yield {
                    **{"work": work, "batch": batch, "head_dim": head_dim, "length": length},
                    **{"threads": threads, "impl": name, "seconds": timing.seconds},
                    **{"low": timing.low, "high": timing.high, "turns": timing.turns},
                    **{"samples": [round(s, 7) for s in timing.samples], "disturbed": timing.disturbed},
                }
            if length >= 512:
                left = {n: form for n, form in left.items() if n not in FORMS or took[n] <= HOPELESS * best}


def table(rows: list[dict[str, Any]]) -> str:
    """Times over the fastest form of ours, and plain SDPA's; - is not measured."""
    names = ("plain SDPA", *FORMS)
    lines = [f"{'work':<8} threads batch    D     T  {'fastest':<10}" + "".join(f"{n:>12}" for n in names)]
    keys = ("work", "threads", "batch", "head_dim", "length")
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["impl"]] = row["seconds"]
    for (work, threads, batch, size, length), took in sorted(groups.items()):
        fastest = min((name for name in FORMS if name in took), key=took.__getitem__)
        shown = [f"{took[n] / took[fastest]:.2f}" if n in took else "-" for n in names]
        start = f"{work:<8} {threads:>7} {batch:>5} {size:>4} {length:>5}  {fastest:<10}"
        lines.append(start + "".join(f"{x:>12}" for x in shown))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and append, or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--head-dims", default="16,32,64,128")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--seconds", type=float, default=0.4, help="for the forms at one length together")
    parser.add_argument("--out", type=Path, default=Path("results/auto"))
    parser.add_argument("--table", action="store_true")
    values = parser.parse_args()
    values.out.mkdir(parents=True, exist_ok=True)
    path = values.out / "auto.jsonl"
    if not values.table:
        torch.set_num_threads(values.threads)
        about = machine(torch.device("cpu")) | {
            "command": "python benchmarks/auto_rule.py " + " ".join(sys.argv[1:])
        }
        lengths = tuple(int(n) for n in values.lengths.split(","))
        for size in values.head_dims.split(","):
            for row in measure(values.batch, int(size), values.threads, values.seconds, lengths):
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | about) + "\n")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    (values.out / "auto.txt").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
