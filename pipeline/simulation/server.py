"""Serve an archive in a directory through a real STAC API server, on this machine only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO

from pipeline.processes import die_with_parent, free_port

_START_LIMIT_S = 30.0


class StacServer:
    """`rustac serve` over the collections and items of a directory, while the context lasts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> StacServer:
        files = sorted([*self.directory.glob("collections/*.json"), *self.directory.glob("items/*.json")])
        if not files:
            raise ValueError(f"no archive at {self.directory}: no collections or items to serve")
        address = f"127.0.0.1:{free_port()}"
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(  # noqa: S603
            [_executable(), "serve", "--addr", address, *map(str, files)],
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            preexec_fn=die_with_parent,
        )
        self.url = f"http://{address}"
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process else None

    def stop(self) -> None:
        """End the server; harmless when it has ended."""
        if self._process is None:
            return
        self._process.kill()  # it holds nothing that a gentler end would save
        self._process.wait()
        self._process = None
        if self._log:
            self._log.close()

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"rustac serve ended at once: {self._said()}")
            try:
                with urllib.request.urlopen(self.url, timeout=5):  # noqa: S310
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise RuntimeError(f"rustac serve did not answer at {self.url} within {_START_LIMIT_S:.0f} s")

    def _said(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        return self._log.read().decode().strip()


def _executable() -> str:
    """The `rustac` of this environment."""
    beside = Path(sys.executable).with_name("rustac")
    found = str(beside) if beside.exists() else shutil.which("rustac")
    if not found:
        raise ValueError("serving an archive needs rustac: pip install 'twinlook[demo]'")
    return found
