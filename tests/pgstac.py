"""stac-fastapi-pgstac over PostgreSQL with PostGIS, the Planetary Computer's own software, for the length of a block.

Everything lies in a directory of its own below the system's temporary one, because PostgreSQL refuses to run as root
and another user may not look into a test's directory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.processes import die_with_parent, free_port

_START_LIMIT_S = 60.0
_POSTGIS = "/usr/share/postgresql/*/extension/postgis.control"


def missing() -> str:
    """What the server lacks on this machine; empty where it can run."""
    if not _binaries():
        return "needs PostgreSQL with PostGIS: apt-get install postgresql postgresql-postgis"
    if any(importlib.util.find_spec(name) is None for name in ("pypgstac", "stac_fastapi", "uvicorn")):
        return "needs stac-fastapi-pgstac: pip install 'twinlook[servers]'"
    return ""


class PgstacServer:
    """A database of its own with the given collections and items, and the STAC API over it."""

    def __init__(self, collections: Iterable[dict[str, Any]], items: Iterable[dict[str, Any]]) -> None:
        self.collections = list(collections)
        self.items = list(items)
        self.url = ""
        self._database = ""
        self._stack = ExitStack()

    @classmethod
    def of_archive(cls, directory: Path) -> PgstacServer:
        """Over what a simulated archive holds."""
        collections = [json.loads(path.read_text()) for path in sorted(directory.glob("collections/*.json"))]
        files = [json.loads(path.read_text()) for path in sorted(directory.glob("items/*.json"))]
        return cls(collections, [item for file in files for item in file["features"]])

    def __enter__(self) -> PgstacServer:
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="twinlook-pgstac-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self._start_database(folder, stack)
            self._load(folder)
            self._start_api(folder, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start_database(self, folder: Path, stack: ExitStack) -> None:
        who = _who()
        if who:
            shutil.chown(folder, who["user"], who["group"])
        data, port, binaries = folder / "data", free_port(), _binaries()
        initdb = [binaries / "initdb", "-D", data, "-U", "twinlook", "--auth=trust", "--no-sync", "-E", "UTF8"]
        _run([*initdb, "--no-instructions", "--locale=C.UTF-8"], cwd=folder, **who)
        lazy = ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=64MB"]
        where = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories="]
        settings = [part for option in (*lazy, *where) for part in ("-c", option)]
        _start([binaries / "postgres", "-D", data, *settings], folder / "postgres.log", stack, cwd=folder, **who)
        self._database = f"postgresql://twinlook@127.0.0.1:{port}/postgres"
        ready = [binaries / "pg_isready", "-q", "-d", self._database]
        _wait(lambda: subprocess.run(ready, check=False).returncode == 0, folder / "postgres.log")

    def _load(self, folder: Path) -> None:
        # One process for all three, because each start of the command costs seconds.
        files = {"collections": self.collections, "items": self.items}
        for name, content in files.items():
            (folder / f"{name}.ndjson").write_text("".join(f"{json.dumps(entry)}\n" for entry in content))
        script = (
            "import sys; from pypgstac.pypgstac import PgstacCLI; cli = PgstacCLI(dsn=sys.argv[1]); cli.migrate();\n"
            "for table in ('collections', 'items'): cli.load(table, f'{sys.argv[2]}/{table}.ndjson', method='insert')"
        )
        _run([sys.executable, "-c", script, self._database, folder], cwd=folder)

    def _start_api(self, folder: Path, stack: ExitStack) -> None:
        port = free_port()
        host, database_port = self._database.partition("@")[2].partition("/")[0].split(":")
        variables = {
            "PGUSER": "twinlook", "PGPASSWORD": "none", "PGHOST": host, "PGPORT": database_port,
            "PGDATABASE": "postgres", "ENABLED_EXTENSIONS": "query,sort,fields,filter,pagination",
        }  # fmt: skip
        uvicorn = [sys.executable, "-m", "uvicorn", "--factory", "stac_fastapi.pgstac.app:create_app"]
        options = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
        log = folder / "api.log"
        _start([*uvicorn, *options], log, stack, cwd=folder, env={**os.environ, **variables})
        self.url = f"http://127.0.0.1:{port}"
        _wait(lambda: _answers(f"{self.url}/_mgmt/ping"), log)


def _binaries() -> Path | None:
    """PostgreSQL's programs of the newest version that has PostGIS."""
    versions = [path.parts[-3] for path in Path("/").glob(_POSTGIS[1:])]
    found = [Path(f"/usr/lib/postgresql/{version}/bin") for version in sorted(versions, key=int, reverse=True)]
    return next((path for path in found if (path / "initdb").exists()), None)


def _who() -> dict[str, Any]:
    """As whom to run PostgreSQL: it refuses root."""
    if os.geteuid() != 0:
        return {}
    postgres = pwd.getpwnam("postgres")
    return {"user": postgres.pw_uid, "group": postgres.pw_gid, "extra_groups": []}


def _run(command: list[Any], **how: Any) -> None:
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, **how)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def _start(command: list[Any], log: Path, stack: ExitStack, **how: Any) -> None:
    output = stack.enter_context(log.open("wb"))
    process = subprocess.Popen([*map(str, command)], stdout=output, stderr=output, preexec_fn=die_with_parent, **how)
    stack.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    # SIGINT is PostgreSQL's fast shutdown, which takes its helpers with it, and ends uvicorn too.
    process.send_signal(2)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def _wait(ready: Any, log: Path) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"did not start within {_START_LIMIT_S:.0f} s: {log.read_text()[-2000:]}")
        time.sleep(0.05)
