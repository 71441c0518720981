"""A real S3 server for tests: SeaweedFS, which refuses what is not signed with its key."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.conftest import require_server

WEED = Path(sys.executable).with_name("weed")
BUCKET = "chips"


@dataclass
class Seaweed:
    """A server on ports of its own, with its data in a folder."""

    folder: Path
    key_id: str = "tester"
    key: str = field(default_factory=lambda: f"hUsH{secrets.token_hex(16)}")
    ports: list[int] = field(default_factory=lambda: free_ports(8))
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it: what S3 clients read everywhere."""
        return {
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.key,
        }

    def start(self) -> None:
        """Start, or start again with the same data and ports."""
        self.folder.mkdir(parents=True, exist_ok=True)
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self.ports
        identity = {
            "name": self.key_id,
            "credentials": [{"accessKey": self.key_id, "secretKey": self.key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        options = {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": self.folder,
            "master.port": master,
            "master.port.grpc": master_grpc,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.port": volume,
            "volume.port.grpc": volume_grpc,
            "volume.max": 100,
            "filer.port": filer,
            "filer.port.grpc": filer_grpc,
            "filer.localSocket": self.folder / "filer.sock",
            "s3.port": s3,
            "s3.port.grpc": s3_grpc,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": self.folder / "s3.sock",
            "s3.config": config,
        }
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [WEED, "server", "-s3", *(f"-{name}={value}" for name, value in options.items())],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it; with SIGKILL, as a crash."""
        if self.process is not None:
            self.process.send_signal(how)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def pause(self) -> None:
        """It answers nothing any more, but its connections stay."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def _wait(self) -> None:
        """Until objects can be written; the first of a bucket creates it."""
        assert self.process is not None
        configuration = {name.removeprefix("AWS_").lower(): value for name, value in self.environment.items()}
        configuration.pop("allow_http")
        store = S3Store(
            BUCKET,
            config=configuration,  # type: ignore[arg-type]
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=5)},
        )
        end = time.monotonic() + 60
        while True:
            try:
                obstore.put(store, "started", b"")
                return
            except BaseError as error:
                reason = str(error)
            log = (self.folder / "log").read_text()[-2000:]
            assert self.process.poll() is None, f"SeaweedFS ended: {log}"
            assert time.monotonic() < end, f"SeaweedFS did not start: {reason}; {log}"
            time.sleep(0.1)


@contextmanager
def seaweed(folder: Path) -> Iterator[Seaweed]:
    """A server with an empty bucket, ended at the end."""
    require_server(WEED.exists(), "needs the S3 server SeaweedFS: pip install 'twinlook[servers]'")
    server = Seaweed(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGKILL)
        for port in server.ports:
            # It makes these where no option can move them.
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
