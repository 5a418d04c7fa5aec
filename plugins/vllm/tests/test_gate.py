"""Who has no key gets nothing but /health, on any path; and nobody keeps a server that ends."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from heedful_vllm.gate import EndsWithServer, KeyForAll


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


def serve(app: Any, server: Any, kind: str = "http") -> None:
    async def send(message: Any) -> None:
        pass

    scope = {"type": kind, "app": SimpleNamespace(state=SimpleNamespace(server=server))}
    asyncio.run(EndsWithServer(app)(scope, None, send))


def test_requests_end_with_the_server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(EndsWithServer, "LOOK_EVERY", 0.05)
    server, heard = SimpleNamespace(should_exit=False), []

    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(0.2)
            server.should_exit = True
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            heard.append("cut off")
            raise

    began = time.perf_counter()
    with pytest.raises(ConnectionAbortedError):
        serve(streaming, server)
    assert time.perf_counter() - began < 5 and heard == ["cut off"]


@pytest.mark.parametrize("server", [None, SimpleNamespace(should_exit=False)])
def test_requests_of_a_server_that_runs_are_left_alone(server: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(EndsWithServer, "LOOK_EVERY", 0.02)
    ended = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.1)
        ended.append(scope["type"])

    serve(slow, server)
    serve(slow, server, kind="websocket")
    assert ended == ["http", "websocket"]

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        serve(broken, server)
