"""Requests to an OpenAI server, so many at a time, and what they saw."""

import asyncio
import re
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from typing import Any

from openai import AsyncOpenAI

_METRIC = re.compile(r"^([a-zA-Z_:]+)(?:\{[^}]*\})? ([-+0-9.eE]+)$", re.MULTILINE)


@dataclass
class Answer:
    """One request; seconds from the start of the load, and of the request."""

    sent: float
    first: float
    """To the first token."""
    total: float
    tokens: int
    text: str = field(repr=False, default="")


@dataclass
class Load:
    """All requests of a load."""

    seconds: float
    answers: list[Answer]
    most_running: int
    """Requests that the engine had in flight at once, sampled."""
    most_waiting: int
    preempted: float
    hit_tokens: float
    """Prompt tokens that were found in the prefix cache."""

    @property
    def tokens_per_second(self) -> float:
        """Of answers."""
        return sum(a.tokens for a in self.answers) / self.seconds

    def figures(self) -> dict[str, Any]:
        """For a table."""
        latency = sorted(a.total for a in self.answers)
        first = sorted(a.first for a in self.answers)
        return {
            "tokens_per_second": round(self.tokens_per_second, 2),
            "seconds": round(self.seconds, 1),
            "first_token_p50": round(first[len(first) // 2], 2),
            "latency_p50": round(latency[len(latency) // 2], 2),
            "latency_p99": round(latency[min(len(latency) - 1, int(0.99 * len(latency)))], 2),
            "in_flight": self.most_running,
            "waiting": self.most_waiting,
            "preempted": self.preempted,
            "hit_tokens": self.hit_tokens,
        }

    def raw(self) -> dict[str, Any]:
        """Everything but the texts."""
        kept = [{k: round(v, 3) for k, v in asdict(a).items() if k != "text"} for a in self.answers]
        return {**self.figures(), "answers": kept}


def metrics(port: int) -> dict[str, float]:
    """/metrics, sums over labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for name, value in _METRIC.findall(text):
        found[name] = found.get(name, 0.0) + float(value)
    return found


async def _one(client: AsyncOpenAI, model: str, prompt: list[int], n: int, began: float) -> Answer:
    sent, first, tokens, text = time.perf_counter(), 0.0, 0, ""
    how: dict[str, Any] = {"ignore_eos": True}
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=n,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=how,
    )
    async for event in stream:
        first = first or time.perf_counter() - sent
        text += event.choices[0].text if event.choices else ""
        if event.usage is not None:
            tokens = event.usage.completion_tokens
    return Answer(sent - began, first, time.perf_counter() - sent, tokens, text)


async def _all(port: int, model: str, prompts: list[list[int]], n: int, at_once: int) -> Load:
    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=3600, max_retries=0)
    gate, began, before = asyncio.Semaphore(at_once), time.perf_counter(), metrics(port)
    seen: list[dict[str, float]] = []

    async def one(prompt: list[int]) -> Answer:
        async with gate:
            return await _one(client, model, prompt, n, began)

    async def watch() -> None:
        while True:
            seen.append(await asyncio.to_thread(metrics, port))
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(one(prompt) for prompt in prompts))
    seconds = time.perf_counter() - began
    watching.cancel()
    await client.close()
    after = metrics(port)

    def more(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    return Load(
        seconds,
        answers,
        int(max(m.get("vllm:num_requests_running", 0) for m in seen)),
        int(max(m.get("vllm:num_requests_waiting", 0) for m in seen)),
        more("vllm:num_preemptions_total"),
        more("vllm:prefix_cache_hits_total"),
    )


def load(port: int, model: str, prompts: list[list[int]], n: int, at_once: int) -> Load:
    """Send all prompts, at most `at_once` at a time, for n tokens each."""
    return asyncio.run(_all(port, model, prompts, n, at_once))
