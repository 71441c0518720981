"""A server of files by HTTP/1.1 with Range that misbehaves as told, and counts what it is asked.

As a process of its own, for measurements: `python -m tests.faulty_server DIRECTORY LATENCY_MS` prints its port, and on
every line that it reads, what it was asked since the last one.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.loopback_server import LoopbackServer

_CHUNK = 1 << 20


@dataclass(kw_only=True)
class Fault:
    """What goes wrong with the files whose path holds a certain text."""

    status: int = 0
    """Answered instead of the file; 0: the file comes."""

    times: int | None = None
    """How many requests are answered so before all is well; None: all."""

    after: int = 0
    """How many requests go well before."""

    retry_after_s: int | None = None
    """Said with the status."""

    hang_s: float = 0.0
    """How long the server says nothing, before it hangs up."""

    token: str | None = None
    """Only requests that carry this text in their query are answered so."""

    edit: Callable[[bytes], bytes] | None = None
    """What the file holds instead of what lies on the disk."""

    beyond: int = 0
    """Only requests that reach this byte are answered so."""

    lasts_s: float | None = None
    """How long after the first request that is answered so all is well again; None: never."""

    seen: int = 0

    since_s: float | None = None
    """When the first request was answered so, by `time.monotonic`."""

    def strikes(self, query: str, last: int) -> bool:
        """Whether a request for bytes up to the last is hit; counts it."""
        if last < self.beyond:
            return False
        if self.token is not None and self.token not in query:
            return False
        self.seen += 1
        number = self.seen - self.after
        if number <= 0 or (self.times is not None and number > self.times):
            return False
        if self.since_s is None:
            self.since_s = time.monotonic()
        return self.lasts_s is None or time.monotonic() - self.since_s < self.lasts_s


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request as the server saw it."""

    method: str
    path: str
    query: str
    status: int
    sent: int
    """Bytes of body."""

    at_s: float


@dataclass
class FaultyServer(LoopbackServer):
    """Serves a directory on loopback while the context lasts."""

    root: Path
    latency_s: float = 0.0
    faults: dict[str, Fault] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def mend(self) -> None:
        """From now on all is well, and nothing was asked."""
        self.faults.clear()
        self.asked.clear()

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request after the other."""
        while await self._request(reader, writer):
            pass

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to be closed."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return False
        method, target, _ = head[0].split(" ")
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in head[1:] if line)}
        path, _, query = target.partition("?")
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        fault = next((fault for name, fault in self.faults.items() if name in path), None)
        # A first folder with an @ makes another URL of the same file.
        file = self.root / re.sub(r"^/@\w+", "", path).lstrip("/")
        asked = headers.get("range", "").removeprefix("bytes=")
        first, _, last = asked.partition("-")
        if fault and fault.edit is None and fault.strikes(query, int(last or 0)):
            if fault.hang_s:
                self._note(method, path, query, 0, 0)
                await asyncio.sleep(fault.hang_s)
                return False
            more = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
            await self._answer(writer, method, path, query, fault.status, b"", more)
            return True
        if not file.is_file():
            await self._answer(writer, method, path, query, 404, b"", {})
            return True
        content = fault.edit(file.read_bytes()) if fault and fault.edit else None
        size = len(content) if content is not None else file.stat().st_size
        start, stop = 0, size
        if asked:
            start, stop = int(first), min(int(last) + 1 if last else size, size)
            if start >= size:
                await self._answer(writer, method, path, query, 416, b"", {})
                return True
        more = {"Accept-Ranges": "bytes", **({"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if asked else {})}
        status = 206 if asked else 200
        if content is not None:
            await self._answer(writer, method, path, query, status, content[start:stop], more)
            return True
        self._write_head(writer, status, stop - start, more)
        self._note(method, path, query, status, stop - start if method == "GET" else 0)
        if method == "GET":
            with file.open("rb") as source:
                source.seek(start)
                for at in range(start, stop, _CHUNK):
                    writer.write(source.read(min(_CHUNK, stop - at)))
                    await writer.drain()
        return True

    async def _answer(
        self,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        query: str,
        status: int,
        body: bytes,
        more: dict[str, str],
    ) -> None:
        self._write_head(writer, status, len(body), more)
        if method == "GET":
            writer.write(body)
        self._note(method, path, query, status, len(body) if method == "GET" else 0)
        await writer.drain()

    def _write_head(self, writer: asyncio.StreamWriter, status: int, length: int, more: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} As asked", f"Content-Length: {length}", *(f"{k}: {v}" for k, v in more.items())]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    def _note(self, method: str, path: str, query: str, status: int, sent: int) -> None:
        at = asyncio.get_running_loop().time()
        self.asked.append(Asked(method=method, path=path, query=query, status=status, sent=sent, at_s=at))


def main() -> None:
    root, latency_ms = sys.argv[1:]
    with FaultyServer(Path(root), latency_s=float(latency_ms) / 1000) as server:
        print(server.port, flush=True)  # noqa: T201
        for _ in sys.stdin:
            asked, server.asked = server.asked, []
            print(json.dumps({"requests": len(asked), "bytes": sum(one.sent for one in asked)}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
