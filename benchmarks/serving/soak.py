"""Hundreds of requests from dozens of clients, a third cancelled midway, some malformed: is all still right?

    python benchmarks/serving/soak.py CONVERTED persuasion.txt --budget 64 --out results/serving/soak

Every answer is compared with the one that the server gives when nothing else runs; memory and the requests that
wait are watched; at the end the server is asked to stop. Two malformed bodies a minute go out beside. It writes
soak.json.
"""

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from bench import prompts_of
from load import metrics
from openai import AsyncOpenAI
from server import OURS, Server

PORT = 8103
MALFORMED = [
    b"{",
    b'{"model": "model", "prompt": ["a", 3], "max_tokens": -1}',
    b'{"model": 7}',
    b"\xff\xfe",
    b"[]",
]


async def answer(client: AsyncOpenAI, prompt: list[int], n: int, cancel_at: int | None) -> list[str] | None:
    """The pieces of an answer; None where it is cancelled after some of them."""
    stream = await client.completions.create(
        model="model",
        prompt=prompt,
        max_tokens=n,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces: list[str] = []
    async for event in stream:
        pieces.append(event.choices[0].text)
        if cancel_at is not None and len(pieces) >= cancel_at:
            await stream.close()
            return None
    return pieces


def malformed(body: bytes) -> int:
    """What the server says to a body that makes no sense."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


async def soak(server: Server, prompts: list[list[int]], values: Any) -> dict[str, Any]:
    """The whole of it."""
    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=3600, max_retries=0)
    draw = random.Random(0)
    alone = [await answer(client, prompt, values.answer, None) for prompt in prompts]
    work = asyncio.Queue[tuple[int, int | None]]()
    for i in range(values.requests):
        work.put_nowait((i % len(prompts), draw.randint(1, values.answer - 1) if i % 3 == 2 else None))
    began, waits, wrong, done, cancelled = time.perf_counter(), [], [], 0, 0
    memory, codes = [server.memory()], []

    async def one_client() -> None:
        nonlocal done, cancelled
        while not work.empty():
            which, cancel_at = work.get_nowait()
            sent = time.perf_counter()
            got = await answer(client, prompts[which], values.answer, cancel_at)
            waits.append(time.perf_counter() - sent)
            if cancel_at is not None:
                cancelled += 1
                continue
            done += 1
            if "".join(got or []) != "".join(alone[which] or []):
                wrong.append(which)

    async def watch() -> None:
        last = 0.0
        while True:
            memory.append(await asyncio.to_thread(server.memory))
            if time.perf_counter() - last > 30:
                last = time.perf_counter()
                codes.append(await asyncio.to_thread(malformed, MALFORMED[len(codes) % len(MALFORMED)]))
            await asyncio.sleep(2)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(one_client() for _ in range(values.clients)))
    seconds = time.perf_counter() - began
    await asyncio.sleep(3)
    watching.cancel()
    after = metrics(PORT)
    half = memory[len(memory) // 3 :]
    return {
        "requests": values.requests,
        "clients": values.clients,
        "seconds": round(seconds, 1),
        "answers": done,
        "cancelled": cancelled,
        "differ_from_alone": len(wrong),
        "malformed_status": codes,
        "longest_wait": round(max(waits), 1),
        "memory_start": memory[0],
        "memory_first_third": memory[len(memory) // 3],
        "memory_end": memory[-1],
        "memory_growth_after_first_third": round(half[-1] / half[0] - 1, 4),
        "running_at_the_end": after["vllm:num_requests_running"],
        "waiting_at_the_end": after["vllm:num_requests_waiting"],
        "preempted": after.get("vllm:num_preemptions_total", 0.0),
        "heedful": {name: value for name, value in after.items() if name.startswith("heedful_")},
    }


def main() -> int:
    """Soak, write, and fail where something was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--memory", type=int, default=128, help="MiB for keys and values")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--answer", type=int, default=16, help="tokens")
    parser.add_argument("--out", type=Path, default=Path("results/serving/soak"))
    values = parser.parse_args()
    values.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    lengths = [draw.randint(1, 3 * values.budget) for _ in range(25)]
    prompts = [prompts_of(values.model, values.text, 1, n, 7 * i)[0] for i, n in enumerate(lengths)]
    command = [*OURS, str(values.model), "--dtype", "float32", "--max-model-len", "1024", "--name", "model"]
    command += ["--kv-memory", str(values.memory / 1024), "--kv-budget", str(values.budget)]
    Path("build").mkdir(exist_ok=True)
    with Server(command, PORT, Path("build/serve-soak.log")) as server:
        server.wait()
        found = asyncio.run(soak(server, prompts, values))
        found["clean_shutdown"] = server.stop()
    (values.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    bad = found["differ_from_alone"] or not found["clean_shutdown"] or found["running_at_the_end"]
    return int(bool(bad) or any(code < 400 for code in found["malformed_status"]))


if __name__ == "__main__":
    sys.exit(main())
