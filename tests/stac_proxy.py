"""A STAC API in front of another one: counts what it is asked, and fails or lies where a test wants it to."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that came in."""

    number: int
    """Of the searches, from 0; -1 for anything else."""

    method: str
    path: str
    body: dict[str, Any]
    at: float
    """Seconds, on the monotonic clock."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Said instead of what the other server would say."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    hang_s: float = 0.0
    """Wait so long before saying it, or until the proxy is closed."""

    cut: bool = False
    """Announce more bytes than are sent."""


Fault = Callable[[Asked], Reply | None]
Change = Callable[[Asked, dict[str, Any]], dict[str, Any]]


class StacProxy:
    """In front of `upstream` while the context lasts; `fault` and `change` may be set at any time."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.asked: list[Asked] = []
        self.fault: Fault = lambda asked: None
        self.change: Change = lambda asked, answer: answer
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def searches(self) -> list[Asked]:
        """Those that asked for items."""
        return [asked for asked in self.asked if asked.number >= 0]

    def __enter__(self) -> StacProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _note(self, method: str, path: str, body: dict[str, Any]) -> Asked:
        with self._lock:
            number = len(self.searches) if path.startswith("/search") else -1
            asked = Asked(number=number, method=method, path=path, body=body, at=time.monotonic())
            self.asked.append(asked)
        return asked

    def _answer(self, asked: Asked) -> Reply:
        instead = self.fault(asked)
        if instead is not None:
            self._closing.wait(instead.hang_s)
            return instead
        data = json.dumps(asked.body).encode() if asked.method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.upstream + asked.path, data=data, headers=headers, method=asked.method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                text = response.read().decode().replace(self.upstream, self.url)
        except urllib.error.HTTPError as error:
            with error:
                return Reply(status=error.code, body=error.read())
        return Reply(body=json.dumps(self.change(asked, json.loads(text))).encode())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(proxy._answer(proxy._note("GET", self.path, {})))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._reply(proxy._answer(proxy._note("POST", self.path, body)))

            def _reply(self, reply: Reply) -> None:
                if proxy._closing.is_set():
                    return
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body) + 100 * reply.cut))
                # Who asked may have given up long ago.
                with suppress(ConnectionError):
                    self.end_headers()
                    self.wfile.write(reply.body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
