"""Stock vLLM against heedful's models in it: same weights, same dtype, same memory for keys and values.

    python benchmarks/serving/bench.py STOCK CONVERTED persuasion.txt --memory 256 --prompt 256 --answer 256 \
        --budget 64 --at-once 1 8 --out results/serving

Both servers run side by side and are asked in turns, so that what the machine does besides meets both. Writes
NAME.json with every request, and a table, results.md, of all NAME.json in the folder.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from load import Load, load
from rich.console import Console
from server import OURS, STOCK, Server

from heedful.hf.load import load_tokenizer

STOCK_PORT, OWN_PORT = 8101, 8102


def prompts_of(folder: Path, text: Path, n: int, length: int, skip: int) -> list[list[int]]:
    """n different pieces of a text, of `length` tokens each."""
    ids = load_tokenizer(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    starts = [(skip + i) * 131 % (len(ids) - length) for i in range(n)]
    return [ids[at : at + length] for at in starts]


def table(folder: Path) -> str:
    """Markdown, a line for each load and server; ratios are of those that took turns."""
    names = "memory", "prompt + answer", "at once", "server", "tokens/s", "ratio", "first token p50"
    names += "latency p50 / p99", "in flight", "preempted"
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        for cell in run["cells"]:
            rates: dict[str, list[float]] = {}
            for turn in cell["turns"]:
                for name, said in turn.items():
                    rates.setdefault(name, []).append(said["tokens_per_second"])
            ratio = statistics.median(
                ours / stock for ours, stock in zip(rates["heedful"], rates["stock"], strict=True)
            )
            for name, label in (("stock", "stock vLLM"), ("heedful", f"heedful, {run['budget']:,} held")):
                last = cell["turns"][-1][name]
                lines.append(
                    f"| {run['memory']:,} MiB | {run['prompt']:,} + {run['answer']:,} | {cell['at_once']} "
                    f"| {label} | {statistics.median(rates[name]):.1f} "
                    f"| {f'**{ratio:.2f}**' if name == 'heedful' else ''} | {last['first_token_p50']:.1f} s "
                    f"| {last['latency_p50']:.1f} / {last['latency_p99']:.1f} s "
                    f"| {last['in_flight']} | {last['preempted']:.0f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stock", type=Path)
    parser.add_argument("converted", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--name", default="smollm2")
    parser.add_argument("--memory", type=int, default=256, help="MiB for keys and values, of each server")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--answer", type=int, default=256, help="tokens")
    parser.add_argument("--budget", type=int, default=64, help="tokens held")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, help="of a load; as many as at once if left out")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--prefix-caching", action="store_true", help="in both")
    parser.add_argument("--out", type=Path, default=Path("results/serving"))
    values = parser.parse_args()
    console = Console(stderr=True)
    values.out.mkdir(parents=True, exist_ok=True)
    longest = str(values.prompt + values.answer)
    caching = "--enable-prefix-caching" if values.prefix_caching else "--no-enable-prefix-caching"
    stock = [
        *STOCK,
        str(values.stock),
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--max-model-len",
        longest,
    ]
    stock += ["--kv-cache-memory-bytes", str(values.memory * 2**20), caching]
    stock += ["--served-model-name", "model"]
    ours = [*OURS, str(values.converted), "--dtype", "float32", "--max-model-len", longest, "--name", "model"]
    ours += ["--kv-memory", str(values.memory / 1024), "--kv-budget", str(values.budget)]
    ours += ["--prefix-caching" if values.prefix_caching else "--no-prefix-caching"]
    run: dict[str, Any] = {name: getattr(values, name) for name in ("memory", "prompt", "answer", "budget")}
    run |= {
        "prefix_caching": values.prefix_caching,
        "dtype": "float32",
        "cells": [],
    }
    run |= {"machine": f"{platform.processor() or platform.machine()}, {platform.python_version()}"}
    build = Path("build")
    build.mkdir(exist_ok=True)
    with (
        Server(stock, STOCK_PORT, build / "serve-stock.log") as one,
        Server(ours, OWN_PORT, build / "serve-heedful.log") as two,
    ):
        servers = {"stock": one, "heedful": two}
        for server in servers.values():
            server.wait()
        for server in servers.values():  # what is compiled on first use
            load(server.port, "model", prompts_of(values.stock, values.text, 2, 64, 900), 8, 2)
        run["memory_bytes"] = {name: server.memory() for name, server in servers.items()}
        for at_once in values.at_once:
            turns: list[dict[str, Any]] = []
            for turn in range(values.turns):
                n = values.requests or at_once
                prompts = prompts_of(values.stock, values.text, n, values.prompt, turn * n)
                found: dict[str, Load] = {}
                order = list(servers.items())
                for name, server in order if turn % 2 == 0 else order[::-1]:
                    found[name] = load(server.port, "model", prompts, values.answer, at_once)
                    said = found[name].figures()
                    console.print(f"{at_once} at once, turn {turn + 1}, {name}: {said}", highlight=False)
                turns.append({name: found[name].raw() for name in servers})
            run["cells"].append({"at_once": at_once, "turns": turns})
            (values.out / f"{values.name}.json").write_text(json.dumps(run, indent=1) + "\n")
            (values.out / "results.md").write_text(table(values.out))
    print((values.out / "results.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
