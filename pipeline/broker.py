"""One broker for all processes of a cluster: who may ask an archive's servers now, and with which signatures.

The broker is an actor that keeps nothing which cannot be had again: tokens are asked for anew, turns that are held are
said again by their holders, and so are the pauses that servers asked for. It may die and come back on another node at
any time; its callers wait for it. One process alone has a broker of its own, in a thread.

The subscription key of an archive is read from the environment of the process that the broker is in, so it has to be
set on every node that may host it. It is in no argument, no pickle and no `runtime_env`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, reduce
from types import MappingProxyType
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from pipeline.access import Access, HostUnavailable, SigningRefused, host_of
from pipeline.archives import Signing
from pipeline.limits import Gate, HostLimits, is_trouble
from pipeline.signing import Container, Token, TokenError, container_of, fetch_token, signed_with, token_endpoint

ACTOR = "archive-broker"

# Detached: of several jobs on a cluster, and of the tasks of one, any may be the first to ask and the first to end.
ACTOR_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "name": ACTOR,
        "namespace": "twinlook",
        "get_if_exists": True,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 10_000,
    }
)

STORAGE_LIMITS = HostLimits()
"""For hosts with files, unless told otherwise: a block of 8 x 8 cells takes some 100 requests."""

API_LIMITS = HostLimits(rate_per_s=5.0, burst=10, turns=4)
"""For a STAC API and for where tokens are given, unless told otherwise."""

_POLL_S = 10.0
"""A call that waits in the broker comes back after this, so that a broker that died is noticed."""

_ANSWER_S = 60.0
_ABSENT_S = 900.0
_WISH_S = 60.0
_IDLE_S = 900.0
_BROKER_MARGIN_S = 300.0
_WORKER_MARGIN_S = 60.0
_YOUNG_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSpec:
    """How an archive may be reached: what travels to tasks, without any secret."""

    signing: Signing = "none"

    storage: HostLimits = STORAGE_LIMITS
    """For each host that files are read from."""

    api: HostLimits = API_LIMITS
    """For each of `api_hosts`, and for where tokens are given."""

    api_hosts: tuple[str, ...] = ()
    """Hosts of catalogs, as `host_of` gives them."""

    shared: bool = True
    """One broker for the whole Ray cluster, where there is one; else one in each process."""

    def limits_of(self, host: str) -> HostLimits:
        """What a host is asked for at most."""
        return self.api if host in self.api_hosts else self.storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A request for a turn at a host. Saying it again is how its holder stays in the queue."""

    ticket: str
    host: str
    requests: int
    limits: HostLimits

    job: str
    """Limits are those of the strictest job that was heard of in the last minute."""

    paused_s: Mapping[str, float] = field(default_factory=dict)
    """Host -> seconds that it asked this caller to wait, of which a restarted broker does not know."""


@dataclass(frozen=True, slots=True)
class Away:
    """A host does not answer, and why waiting has ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """No token is given, and why."""

    reason: str


@dataclass(slots=True)
class _Host:
    gate: Gate
    wishes: dict[str, tuple[HostLimits, float]] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class Broker:
    """Runs in one event loop; every method can be called again with the same arguments without harm."""

    def __init__(self, *, idle_s: float | None = None) -> None:
        """With `idle_s`, an actor ends itself when nobody has called for so long."""
        self._hosts: dict[str, _Host] = {}
        self._waiting: dict[str, asyncio.Future[Away | None]] = {}
        self._tokens: dict[Container, Token] = {}
        self._fetching: dict[Container, asyncio.Task[Token | Away | Refused]] = {}
        self._token_requests = 0
        self._numbers = itertools.count()
        self._idle_s = idle_s
        self._called_at = time.monotonic()
        self._first_called_at: float | None = None
        self._is_heir = idle_s is not None and ray.get_runtime_context().was_current_actor_reconstructed
        self._watch: asyncio.Task[None] | None = None

    async def enter(self, turn: Turn) -> bool | Away:
        """Wait for a turn: True when it has come, False to ask again, or why it will not come."""
        self._called()
        for host, seconds in turn.paused_s.items():
            self._host(host, turn.limits, turn.job).gate.pause(time.monotonic() + seconds)
        return await self._enter(turn)

    async def leave(self, host: str, ticket: str, answered: bool) -> None:
        """A turn is over; `answered`: the host gave its answers."""
        if (known := self._hosts.get(host)) is not None:
            known.gate.leave(ticket, answered=answered, now=time.monotonic())
            self._settle(host)

    async def failed(self, host: str, limits: HostLimits, job: str, status: int | None, wait_s: float | None) -> None:
        """A request failed; see `Access.failed`."""
        self._host(host, limits, job).gate.failed(status=status, wait_s=wait_s, now=time.monotonic())
        self._settle(host)

    async def beat(self, held: Mapping[str, tuple[str, HostLimits]], job: str) -> None:
        """The holder of these turns (ticket -> host, its limits) is alive."""
        self._called()
        now = time.monotonic()
        for ticket, (host, limits) in held.items():
            self._host(host, limits, job).gate.hold(ticket, now=now)

    async def token(
        self, container: Container, limits: HostLimits, job: str, refused: str
    ) -> Token | Away | Refused | None:
        """A token that lasts for a while; None to ask again.

        Args:
            container: What it is for.
            limits: Of the host that gives tokens.
            job: Who asks.
            refused: Digest of a token that the storage did not accept, or nothing.
        """
        self._called()
        now = datetime.now(UTC)
        known = self._tokens.get(container)
        if known is not None and known.lasts(_BROKER_MARGIN_S, now=now):
            age_s = (now - known.asked).total_seconds()
            # A blob that is refused with every token must not make us ask for tokens without end.
            if known.digest != refused or age_s < min(_YOUNG_S, known.lifetime_s / 4):
                return known
        # However many ask, one request is under way.
        if container not in self._fetching:
            self._fetching[container] = asyncio.create_task(self._fetch(container, limits, job))
        task = self._fetching[container]
        done, _ = await asyncio.wait({task}, timeout=_POLL_S)
        return task.result() if done else None

    async def state(self) -> dict[str, Any]:
        """What is going on, for people and tests."""
        now = time.monotonic()
        return {
            "node": ray.get_runtime_context().get_node_id() if self._idle_s is not None else "",
            "process": os.getpid(),
            "tokens": len(self._tokens),
            "token_requests": self._token_requests,
            "hosts": {
                name: {
                    "held": len(host.gate.held),
                    "queued": len(host.gate.queued),
                    "breaker": host.gate.breaker.state(now),
                    "paused_s": round(host.gate.paused_s(now), 3),
                    "requests": host.gate.requests,
                    "rate_per_s": host.gate.limits.rate_per_s,
                }
                for name, host in self._hosts.items()
            },
        }

    async def _enter(self, turn: Turn) -> bool | Away:
        gate = self._host(turn.host, turn.limits, turn.job).gate
        gate.queue(turn.ticket, requests=turn.requests, now=time.monotonic())
        if turn.ticket in gate.held:
            return True
        waiting = self._waiting.setdefault(turn.ticket, asyncio.get_running_loop().create_future())
        self._settle(turn.host)
        done, _ = await asyncio.wait({waiting}, timeout=min(_POLL_S, turn.limits.lease_s / 3))
        self._waiting.pop(turn.ticket, None)
        return (waiting.result() or True) if done else False

    async def _fetch(self, container: Container, limits: HostLimits, job: str) -> Token | Away | Refused:
        """Ask until there is a token, at the pace that the host and its limits allow."""
        host = host_of(token_endpoint()) or "tokens"
        delay_s = 1.0
        try:
            while True:
                ticket = f"token-{next(self._numbers)}"
                turn = Turn(ticket=ticket, host=host, requests=1, limits=limits, job=job)
                while not (entered := await self._enter(turn)):
                    pass
                if isinstance(entered, Away):
                    known = self._tokens.get(container)
                    return known if known is not None and known.expires > datetime.now(UTC) else entered
                self._token_requests += 1
                try:
                    token = await asyncio.to_thread(fetch_token, container)
                except TokenError as error:
                    await self.failed(host, limits, job, error.status, error.retry_after_s)
                    await self.leave(host, ticket, answered=not is_trouble(error.status))
                    if not is_trouble(error.status):
                        return Refused(str(error))
                    if error.retry_after_s is None:
                        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
                        delay_s = min(2 * delay_s, 30.0)
                else:
                    await self.leave(host, ticket, answered=True)
                    self._tokens[container] = token
                    return token
        finally:
            del self._fetching[container]

    def _host(self, host: str, limits: HostLimits, job: str) -> _Host:
        """What is known of a host, under the strictest limits of the jobs that are there."""
        now = time.monotonic()
        known = self._hosts.get(host)
        if known is None:
            known = self._hosts[host] = _Host(Gate(limits, now=now))
            if self._is_heir:
                # Who held a turn when the last broker died says so within a third of a lease; they come first.
                self._first_called_at = self._first_called_at or now
                known.gate.pause(self._first_called_at + limits.lease_s / 2)
        known.wishes[job] = (limits, now)
        known.wishes = {who: wish for who, wish in known.wishes.items() if wish[1] > now - _WISH_S}
        known.gate.limits = reduce(HostLimits.stricter, (wish for wish, _ in known.wishes.values()))
        return known

    def _settle(self, host: str) -> None:
        """Let in whose turn it is, and look again when time alone will have changed something."""
        known = self._hosts[host]
        now = time.monotonic()
        for ticket in known.gate.admit(now=now):
            self._tell(ticket, None)
        if known.gate.queued and (reason := known.gate.away(now)):
            for ticket in known.gate.queued:
                known.gate.leave(ticket, answered=False, now=now)
                self._tell(ticket, Away(reason))
        if known.timer is not None:
            known.timer.cancel()
            known.timer = None
        if known.gate.queued:
            wait_s = known.gate.look_again_at() - now
            known.timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._settle, host)

    def _tell(self, ticket: str, news: Away | None) -> None:
        waiting = self._waiting.get(ticket)
        if waiting is not None and not waiting.done():
            waiting.set_result(news)

    def _called(self) -> None:
        self._called_at = time.monotonic()
        if self._idle_s is not None and self._watch is None:
            self._watch = asyncio.create_task(self._end_when_idle(self._idle_s))

    async def _end_when_idle(self, idle_s: float) -> None:
        while (left_s := self._called_at + idle_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class Connection(Protocol):
    """A way to call a broker's methods."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call and wait for the answer; every method bears being called twice.

        Raises:
            HostUnavailable: There is no broker to be had.
        """

    def tell(self, method: str, *arguments: Any) -> None:
        """Call and do not wait."""


class ActorConnection:
    """The broker of the Ray cluster; started where there is none, found again where it died."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._lock = threading.Lock()

    def call(self, method: str, *arguments: Any) -> Any:
        """See `Connection`."""
        give_up_at = time.monotonic() + _ABSENT_S
        while True:
            try:
                # Not `ray.get`, which would lend this task's CPU to another task for as long as it waits here: with a
                # host that pauses, task after task would be started only to wait.
                return getattr(self._found(), method).remote(*arguments).future().result(timeout=_ANSWER_S)
            except (RayActorError, TimeoutError) as error:
                self._actor = None
                if time.monotonic() > give_up_at:
                    message = f"the broker of requests to archives has not answered for {_ABSENT_S:.0f} s"
                    raise HostUnavailable(message) from error
                time.sleep(0.2)

    def tell(self, method: str, *arguments: Any) -> None:
        """See `Connection`."""
        getattr(self._found(), method).remote(*arguments)

    def _found(self) -> Any:
        with self._lock:
            if not ray.is_initialized():
                # Asking would start another cluster.
                raise HostUnavailable("the cluster with the broker of requests to archives was shut down")
            if self._actor is None:
                self._actor = ray.remote(Broker).options(**ACTOR_OPTIONS).remote(idle_s=_IDLE_S)
            return self._actor


class ThreadConnection:
    """A broker of this process, in a thread of its own."""

    def __init__(self) -> None:
        self._broker = Broker()
        self._over = asyncio.Event()
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name=ACTOR, daemon=True)
        self._thread.start()
        self._loop = started.result()

    def call(self, method: str, *arguments: Any) -> Any:
        """See `Connection`."""
        return self._start(method, *arguments).result()

    def tell(self, method: str, *arguments: Any) -> None:
        """See `Connection`."""
        self._start(method, *arguments)

    def close(self) -> None:
        """End the thread; calls that still wait are cancelled."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _serve(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        started.set_result(asyncio.get_running_loop())
        await self._over.wait()

    def _start(self, method: str, *arguments: Any) -> Future[Any]:
        coroutine: Coroutine[Any, Any, Any] = getattr(self._broker, method)(*arguments)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


class BrokeredAccess:
    """Access through a broker; for all threads of a process. Per block: one call that waits, one that does not."""

    def __init__(self, spec: AccessSpec, connection: Connection, *, job: str) -> None:
        self._spec = spec
        self._connection = connection
        self._job = job
        self._name = f"{os.getpid()}-{random.getrandbits(64):016x}"
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._tokens: dict[Container, Token] = {}
        self._token_locks: dict[Container, threading.Lock] = {}
        self._refused: dict[Container, str] = {}
        self._held: dict[str, tuple[str, HostLimits]] = {}
        self._paused_until: dict[str, float] = {}
        self._beating = False

    def sign(self, href: str) -> str:
        """See `Access`."""
        container = container_of(href) if self._spec.signing == "planetary-computer" else None
        return href if container is None else signed_with(href, self._token(container))

    @contextmanager
    def turn(self, url: str, *, requests: int = 1) -> Iterator[None]:
        """See `Access`."""
        host = host_of(url)
        if host is None:
            yield
            return
        ticket = f"{self._name}-{next(self._numbers)}"
        limits = self._spec.limits_of(host)
        self._enter(ticket, host, limits, requests)
        answered = False
        try:
            yield
            answered = True
        finally:
            with self._lock:
                del self._held[ticket]
            self._connection.tell("leave", host, ticket, answered)

    def failed(self, url: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        """See `Access`."""
        host = host_of(url)
        if host is None:
            return
        container = container_of(url)
        if status == 403 and container in self._tokens:
            self._refused[container] = self._tokens[container].digest
        if retry_after_s is not None:
            until = time.monotonic() + retry_after_s
            self._paused_until[host] = max(until, self._paused_until.get(host, until))
        if is_trouble(status) or retry_after_s is not None:
            # Waited for: what this thread asks next must come after it.
            self._connection.call("failed", host, self._spec.limits_of(host), self._job, status, retry_after_s)

    def state(self) -> dict[str, Any]:
        """What the broker is doing, for people and tests."""
        return dict(self._connection.call("state"))

    def _enter(self, ticket: str, host: str, limits: HostLimits, requests: int) -> None:
        while True:
            now = time.monotonic()
            paused_s = {name: until - now for name, until in [*self._paused_until.items()] if until > now}
            turn = Turn(ticket=ticket, host=host, requests=requests, limits=limits, job=self._job, paused_s=paused_s)
            answer = self._connection.call("enter", turn)
            if isinstance(answer, Away):
                raise HostUnavailable(f"{host}: {answer.reason}")
            if answer:
                break
        with self._lock:
            self._held[ticket] = (host, limits)
            if not self._beating:
                self._beating = True
                threading.Thread(target=self._beat, name=f"{ACTOR} beat", daemon=True).start()

    def _beat(self) -> None:
        """Say again and again which turns are held, until there are none for a while."""
        quiet = 0
        while quiet < 3:
            time.sleep(min(self._spec.storage.lease_s, self._spec.api.lease_s) / 3)
            with self._lock:
                held = dict(self._held)
                quiet = 0 if held else quiet + 1
                self._beating = quiet < 3
            if held:
                try:
                    self._connection.call("beat", held, self._job)
                except Exception:  # noqa: BLE001  # the cluster was shut down under us; the turns end with it
                    self._beating = False
                    return

    def _token(self, container: Container) -> Token:
        with self._lock:
            lock = self._token_locks.setdefault(container, threading.Lock())
        with lock:
            known = self._tokens.get(container)
            refused = self._refused.get(container, "")
            if known is not None and known.digest != refused and known.lasts(_WORKER_MARGIN_S, now=datetime.now(UTC)):
                return known
            while (answer := self._connection.call("token", container, self._spec.api, self._job, refused)) is None:
                pass
            if isinstance(answer, Refused):
                raise SigningRefused(answer.reason)
            if isinstance(answer, Away):
                raise HostUnavailable(f"{host_of(token_endpoint())}: {answer.reason}")
            assert isinstance(answer, Token), type(answer)
            self._tokens[container] = answer
            self._refused.pop(container, None)
            return answer


class ClusterAccess(BrokeredAccess):
    """Access through the one broker of the Ray cluster that this process belongs to."""

    def __init__(self, spec: AccessSpec) -> None:
        super().__init__(spec, ActorConnection(), job=ray.get_runtime_context().get_job_id())


class ProcessAccess(BrokeredAccess):
    """Access through a broker of this process; the same limits, but each process has them for itself."""

    def __init__(self, spec: AccessSpec, connection: ThreadConnection | None = None) -> None:
        super().__init__(spec, connection or _own_broker(os.getpid()), job="here")


def access_for(spec: AccessSpec) -> Access:
    """How this process reaches an archive; one for each spec and process."""
    if spec.shared and ray.is_initialized():
        context = ray.get_runtime_context()
        return _cluster_access(spec, context.gcs_address, context.get_job_id(), os.getpid())
    return _process_access(spec, os.getpid())


@lru_cache(maxsize=16)
def _cluster_access(spec: AccessSpec, cluster: str, job: str, process: int) -> ClusterAccess:
    return ClusterAccess(spec)


@lru_cache(maxsize=16)
def _process_access(spec: AccessSpec, process: int) -> ProcessAccess:
    return ProcessAccess(spec)


@lru_cache(maxsize=1)
def _own_broker(process: int) -> ThreadConnection:
    return ThreadConnection()
