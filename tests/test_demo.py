"""The demo, end to end: real job submission to a real cluster with token auth, on the small archive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def demo(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.demo", f"out={out}", "profile=test"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_whole_way_from_archive_to_report_and_again(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = demo(out)
    assert done.returncode == 0, done.stderr[-4000:]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5
    for part in ("Dataset", "Pretraining", "band statistics", "untrained", "EPSG:32632"):
        assert part in page
    # Self-contained: nothing is fetched from anywhere.
    assert "http://" not in page
    assert "https://" not in page
    metrics = json.loads((out / "evaluate/metrics.json").read_text())
    assert {row["source"] for row in metrics["scores"]} >= {"trained", "untrained", "band statistics"}
    for name in ("chips.zarr.run", "pretrain.run", "evaluate.run", "embed.run"):
        record = json.loads((out / name / "run.json").read_text())
        assert record["status"] == "succeeded"
        assert record["results"]["reused"] is False
    assert "token" not in (Path(f"{out}.run") / "run.json").read_text().lower()

    again = demo(out)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "holds this archive already" in again.stderr
    assert again.stderr.count("nothing to do") == 4
    assert processes_of(tmp_path) == []


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that still work for a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in words:
            found.append(words)
    return found
