"""One broker for all: who may ask a host now, with which token; and that it may die."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import broker
from pipeline.access import DirectAccess, HostUnavailable, SigningRefused, host_of
from pipeline.broker import (
    AccessSpec,
    Broker,
    BrokeredAccess,
    ClusterAccess,
    ProcessAccess,
    ThreadConnection,
    access_for,
)
from pipeline.limits import HostLimits
from pipeline.signing import Container, container_of
from tests.token_server import TokenServer, sdk_settings, token_server

HREF = "https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/32/U/MV/B02.tif"
OTHER = "https://sentinel1euwestrtc.blob.core.windows.net/sentinel1-grd-rtc/GRD/vv.tif"
FREE = HostLimits(rate_per_s=1e6, burst=1_000_000, turns=1000)
SPEC = AccessSpec(signing="planetary-computer", storage=FREE, api=FREE)
KEY = "hUsHkey"


@pytest.fixture
def tokens() -> Iterator[TokenServer]:
    with token_server() as server, sdk_settings(PC_SDK_SAS_URL=server.url):
        yield server


@pytest.fixture
def own() -> Iterator[Callable[[AccessSpec], ProcessAccess]]:
    """Access through a broker of this test's own."""
    connection = ThreadConnection()
    yield lambda spec: ProcessAccess(spec, connection)
    connection.close()


Own = Callable[[AccessSpec], ProcessAccess]


def until(condition: Callable[[], bool], *, at_most_s: float = 20.0) -> float:
    """Seconds until something is true."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < at_most_s, "it never came"
        time.sleep(0.01)
    return time.monotonic() - start


def test_one_request_serves_all_threads_and_each_container_has_its_own_token(tokens: TokenServer, own: Own) -> None:
    tokens.latency_s = 0.2
    access = own(SPEC)
    with ThreadPoolExecutor(50) as pool:
        signed = list(pool.map(access.sign, [HREF, OTHER] * 25))
    assert len(set(signed)) == 2
    assert all(url.startswith((f"{HREF}?se=", f"{OTHER}?se=")) for url in signed)
    assert sorted(asked[2] for asked in tokens.asked) == ["sentinel1-grd-rtc", "sentinel2-l2"]
    assert access.state()["token_requests"] == 2


def test_what_is_not_planetary_computers_is_left_as_it_is(own: Own) -> None:
    plain = own(replace(SPEC, signing="none"))
    for href in (HREF, "/data/B02.tif", "s3://bucket/B02.tif", f"{HREF}?own=1"):
        assert plain.sign(href) == href
    signing = own(SPEC)
    for href in (
        "/data/B02.tif",
        "https://example.org/c/B02.tif",
        "https://ai4edatasetspublicassets.blob.core.windows.net/assets/a.png",
    ):
        assert signing.sign(href) == href
        assert container_of(href) is None
    assert container_of(HREF) == Container("sentinel2l2a01", "sentinel2-l2")


def test_an_old_signature_is_replaced_not_kept(tokens: TokenServer, own: Own) -> None:
    signed = own(SPEC).sign(f"{HREF}?se=2020-01-01&sig=old")
    assert "old" not in signed
    assert signed.count("?") == 1


def test_a_token_is_renewed_before_it_expires(tokens: TokenServer, own: Own) -> None:
    tokens.lifetime_s = 1.2
    access = own(SPEC)
    first = access.sign(HREF)
    assert access.sign(HREF) == first
    renewed_s = until(lambda: access.sign(HREF) != first)
    assert 0.5 < renewed_s < 1.2, "before, and not at once"
    assert len(tokens.asked) == 2


def test_a_token_that_the_storage_refuses_is_dropped_by_all_and_once(
    tokens: TokenServer, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "_YOUNG_S", 0.0)
    one, two = own(SPEC), own(SPEC)
    first = one.sign(HREF)
    assert two.sign(HREF) == first
    one.failed(HREF, status=403)
    second = one.sign(HREF)
    assert second != first
    two.failed(HREF, status=403)
    assert two.sign(HREF) == second, "it was renewed already"
    assert len(tokens.asked) == 2
    assert one.state()["hosts"].keys() == {host_of(tokens.url)}, "a refused token is no trouble of the storage's"


def test_a_blob_that_is_refused_with_every_token_does_not_cause_requests_without_end(
    tokens: TokenServer, own: Own
) -> None:
    access = own(SPEC)
    for _ in range(50):
        access.sign(HREF)
        access.failed(HREF, status=403)
    assert len(tokens.asked) == 1


@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {}])
def test_the_giver_of_tokens_is_asked_again_when_it_says_and_not_before(
    tokens: TokenServer, own: Own, headers: dict[str, str]
) -> None:
    tokens.faults += [(429, headers), (503, headers)]
    access = own(SPEC)
    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(access.sign, [HREF] * 20))) == 1
    first, second, third = (at for at, _, _ in tokens.asked)
    if headers:
        assert 1.0 <= second - first < 1.5
        assert 1.0 <= third - second < 1.5
    else:
        assert 0.4 < second - first < 1.5
        assert 0.9 < third - second < 2.5


def test_a_token_that_is_still_good_is_used_while_no_new_one_is_to_be_had(tokens: TokenServer, own: Own) -> None:
    tokens.lifetime_s = 3.0
    access = own(replace(SPEC, api=replace(FREE, failures=1, pause_s=0.1, longest_pause_s=0.1, patience_s=0.2)))
    first = access.sign(HREF)
    tokens.faults += [(500, {"Retry-After": "0"})] * 1000
    until(lambda: len(tokens.asked) > 2 or access.sign(HREF) != first)
    assert access.sign(HREF) == first
    with pytest.raises(HostUnavailable, match=r"^127\.0\.0\.1:\d+: no good answer for"):
        until(lambda: access.sign(HREF) != first)


@pytest.mark.parametrize("key", [None, "hUsHwrong"])
def test_a_missing_or_wrong_key_is_told_with_what_to_do_and_not_repeated(
    tokens: TokenServer, own: Own, key: str | None
) -> None:
    tokens.wanted_key = KEY
    with sdk_settings(PC_SDK_SAS_URL=tokens.url, PC_SDK_SUBSCRIPTION_KEY=key):
        with pytest.raises(SigningRefused, match="PC_SDK_SUBSCRIPTION_KEY") as refusal:
            own(SPEC).sign(OTHER)
        message = str(refusal.value)
        assert ("is not set on node" in message) == (key is None)
        assert "sentinel1euwestrtc/sentinel1-grd-rtc" in message
        assert "hUsH" not in message
        assert len(tokens.asked) == 1, "asking again would not help"
    with sdk_settings(PC_SDK_SAS_URL=tokens.url, PC_SDK_SUBSCRIPTION_KEY=KEY):
        assert own(SPEC).sign(OTHER).startswith(f"{OTHER}?se=")


def test_a_container_that_is_not_there_is_told_at_once(tokens: TokenServer, own: Own) -> None:
    with pytest.raises(SigningRefused, match=r"account/nothing-here from 127\.0\.0\.1:\d+: HTTP 404$"):
        own(SPEC).sign("https://account.blob.core.windows.net/nothing-here/x.tif")


def test_a_spec_is_frozen_and_neither_it_nor_a_token_shows_a_secret(
    tokens: TokenServer, own: Own, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with sdk_settings(PC_SDK_SAS_URL=tokens.url, PC_SDK_SUBSCRIPTION_KEY=KEY):
        access = own(SPEC)
        access.sign(HREF)
        assert b"hUsH" not in pickle.dumps(SPEC)
        assert pickle.loads(pickle.dumps(SPEC)) == SPEC
        assert hash(SPEC) == hash(pickle.loads(pickle.dumps(SPEC)))
        assert "hUsH" not in repr(access._tokens), "a token is shown"
        assert "hUsH" not in str(access.state())
    with pytest.raises(FrozenInstanceError):
        SPEC.shared = False  # type: ignore[misc]
    assert "hUsH" not in caplog.text


def test_no_more_turns_at_a_time_than_allowed_and_other_hosts_do_not_wait(own: Own) -> None:
    spec = replace(SPEC, storage=replace(FREE, turns=3))
    accesses = [own(spec) for _ in range(4)]
    now, most = 0, 0
    lock = threading.Lock()

    def work(number: int) -> None:
        nonlocal now, most
        with accesses[number % 4].turn("https://a.example/x", requests=5):
            with lock:
                now += 1
                most = max(most, now)
            with accesses[number % 4].turn(f"https://b.example/{number}"):
                time.sleep(0.01)
            with lock:
                now -= 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(40)))
    assert most == 3
    hosts = until_quiet(accesses[0])
    assert hosts["a.example"]["requests"] == 200
    assert hosts["b.example"]["requests"] == 40


def until_quiet(access: BrokeredAccess) -> dict[str, Any]:
    until(lambda: not any(host["held"] or host["queued"] for host in access.state()["hosts"].values()))
    hosts: dict[str, Any] = access.state()["hosts"]
    return hosts


def test_a_host_that_asks_to_wait_is_left_alone_for_exactly_that_long(own: Own) -> None:
    access = own(SPEC)
    access.failed("https://a.example/x", status=429, retry_after_s=0.5)
    start = time.monotonic()
    with access.turn("https://b.example/x"):
        assert time.monotonic() - start < 0.3
    with access.turn("https://a.example/y"):
        assert 0.45 <= time.monotonic() - start < 1.0


def test_a_turn_that_fails_is_given_back_too(own: Own) -> None:
    access = own(replace(SPEC, storage=replace(FREE, turns=1)))
    for _ in range(3):
        with pytest.raises(KeyError), access.turn("https://a.example/x"):
            raise KeyError
    until_quiet(access)


def test_a_breaker_lets_one_try_and_the_rest_follow_when_it_works(own: Own) -> None:
    limits = replace(FREE, failures=3, pause_s=0.3, longest_pause_s=0.3)
    access = own(replace(SPEC, storage=limits))
    for _ in range(3):
        access.failed("https://a.example/x")
    start = time.monotonic()
    entered: list[float] = []
    lock = threading.Lock()

    def work(_: int) -> None:
        with access.turn("https://a.example/x"):
            with lock:
                entered.append(time.monotonic() - start)
            time.sleep(0.2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert 0.25 <= entered[0] < 0.6
    assert all(entered[0] + 0.2 <= at for at in entered[1:]), "more than one probe"
    assert entered[-1] - entered[1] < 0.2, "not all at once after it"


def test_waiting_for_a_host_that_stays_away_ends(own: Own) -> None:
    access = own(replace(SPEC, storage=replace(FREE, failures=1, pause_s=0.2, longest_pause_s=0.2, patience_s=0.5)))

    def fail_on() -> None:
        while True:
            with access.turn("https://user:hUsH@a.example/x?sig=hUsH"):
                access.failed("https://a.example/x", status=503)

    with pytest.raises(HostUnavailable, match=r"^a\.example: no good answer for \d s$"):
        fail_on()
    access.failed("https://b.example/x", status=429, retry_after_s=3600)
    with pytest.raises(HostUnavailable, match=r"^b\.example: it asked to be left alone for 3600 s$"):
        access.turn("https://b.example/x").__enter__()


def test_local_files_need_no_turn() -> None:
    class Nobody:
        def call(self, method: str, *arguments: Any) -> Any:
            raise AssertionError(method)

        tell = call

    access = BrokeredAccess(SPEC, Nobody(), job="here")
    for path in ("/data/x.tif", "data/x.tif", "file:///data/x.tif"):
        with access.turn(path, requests=100):
            access.failed(path)


def test_hosts_are_told_apart_by_name_and_port() -> None:
    assert host_of("https://User:pw@Host.example:8443/x?y") == "host.example:8443"
    assert host_of("s3://bucket/key") == "bucket"
    assert host_of("/plain/path") is None
    assert host_of("file:///plain/path") is None


def test_the_strictest_job_counts_as_long_as_it_is_there(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "_WISH_S", 0.3)
    loose, strict = own(SPEC), own(replace(SPEC, storage=replace(FREE, rate_per_s=7)))
    strict._job = "another"
    for access in (strict, loose):
        with access.turn("https://a.example/x"):
            pass
    assert loose.state()["hosts"]["a.example"]["rate_per_s"] == 7
    time.sleep(0.35)
    with loose.turn("https://a.example/x"):
        pass
    assert loose.state()["hosts"]["a.example"]["rate_per_s"] == FREE.rate_per_s


def test_without_a_cluster_or_a_wish_to_share_access_is_of_this_process() -> None:
    assert isinstance(access_for(SPEC), ProcessAccess)
    assert access_for(SPEC) is access_for(replace(SPEC))
    assert access_for(SPEC) is not access_for(replace(SPEC, signing="none"))


def test_direct_access_has_all_that_access_has() -> None:
    direct = DirectAccess()
    with direct.turn(HREF, requests=3):
        assert direct.sign(HREF) == HREF
        direct.failed(HREF, status=500)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, TokenServer]]:
    """Two nodes whose environment has the key; the driver's has not."""
    with token_server() as server:
        server.wanted_key = KEY
        with (
            sdk_settings(PC_SDK_SAS_URL=server.url, PC_SDK_SUBSCRIPTION_KEY=KEY),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]))
            common = {"object_store_memory": 100_000_000, "include_dashboard": False}
            # A node that does not answer is given up after two seconds, and not after half a minute.
            quick = {
                "health_check_initial_delay_ms": 500,
                "health_check_period_ms": 500,
                "health_check_timeout_ms": 500,
            }
            head = {"num_cpus": 2, "_system_config": {**quick, "health_check_failure_threshold": 3}, **common}
            nodes = Cluster(initialize_head=True, head_node_args=head)
            nodes.add_node(num_cpus=0, resources={"second": 1}, object_store_memory=100_000_000)
        ray.init(address=nodes.address, log_to_driver=False)
        nodes.wait_for_nodes()
        try:
            yield nodes, server
        finally:
            ray.shutdown()
            nodes.shutdown()


def second_node() -> str:
    return next(str(n["NodeID"]) for n in ray.nodes() if n["Alive"] and "second" in n["Resources"])


@pytest.fixture(scope="module")
def broker_elsewhere(cluster: tuple[Cluster, TokenServer]) -> None:
    """The first to ask happens to put the broker on the node that will die."""
    where = NodeAffinitySchedulingStrategy(second_node(), soft=True)
    for _ in range(10):
        actor = ray.remote(Broker).options(**broker.ACTOR_OPTIONS, scheduling_strategy=where).remote(idle_s=600)
        if ray.get(actor.state.remote())["node"] == second_node():
            return
        ray.kill(actor)
    pytest.fail("the broker does not go where the test wants it")


@ray.remote(num_cpus=0.25)
def signed_in_a_task(spec: AccessSpec, href: str) -> tuple[str, int, bool]:
    with ThreadPoolExecutor(8) as pool:
        signed = set(pool.map(access_for(spec).sign, [href] * 8))
    assert len(signed) == 1
    return signed.pop(), access_for(spec).state()["process"], KEY in str(ray.get_runtime_context().runtime_env)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.usefixtures("broker_elsewhere")
def test_one_request_serves_all_processes_of_a_cluster(cluster: tuple[Cluster, TokenServer]) -> None:
    _, server = cluster
    server.asked.clear()
    server.latency_s = 0.5
    answers = ray.get([signed_in_a_task.remote(SPEC, HREF) for _ in range(16)])
    server.latency_s = 0.0
    access = access_for(SPEC)
    assert isinstance(access, ClusterAccess)
    assert {answer[0] for answer in answers} == {access.sign(HREF)}
    assert {answer[1] for answer in answers} == {access.state()["process"]}
    assert not any(answer[2] for answer in answers), "the key travelled in runtime_env"
    assert os.environ.get("PC_SDK_SUBSCRIPTION_KEY") is None, "this process has the key that it should not need"
    assert len(server.asked) == 1


@ray.remote(num_cpus=0.25, max_retries=0)
def killed_in_its_turn(spec: AccessSpec, url: str) -> None:
    with access_for(spec).turn(url):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("broker_elsewhere")
def test_the_turn_of_a_killed_process_is_given_back(cluster: tuple[Cluster, TokenServer]) -> None:
    spec = replace(SPEC, storage=replace(FREE, turns=1, lease_s=2.0))
    access = access_for(spec)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(killed_in_its_turn.remote(spec, "https://killed.example/x"))
    assert access.state()["hosts"]["killed.example"]["held"] == 1
    with access.turn("https://killed.example/x"):
        # Held for longer than a lease: what is alive keeps its turn.
        held_since = time.monotonic()
        until(lambda: time.monotonic() - held_since > 2.5)
        assert access.state()["hosts"]["killed.example"]["held"] == 1


@ray.remote(num_cpus=1)
def waits_for_its_turn(spec: AccessSpec, url: str, folder: str, number: int) -> int:
    (Path(folder) / str(number)).touch()
    with access_for(spec).turn(url):
        return number


@pytest.mark.slow
@pytest.mark.usefixtures("broker_elsewhere")
def test_tasks_that_wait_keep_their_cpus_so_that_no_more_are_started_to_wait(
    cluster: tuple[Cluster, TokenServer], tmp_path: Path
) -> None:
    url = "https://waiting.example/x"
    spec = replace(SPEC, storage=replace(FREE, turns=1))
    with access_for(spec).turn(url):
        tasks = [waits_for_its_turn.remote(spec, url, str(tmp_path), n) for n in range(6)]
        until(lambda: access_for(spec).state()["hosts"]["waiting.example"]["queued"] == 2)
        done, _ = ray.wait(tasks, timeout=3)
        assert done == []
        assert len(list(tmp_path.iterdir())) == 2, "the cluster has two CPUs"
    assert sorted(ray.get(tasks)) == list(range(6))


@pytest.mark.slow
@pytest.mark.usefixtures("broker_elsewhere")
def test_the_added_time_of_a_block_is_small(cluster: tuple[Cluster, TokenServer]) -> None:
    access = access_for(SPEC)
    access.sign(HREF)
    start = time.monotonic()
    for _ in range(200):
        with access.turn(HREF, requests=100):
            for _ in range(15):
                access.sign(HREF)
    added_ms = (time.monotonic() - start) / 200 * 1000
    logging.getLogger(__name__).warning("%.2f ms for each block", added_ms)
    assert added_ms < 50


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_broker_that_nobody_calls_ends_and_the_next_to_call_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**broker.ACTOR_OPTIONS, "name": "idle-broker"}
    monkeypatch.setattr(broker, "ACTOR_OPTIONS", options)
    monkeypatch.setattr(broker, "_IDLE_S", 1.0)
    access = ClusterAccess(SPEC)
    with access.turn("https://a.example/x"):
        first = access.state()["process"]

    def has_ended() -> bool:
        try:
            os.kill(first, 0)
        except ProcessLookupError:
            return True
        return False

    until(has_ended)
    with access.turn("https://a.example/x"):
        assert access.state()["process"] != first


@pytest.mark.slow
@pytest.mark.usefixtures("broker_elsewhere")
def test_the_death_of_the_brokers_node_is_survived_with_all_that_it_knew(cluster: tuple[Cluster, TokenServer]) -> None:
    nodes, server = cluster
    url, asked_to_wait = "https://survives.example/x", "https://waits.example/x"
    spec = replace(SPEC, storage=replace(FREE, turns=1, lease_s=3.0))
    access = access_for(spec)
    home = access.state()["node"]
    assert home == second_node(), "the broker is not where the test wants it"
    signed = access.sign(HREF)
    access.failed(asked_to_wait, status=429, retry_after_s=60)
    waiting: Future[None] = Future()

    def wait() -> None:
        with access.turn(url):
            waiting.set_result(None)

    with access.turn(url):
        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: access.state()["hosts"]["survives.example"]["queued"] == 1)
        node = next(n for n in nodes.worker_nodes if n.node_id == home)
        nodes.remove_node(node, allow_graceful=False)
        # Its processes end a little later than the node itself.
        until(lambda: access.state()["node"] != home, at_most_s=60)
        until(lambda: access.state()["hosts"].get("survives.example", {}).get("held") == 1)
        restarted = time.monotonic()
        until(lambda: time.monotonic() - restarted > 2)
        assert not waiting.done(), "two at a time, because the restarted broker forgot the first"
    waiting.result(timeout=30)
    thread.join()
    server.asked.clear()
    assert ray.get(signed_in_a_task.remote(SPEC, OTHER))[0].startswith(f"{OTHER}?se="), "it has the key there too"
    assert len(server.asked) == 1
    assert access.sign(HREF) == signed, "who has one goes on with it"
    assert access.state()["hosts"]["waits.example"]["paused_s"] > 1, "what a server asked for outlives the broker"
