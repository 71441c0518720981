"""In front of an HTTP server: every answer begins late, and all together have so much bandwidth; counts what passes.

As a process of its own, for measurements: `python -m tests.slow_proxy PORT LATENCY_MS MB_PER_S` answers every line
that it reads with its port and what has passed since the last one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass

from tests.loopback_server import LoopbackServer

_PIECE = 1 << 16


@dataclass
class Passed:
    """Since it was last asked."""

    gets: int = 0
    body_bytes: int = 0
    most_at_once: int = 0
    """Bodies of at least half a megabyte that were on their way at the same time."""


class SlowProxy(LoopbackServer):
    """On loopback while the context lasts.

    Args:
        port: Of the server behind it.
        latency_s: From a request to the first byte of its answer, beside what the server takes.
        bytes_per_s: Of all answers together.
    """

    def __init__(self, port: int, *, latency_s: float, bytes_per_s: float) -> None:
        self.upstream, self.latency_s, self.bytes_per_s = port, latency_s, bytes_per_s
        self.passed = Passed()
        self._free_at = 0.0
        self._large = 0

    def asked(self) -> Passed:
        """What has passed since the last question."""
        passed, self.passed = self.passed, Passed()
        return passed

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what a client asks, over a connection of its own."""
        behind, to_behind = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            while await self._exchange(reader, writer, behind, to_behind):
                pass
        finally:
            with suppress(RuntimeError):
                to_behind.close()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        behind: asyncio.StreamReader,
        to_behind: asyncio.StreamWriter,
    ) -> bool:
        """One request without a body, and its answer."""
        request = await reader.readuntil(b"\r\n\r\n")
        method = request.partition(b" ")[0]
        assert method in (b"GET", b"HEAD"), f"only for reading, not for {method.decode()}"
        await asyncio.sleep(self.latency_s)
        to_behind.write(request)
        head = await behind.readuntil(b"\r\n\r\n")
        writer.write(head)
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in head.split(b"\r\n"))
        }
        if method == b"GET" and headers.get(b"transfer-encoding") == b"chunked":
            while (line := await behind.readuntil(b"\r\n")) != b"0\r\n":
                writer.write(line + await behind.readexactly(int(line, 16) + 2))
            writer.write(line + await behind.readuntil(b"\r\n"))
        elif method == b"GET":
            self.passed.gets += 1
            await self._pass_on(int(headers[b"content-length"]), behind, writer)
        await writer.drain()
        return True

    async def _pass_on(self, length: int, behind: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        large = length >= 500_000
        self._large += large
        self.passed.most_at_once = max(self.passed.most_at_once, self._large)
        try:
            while length:
                piece = await behind.read(min(_PIECE, length))
                if not piece:
                    raise ConnectionError("the server hung up")
                self._free_at = max(self._loop.time(), self._free_at) + len(piece) / self.bytes_per_s
                await asyncio.sleep(self._free_at - self._loop.time())
                writer.write(piece)
                await writer.drain()
                length -= len(piece)
                self.passed.body_bytes += len(piece)
        finally:
            self._large -= large


def main() -> None:
    port, latency_ms, mb_per_s = sys.argv[1:]
    with SlowProxy(int(port), latency_s=float(latency_ms) / 1000, bytes_per_s=float(mb_per_s) * 1e6) as proxy:
        print("ready", flush=True)  # noqa: T201
        for _ in sys.stdin:
            print(json.dumps({"port": proxy.port, **asdict(proxy.asked())}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
