"""What may happen to the processes of a cluster that runs, each a named object.

``strike`` waits until its victim is up: an earlier fault may have just hit it. It returns when the
fault has happened. A process that is paused for a while has resumed by then; the cluster must
replace one that is dead or hangs for good.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Protocol

import psutil
import redis

from core.types import Pool, WorkerRecord, WorkerState
from tests.support.live_cluster import (
    CONTROLLER,
    ENGINE,
    GCS,
    REPLICAS,
    ROUTER,
    STOP_S,
    STORE,
    LiveCluster,
    Part,
)
from tests.support.tcp_faults import End, cut, ends, silence
from tests.support.waiting import let_pass

_STORE_IS_AWAY = "running requests go on"  # as the launcher says it
_STORE_STARTED = "the embedded Valkey had ended and was started again"
_STORE_IS_BACK = "the registry answers again"
_ENDS_S = 30.0  # for the kernel to end a process that was killed
_NOTICED_S = 30.0
_READY_S = 90.0


class Fault(Protocol):
    """A frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def strike(self, cluster: LiveCluster) -> None:
        """Happen."""


def title(fault: Fault) -> str:
    """For the name of a test."""
    return " ".join([type(fault).__name__, *(str(part) for part in astuple(fault))])


@dataclass(frozen=True, slots=True)
class KillWorker:
    """kill -9 of the process of the pool's busiest worker."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        _kill(busiest(cluster, self.pool).replica.pid)


@dataclass(frozen=True, slots=True)
class StopWorker:
    """The process of the pool's busiest worker hangs for good: its lease ends, no connection
    does."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        os.kill(busiest(cluster, self.pool).replica.pid, signal.SIGSTOP)


@dataclass(frozen=True, slots=True)
class StallWorker:
    """As ``StopWorker``, but it goes on when its lease has ended: its work is somebody else's."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        victim = busiest(cluster, self.pool)
        os.kill(victim.replica.pid, signal.SIGSTOP)
        try:
            _wait_until_gone(cluster, victim.worker)
        finally:
            os.kill(victim.replica.pid, signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class KillEngine:
    """kill -9 of the engine core of the pool's busiest worker."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        replica = busiest(cluster, self.pool).replica
        _kill(cluster.engine_of(replica).pid)


@dataclass(frozen=True, slots=True)
class StopEngine:
    """The engine core of the pool's busiest worker hangs: its worker renews its lease, and no
    connection ends."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        replica = busiest(cluster, self.pool).replica
        os.kill(cluster.engine_of(replica).pid, signal.SIGSTOP)


@dataclass(frozen=True, slots=True)
class CutWorker:
    """All connections end that the pool's busiest worker has with others: the router, the store,
    the other pool. The processes go on."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        cut(_connections(cluster, busiest(cluster, self.pool).replica))


@dataclass(frozen=True, slots=True)
class SilenceWorker:
    """Nothing arrives over these connections for a while, and nobody is told. For a moment: all
    comes late. For longer than ``connection_silence_s``: they are half-open."""

    pool: Pool
    seconds: float

    def strike(self, cluster: LiveCluster) -> None:
        with silence(_connections(cluster, busiest(cluster, self.pool).replica)):
            let_pass(self.seconds)


@dataclass(frozen=True, slots=True)
class JumpClock:
    """The store's clock jumps far ahead: what expires has expired, all leases among it. No other
    process of ours looks at a clock that can jump."""

    def strike(self, cluster: LiveCluster) -> None:
        _store(cluster)
        with redis.Redis.from_url(cluster.state.redis_url) as store:
            for key in store.scan_iter():
                if store.pttl(key) > 0:
                    store.delete(key)


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """``baton drain`` of the pool's busiest worker, to its end."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        done = cluster.cli("drain", busiest(cluster, self.pool).worker.id)
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True, slots=True)
class KillRouter:
    """kill -9 of the router."""

    def strike(self, cluster: LiveCluster) -> None:
        _kill(_running(cluster, ROUTER))


@dataclass(frozen=True, slots=True)
class RestartRouter:
    """The router ends in good order, after its streams, and another one starts."""

    def strike(self, cluster: LiveCluster) -> None:
        (router,) = cluster.parts(ROUTER)
        cluster.scale_router(0)
        cluster.wait(lambda: router not in cluster.parts(ROUTER), "the router ends", STOP_S)
        cluster.scale_router(1)


@dataclass(frozen=True, slots=True)
class KillStore:
    """kill -9 of the registry's store: all leases are lost. Returns when the launcher has started
    another one, because a fault that hits it sooner is a failed start and nothing else."""

    def strike(self, cluster: LiveCluster) -> None:
        started = cluster.log.read_text().count(_STORE_STARTED)
        _kill(_store(cluster))
        cluster.wait(
            lambda: cluster.log.read_text().count(_STORE_STARTED) > started,
            "the launcher starts another store",
            _NOTICED_S,
        )


@dataclass(frozen=True, slots=True)
class StopStore:
    """The registry's store hangs until the launcher has noticed, and goes on."""

    def strike(self, cluster: LiveCluster) -> None:
        store = _store(cluster)
        noticed = cluster.log.read_text().count(_STORE_IS_AWAY)
        os.kill(store, signal.SIGSTOP)
        try:
            cluster.wait(
                lambda: cluster.log.read_text().count(_STORE_IS_AWAY) > noticed,
                "the launcher misses the store",
                _NOTICED_S,
            )
        finally:
            os.kill(store, signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class KillController:
    """kill -9 of Ray Serve's controller, which watches and replaces the workers."""

    def strike(self, cluster: LiveCluster) -> None:
        _kill(_running(cluster, CONTROLLER))


@dataclass(frozen=True, slots=True)
class KillGcs:
    """kill -9 of Ray's own head process. The cluster goes down, and lets its streams end."""

    def strike(self, cluster: LiveCluster) -> None:
        _kill(_running(cluster, GCS))


@dataclass(frozen=True, slots=True)
class FullLogDisk:
    """No process of ours can write to a file, just when a worker's death gives them much to log.

    By a limit on the size of files: the error is EFBIG in place of ENOSPC.
    """

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        victim = busiest(cluster, self.pool)
        parts = [part for kind in (ROUTER, *REPLICAS.values()) for part in cluster.parts(kind)]
        pids = [part.pid for part in parts if part != victim.replica]
        before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
        for pid, (_soft, hard) in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        try:
            _kill(victim.replica.pid)
            _wait_until_gone(cluster, victim.worker)
        finally:
            for pid, limits in before.items():
                with suppress(ProcessLookupError):  # it was about to end
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@dataclass(frozen=True, slots=True)
class Victim:
    worker: WorkerRecord
    replica: Part


def busiest(cluster: LiveCluster, pool: Pool) -> Victim:
    """The ready worker of ``pool`` that runs most. Waits for one, should none be there now."""
    found: list[Victim] = []

    def look() -> bool:
        ready = [each for each in cluster.workers(pool) if each.state is WorkerState.READY]
        for worker in sorted(ready, key=lambda each: -each.load.running):
            replica = cluster.replica_of(worker)
            if replica is not None and _is_up(replica.pid):
                found.append(Victim(worker, replica))
                return True
        return False

    cluster.wait(look, f"a {pool} worker is ready", _READY_S)
    return found[0]


def _connections(cluster: LiveCluster, replica: Part) -> list[End]:
    """Both ends of those that a worker has with other processes of ours."""
    mine = [replica.pid]
    if cluster.has_engines:
        mine.append(cluster.engine_of(replica).pid)
    kinds = (ROUTER, STORE, ENGINE, *REPLICAS.values())
    others = [part.pid for kind in kinds for part in cluster.parts(kind) if part.pid not in mine]
    theirs = {(end.port, end.peer_port): end for pid in others for end in ends(pid)}
    found = []
    for end in (end for pid in mine for end in ends(pid)):
        if (other := theirs.get((end.peer_port, end.port))) is not None:
            found += [end, other]
    assert found, "the worker has no connections"
    return found


def _kill(pid: int) -> None:
    """End a process at once; returns when the kernel has ended it."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        end = select.poll()
        end.register(descriptor, select.POLLIN)
        assert end.poll(_ENDS_S * 1000), f"process {pid} survives SIGKILL"
    finally:
        os.close(descriptor)


def _is_up(pid: int) -> bool:
    """Whether no earlier fault has ended the process, or stopped it for good."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_STOPPED)
    return False


def _running(cluster: LiveCluster, kind: str) -> int:
    """The process of ``kind``. Waits for the next one if none is alive."""
    parts: list[int] = []

    def there() -> bool:
        parts[:] = [part.pid for part in cluster.parts(kind)]
        return bool(parts)

    cluster.wait(there, f"{kind} runs")
    return parts[0]


def _store(cluster: LiveCluster) -> int:
    """The process of the store. Waits until the store answers and the launcher knows it does."""

    def answers() -> bool:
        log = cluster.log.read_text()
        if log.count(_STORE_IS_AWAY) > log.count(_STORE_IS_BACK):
            return False
        with suppress(redis.RedisError), redis.Redis.from_url(cluster.state.redis_url) as store:
            return bool(store.ping())
        return False

    cluster.wait(answers, "the store answers")
    return _running(cluster, STORE)


def _wait_until_gone(cluster: LiveCluster, worker: WorkerRecord) -> None:
    def gone() -> bool:
        workers = cluster.workers()
        return bool(workers) and worker.id not in {each.id for each in workers}

    cluster.wait(gone, f"the lease of {worker.id} ends", _NOTICED_S)
