"""Shared by all tests: where the real data lies, and what no test may do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from hypothesis import settings
from ray._private import services

from pipeline.simulation.archive import write_archive
from pipeline.simulation.profiles import PROFILES
from pipeline.simulation.server import StacServer

ROOT = Path(__file__).resolve().parent.parent

# Wall-clock deadlines say more about the neighbours of a shared machine than about the code.
settings.register_profile("twinlook", deadline=None)
settings.load_profile("twinlook")

# Ray would otherwise decide by files in the home directory whether clusters need a token.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Threads that wait for each other's turn make small products fifty times slower where two processes test on two CPUs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ray Train takes one report of a worker each time it looks, by default every two seconds: most of a short run's time.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


def _without_complaint(process: subprocess.Popen[bytes]) -> None:
    """Ray kills its own processes without waiting for their end, and the garbage collector complains of it."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        subprocess.Popen.__del__(process)


services.ConsolePopen.__del__ = _without_complaint


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real Sentinel pixels and recorded STAC answers that lie beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: this test needs Sentinel pixels that are not in the repository")
    return folder


@pytest.fixture(scope="session")
def simulated_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small and nasty simulated archive; not to be changed."""
    directory = tmp_path_factory.mktemp("archive") / "simulated"
    write_archive(directory, PROFILES["test"], seed=0, processes=2)
    return directory


def require_server(there: bool, reason: str) -> None:
    """Skip a test whose server is not there; where all servers were promised to be there, fail it."""
    if not there:
        (pytest.fail if os.environ.get("TWINLOOK_REQUIRE_SERVERS") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def simulated_stac(simulated_archive: Path) -> Iterator[str]:
    """URL of a STAC API server over the simulated archive."""
    rustac = Path(sys.executable).with_name("rustac").exists() or shutil.which("rustac") is not None
    require_server(rustac, "needs the STAC server rustac: pip install 'twinlook[demo]'")
    with StacServer(simulated_archive) as server:
        yield server.url


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[None]:
    """A Ray cluster of two CPUs in this process's name, for one test module."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000)
    yield
    ray.shutdown()
