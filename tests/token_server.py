"""A server that gives tokens as Planetary Computer does, with the faults that a test asks for."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from planetary_computer.settings import Settings

Issue = Callable[[str, str, datetime], str]
"""(account, container, expiry) -> token."""


def made_up(account: str, container: str, expires: datetime) -> str:
    """A token that no storage would accept."""
    return f"se={expires:%Y-%m-%dT%H%%3A%M%%3A%SZ}&sp=rl&sig=hUsH{time.monotonic_ns()}"


@dataclass
class TokenServer:
    """What it was asked, and what it is to answer."""

    url: str
    issue: Issue = made_up
    lifetime_s: float = 3600.0
    latency_s: float = 0.0
    wanted_key: str | None = None
    """Subscription key without which it answers 401."""

    faults: deque[tuple[int, Mapping[str, str]]] = field(default_factory=deque)
    """(status, headers) of the next answers, before it gives tokens again."""

    asked: list[tuple[float, str, str]] = field(default_factory=list)
    """(time.monotonic(), account, container) of each request."""

    given: list[str] = field(default_factory=list)
    """Every token that it gave."""

    def answer(self, path: str, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], dict[str, Any]]:
        account, container = path.rstrip("/").split("/")[-2:]
        self.asked.append((time.monotonic(), account, container))
        time.sleep(self.latency_s)
        if self.faults:
            status, extra = self.faults.popleft()
            return status, extra, {"statusCode": status, "message": "Rate limit is exceeded."}
        if self.wanted_key is not None and headers.get("Ocp-Apim-Subscription-Key") != self.wanted_key:
            return 401, {}, {"message": "Access denied due to missing subscription key."}
        if container == "nothing-here":
            return 404, {}, {"detail": "not found"}
        expires = datetime.now(UTC) + timedelta(seconds=self.lifetime_s)
        token = self.issue(account, container, expires)
        self.given.append(token)
        return 200, {}, {"msft:expiry": expires.isoformat().replace("+00:00", "Z"), "token": token}


@contextmanager
def token_server(issue: Issue = made_up) -> Iterator[TokenServer]:
    """A server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, extra, content = state.answer(self.path, self.headers)
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **extra}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = TokenServer(f"http://127.0.0.1:{server.server_port}/api/sas/v1/token", issue)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def sdk_settings(**variables: str | None) -> Iterator[None]:
    """The SDK's settings from these environment variables, and none that the SDK remembers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PC_SDK_SAS_URL", "PC_SDK_SUBSCRIPTION_KEY"):
            value = variables.get(name)
            patch.setenv(name, value) if value else patch.delenv(name, raising=False)
        Settings.get.cache_clear()
        yield
    Settings.get.cache_clear()
