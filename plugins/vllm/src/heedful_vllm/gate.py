"""What stands before vLLM's server: a key for every path, and an end to requests when the server ends."""

import asyncio
import hmac
import os
from typing import Any

OPEN = "/health"
"""What needs no key."""


class EndsWithServer:
    """ASGI middleware: requests are cut off when the server is told to end; it would wait for them forever."""

    LOOK_EVERY = 1.0
    """Seconds."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand on, and look now and then."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        work = asyncio.ensure_future(self.app(scope, receive, send))
        try:
            while not (await asyncio.wait({work}, timeout=self.LOOK_EVERY))[0]:
                server = getattr(scope["app"].state, "server", None)
                if server is not None and server.should_exit:
                    raise ConnectionAbortedError("the server ends")
            await work
        finally:
            work.cancel()


class KeyForAll:
    """ASGI middleware: without `Authorization: Bearer KEY`, where a key is set, everything but /health is 401.

    vLLM asks for its key under /v1 alone, and answers prompts elsewhere, too.
    """

    def __init__(self, app: Any) -> None:
        self.app, self.key = app, os.environ.get("VLLM_API_KEY", "")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand on what may pass."""
        if scope["type"] not in ("http", "websocket") or self._may_pass(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _may_pass(self, scope: Any) -> bool:
        if not self.key or scope.get("path") == OPEN:
            return True
        given = dict(scope.get("headers") or []).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.key}".encode())
