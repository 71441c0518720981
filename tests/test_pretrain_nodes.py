"""pretrain on nodes that come and go, one taken with notice and one without: no sample is lost or seen twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import ray
from ray.cluster_utils import Cluster

from jobs.support.failures import failures
from pipeline.objects import Objects
from tests.training_runs import Event, all_learnt_once, attempts, run, samples_kept, wait_for, write_chips

pytestmark = [
    pytest.mark.slow,
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]

HEAD_CPUS, NODE_CPUS, WORKER_CPUS = 3, 2, 1.6
"""A worker fits once on each node, and on the head beside one CPU that reads."""

NUM_NODES = 2
"""Beside the head. They are there before Ray Train first looks how many workers fit, for it looks rarely."""

DEADLINE_S = 240
"""What the notice says; the node is taken as soon as the checkpoint is there."""


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Of a head and so many nodes; that one died is noticed within seconds."""
    health = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    memory = {"object_store_memory": 200_000_000, "include_dashboard": False}
    found = Cluster(head_node_args={"num_cpus": HEAD_CPUS, "_system_config": health, **memory}, initialize_head=True)
    for _ in range(request.param):
        found.add_node(num_cpus=NODE_CPUS, object_store_memory=100_000_000)
    ray.init(address=found.address, log_to_driver=False)
    found.wait_for_nodes()
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.parametrize("cluster", [NUM_NODES], indirect=True)
def test_every_sample_is_seen_once_where_nodes_are_taken_away_and_die(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    log.mkdir()
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    events = [Event(rank=0, at=36, what="await_notice"), Event(rank=0, at=42, what="stand")]
    events += [Event(rank=0, at=54, what="stand")]
    taking = Thread(target=take_nodes, args=(cluster, out, log))
    taking.start()
    how = {"num_workers": f"1..{NUM_NODES + 1}", "cpus_per_worker": WORKER_CPUS, "worker_start_timeout_s": 20}
    run(write_chips(str(tmp_path / "chips.zarr")), str(out), str(log), events, max_failures=2, max_preemptions=1, **how)
    taking.join()

    tried = attempts(log)
    # To 42 no checkpoint was due: it was taken at the notice.
    assert [(attempt.start, attempt.world) for attempt in tried] == [(0, 3), (42, 2), (48, 1)]
    all_learnt_once(tried)
    assert json.loads((out / "run.json").read_text())["results"]["samples_left_over"] == 4
    first, *between, last = (each["kind"] for each in failures(Objects.at(out)))
    # A node that is gone before its deadline, or whose worker is missed first, has died for Ray. On a slow machine it
    # may tell of one loss twice, in other words.
    assert first in ("preempted", "died")
    assert set(between) <= {"preempted", "died"}
    assert last == "died"


@pytest.mark.parametrize("cluster", [0], indirect=True)
def test_a_node_that_joins_is_made_use_of(cluster: Cluster, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    log.mkdir()
    joined: list[subprocess.Popen[bytes]] = []
    joining = Thread(target=join_when, args=(log / "stand-30", cluster.address, joined))
    joining.start()
    how = {"num_workers": "1..2", "cpus_per_worker": WORKER_CPUS, "grow_interval_s": 1, "max_failures": 0}
    how |= {"ray_address": cluster.address}
    try:
        run(write_chips(str(tmp_path / "chips.zarr")), str(out), str(log), [Event(rank=0, at=30, what="stand")], **how)
    finally:
        joining.join()
        for node in joined:
            node.terminate()
            node.wait()
    tried = attempts(log)
    assert [(attempt.start, attempt.world) for attempt in tried] == [(0, 1), (24, 2)]
    all_learnt_once(tried)
    assert failures(Objects.at(out)) == []


def join_when(sign: Path, address: str, joined: list[subprocess.Popen[bytes]]) -> None:
    """Let a node join once a file is there."""
    wait_for(sign, at_most_s=100)
    start = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--address", address]
    joined.append(subprocess.Popen([*start, f"--num-cpus={NODE_CPUS}", "--object-store-memory=100000000"]))


def take_nodes(cluster: Cluster, out: Path, log: Path) -> None:
    """Announce that one node will go, as a cloud does, and take it; later kill the other, as nobody does on purpose."""
    taken, killed = cluster.worker_nodes
    wait_for(log / "await_notice-36")
    drain = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address]
    what = ["--node-id", taken.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = ["--deadline-remaining-seconds", str(DEADLINE_S)]
    subprocess.run([*drain, *what, *deadline], check=True, capture_output=True)
    wait_for(log / "stand-42")
    while samples_kept(str(out)) < 42:
        time.sleep(0.1)
    cluster.remove_node(taken, allow_graceful=False)
    wait_for(log / "stand-54")
    cluster.remove_node(killed, allow_graceful=False)
