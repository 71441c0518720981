"""A Ray cluster of one node for the length of a ``with`` block, with token auth on and everything on loopback."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.support.job import JobError
from pipeline.processes import die_with_parent, free_port

log = logging.getLogger(__name__)

_START_S = 90.0
_STOP_S = 10.0
_OBJECT_STORE_BYTES = 600_000_000


@dataclass(frozen=True, kw_only=True)
class LocalCluster:
    """A running head node."""

    address: str
    """Of its dashboard, which takes jobs."""

    client: JobSubmissionClient

    def run(self, name: str, entrypoint: str, *, working_dir: Path) -> None:
        """Submit a job as ``ray job submit --working-dir`` does, pass its log on, and wait for its end.

        Raises:
            JobError: It did not succeed.
        """
        submission = self.client.submit_job(
            entrypoint=entrypoint, runtime_env={"working_dir": str(working_dir)}, metadata={"name": name}
        )
        shown = 0
        while True:
            status = self.client.get_job_status(submission)
            text = self.client.get_job_logs(submission)
            end = len(text) if status.is_terminal() else text.rfind("\n") + 1
            for line in text[shown:end].splitlines():
                sys.stderr.write(f"  {name} | {line}\n")
            shown = max(shown, end)
            if status.is_terminal():
                break
            time.sleep(0.5)
        if status != JobStatus.SUCCEEDED:
            code = self.client.get_job_info(submission).driver_exit_code
            raise JobError(f"{name} ended as {status.value} with exit code {code}; its log is above: {entrypoint}")


@contextmanager
def local_cluster(*, num_cpus: int) -> Iterator[LocalCluster]:
    """Start a head node as ``ray start`` does, and stop it by its own process id.

    Args:
        num_cpus: CPUs that Ray hands out; more than the machine has lets workers that wait share a core.

    Raises:
        JobError: The head does not answer in time.
    """
    # Unix sockets under it must stay below 107 characters.
    temp = Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp"))  # private to this user, and short
    dashboard = free_port()
    token = secrets.token_hex(32)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Jobs are started with the head's own Python.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--port=0", f"--num-cpus={num_cpus}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--include-dashboard=true",
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
        "--node-ip-address=127.0.0.1", f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--temp-dir={temp}",
    ]  # fmt: skip
    with (temp / "head.log").open("w") as output:
        head = subprocess.Popen(  # noqa: S603  # a command of our own
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        client = _wait_for(head, address, token, temp / "head.log")
        log.info("Ray head of %d CPUs answers at %s", num_cpus, address)
        yield LocalCluster(address=address, client=client)
    finally:
        _stop(head)
        shutil.rmtree(temp, ignore_errors=True)


def _wait_for(head: subprocess.Popen[bytes], address: str, token: str, output: Path) -> JobSubmissionClient:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and head.poll() is None:
        with suppress(ConnectionError, RuntimeError):
            # Ray reads its own variables once per process, so the token goes with every request instead.
            client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
            client.list_jobs()
            return client
        time.sleep(0.5)
    raise JobError(f"the Ray head did not start: {output.read_text()[-2000:]}")


def _stop(head: subprocess.Popen[bytes]) -> None:
    """Let the head stop its own children; what is left of its session after a while is killed, by process id."""
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        # Ray takes half a minute to give up on workers of jobs that are over.
        log.info("Ray is still stopping after %.0f s: ending its processes", _STOP_S)
    for pid in _session(head.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait()


def _session(leader: int) -> list[int]:
    """Process ids of the session that a process leads."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # The name in parentheses may hold spaces; the session is the fourth field after it.
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(entry.name))
    return found
