"""Who has no key gets nothing but /health, on any path."""

import asyncio
from typing import Any

import pytest

from heedful_vllm.gate import KeyForAll


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def status(path: str, headers: list[tuple[bytes, bytes]] | None = None, kind: str = "http") -> Any:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    asyncio.run(KeyForAll(app)({"type": kind, "path": path, "headers": headers or []}, receive, send))
    return sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/invocations", "/tokenize", "/metrics", "/docs", "/", "/health/"]
)
def test_needs_the_key(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert status(path) == 401
    assert status(path, [(b"authorization", b"Bearer wrong")]) == 401
    assert status(path, [(b"authorization", b"Bearer secret")]) == 200
    assert status(path, kind="websocket") == 1008
    assert status("/health") == 200
    monkeypatch.delenv("VLLM_API_KEY")
    assert status(path) == 200
