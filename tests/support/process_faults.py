"""Causes faults in a running cluster. Each kind of fault is a frozen dataclass.

``strike`` first waits until its victim runs, because an earlier fault may just have hit the same
process. A fault that only pauses something ends before ``strike`` returns. If a process is dead or
hangs for good, the cluster must replace it.
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
    ClusterProcess,
    LiveCluster,
)
from tests.support.tcp_faults import End, cut, ends, silence
from tests.support.waiting import let_pass

# Words of the launcher's log.
_STORE_IS_AWAY = "running requests go on"
_STORE_STARTED = "the embedded Valkey had ended and was started again"
_STORE_IS_BACK = "the registry answers again"
_END_S = 30.0  # for the kernel to end a killed process
_NOTICE_S = 30.0  # for the cluster to notice a fault
_READY_S = 90.0  # for another worker to be ready


class Fault(Protocol):
    """A fault. Implementations are frozen dataclasses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def strike(self, cluster: LiveCluster) -> None:
        """Cause the fault."""


def title(fault: Fault) -> str:
    """Return the name of a fault with its parameters, for test ids and logs."""
    return " ".join([type(fault).__name__, *(str(value) for value in astuple(fault))])


@dataclass(frozen=True, slots=True)
class KillWorker:
    """The process of the pool's busiest worker is killed with kill -9."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        _kill(busiest(cluster, self.pool).replica.pid)


@dataclass(frozen=True, slots=True)
class StopWorker:
    """The process of the pool's busiest worker hangs for good. The worker's lease ends, but its
    connections stay open."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        os.kill(busiest(cluster, self.pool).replica.pid, signal.SIGSTOP)


@dataclass(frozen=True, slots=True)
class StallWorker:
    """As ``StopWorker``, but the process resumes when the worker's lease has ended. At that time,
    no router has moved the worker's requests to another worker yet."""

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
    """The engine core of the pool's busiest worker is killed with kill -9."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        replica = busiest(cluster, self.pool).replica
        _kill(cluster.engine_of(replica).pid)


@dataclass(frozen=True, slots=True)
class StopEngine:
    """The engine core of the pool's busiest worker hangs. The worker still renews its lease, and
    all connections stay open."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        replica = busiest(cluster, self.pool).replica
        os.kill(cluster.engine_of(replica).pid, signal.SIGSTOP)


@dataclass(frozen=True, slots=True)
class CutWorker:
    """All connections of the pool's busiest worker to the router, the store and the other pool are
    cut. The processes keep running."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        cut(_connections(cluster, busiest(cluster, self.pool).replica))


@dataclass(frozen=True, slots=True)
class SilenceWorker:
    """The connections that ``CutWorker`` cuts stay open, but no data arrives for ``seconds``.

    If ``seconds`` is less than ``connection_silence_s``, data only arrives late. If ``seconds`` is
    more, the connections count as broken.
    """

    pool: Pool
    seconds: float

    def strike(self, cluster: LiveCluster) -> None:
        with silence(_connections(cluster, busiest(cluster, self.pool).replica)):
            let_pass(self.seconds)


@dataclass(frozen=True, slots=True)
class JumpClock:
    """All keys that have an expiry are deleted, as if the store's clock had jumped far ahead. This
    ends all leases. Baton's own processes read no clock that can jump."""

    def strike(self, cluster: LiveCluster) -> None:
        _store_pid(cluster)
        with redis.Redis.from_url(_store_url(cluster)) as store:
            for key in store.scan_iter():
                if store.pttl(key) > 0:
                    store.delete(key)


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """``baton drain`` drains the pool's busiest worker."""

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        done = cluster.cli("drain", busiest(cluster, self.pool).worker.id)
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True, slots=True)
class KillRouter:
    """The router is killed with kill -9."""

    def strike(self, cluster: LiveCluster) -> None:
        _kill(_pid_of(cluster, ROUTER))


@dataclass(frozen=True, slots=True)
class RestartRouter:
    """The router lets its streams end and shuts down. Then another router starts."""

    def strike(self, cluster: LiveCluster) -> None:
        (router,) = cluster.processes(ROUTER)
        cluster.scale_router(0)
        cluster.wait(lambda: router not in cluster.processes(ROUTER), "the router ends", STOP_S)
        cluster.scale_router(1)


@dataclass(frozen=True, slots=True)
class KillStore:
    """The registry's store is killed with kill -9, and all leases are lost. ``strike`` returns when
    the launcher has started another store. If the next fault came earlier, it would only prevent
    this start."""

    def strike(self, cluster: LiveCluster) -> None:
        started = cluster.log.read_text().count(_STORE_STARTED)
        _kill(_store_pid(cluster))
        cluster.wait(
            lambda: cluster.log.read_text().count(_STORE_STARTED) > started,
            "the launcher has started another store",
            _NOTICE_S,
        )


@dataclass(frozen=True, slots=True)
class StopStore:
    """The registry's store hangs. It resumes when the launcher has noticed that it hangs."""

    def strike(self, cluster: LiveCluster) -> None:
        store = _store_pid(cluster)
        noticed = cluster.log.read_text().count(_STORE_IS_AWAY)
        os.kill(store, signal.SIGSTOP)
        try:
            cluster.wait(
                lambda: cluster.log.read_text().count(_STORE_IS_AWAY) > noticed,
                "the launcher has noticed that the store hangs",
                _NOTICE_S,
            )
        finally:
            os.kill(store, signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class KillController:
    """Ray Serve's controller, which watches and replaces the workers, is killed with kill -9."""

    def strike(self, cluster: LiveCluster) -> None:
        _kill(_pid_of(cluster, CONTROLLER))


@dataclass(frozen=True, slots=True)
class KillGcs:
    """Ray's control service (GCS) is killed with kill -9. The cluster lets its streams end and then
    shuts down."""

    def strike(self, cluster: LiveCluster) -> None:
        _kill(_pid_of(cluster, GCS))


@dataclass(frozen=True, slots=True)
class FullLogDisk:
    """The pool's busiest worker is killed while the other workers and the router cannot write logs.

    A limit on the size of files simulates the full disk, so the error is EFBIG instead of ENOSPC.
    """

    pool: Pool

    def strike(self, cluster: LiveCluster) -> None:
        victim = busiest(cluster, self.pool)
        others = [
            process for kind in (ROUTER, *REPLICAS.values()) for process in cluster.processes(kind)
        ]
        pids = [process.pid for process in others if process != victim.replica]
        before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
        for pid, (_soft, hard) in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        try:
            _kill(victim.replica.pid)
            _wait_until_gone(cluster, victim.worker)
        finally:
            for pid, limits in before.items():
                with suppress(ProcessLookupError):  # the process has ended
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@dataclass(frozen=True, slots=True)
class Victim:
    """A worker and its process."""

    worker: WorkerRecord
    replica: ClusterProcess


def busiest(cluster: LiveCluster, pool: Pool) -> Victim:
    """Return the ready worker of ``pool`` that runs the most requests. Waits until one is ready."""
    found: list[Victim] = []

    def is_found() -> bool:
        ready = [each for each in cluster.workers(pool) if each.state is WorkerState.READY]
        for worker in sorted(ready, key=lambda each: -each.load.running):
            replica = cluster.replica_of(worker)
            if replica is not None and _is_up(replica.pid):
                found.append(Victim(worker, replica))
                return True
        return False

    cluster.wait(is_found, f"a {pool} worker is ready", _READY_S)
    return found[0]


def _connections(cluster: LiveCluster, replica: ClusterProcess) -> list[End]:
    """Return both ends of a worker's connections to the router, the store and other workers."""
    mine = [replica.pid]
    if cluster.has_engines:
        mine.append(cluster.engine_of(replica).pid)
    kinds = (ROUTER, STORE, ENGINE, *REPLICAS.values())
    others = [
        process.pid
        for kind in kinds
        for process in cluster.processes(kind)
        if process.pid not in mine
    ]
    theirs = {(end.port, end.peer_port): end for pid in others for end in ends(pid)}
    found = []
    for end in (end for pid in mine for end in ends(pid)):
        if (other := theirs.get((end.peer_port, end.port))) is not None:
            found += [end, other]
    assert found, "the worker has no connections"
    return found


def _kill(pid: int) -> None:
    """Kill a process. Return when the kernel has ended it."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(_END_S * 1000), f"process {pid} survives SIGKILL"
    finally:
        os.close(descriptor)


def _is_up(pid: int) -> bool:
    """Whether the process lives and no earlier fault has stopped it for good."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_STOPPED)
    return False


def _pid_of(cluster: LiveCluster, kind: str) -> int:
    """Return the pid of the process of ``kind``. Waits until one is alive."""
    pids: list[int] = []

    def is_there() -> bool:
        pids[:] = [process.pid for process in cluster.processes(kind)]
        return bool(pids)

    cluster.wait(is_there, f"{kind} runs")
    return pids[0]


def _store_pid(cluster: LiveCluster) -> int:
    """Return the store's pid. Waits until the store answers and the launcher has noticed this."""

    def answers() -> bool:
        log = cluster.log.read_text()
        if log.count(_STORE_IS_AWAY) > log.count(_STORE_IS_BACK):
            return False
        with suppress(redis.RedisError), redis.Redis.from_url(_store_url(cluster)) as store:
            return bool(store.ping())
        return False

    cluster.wait(answers, "the store answers")
    return _pid_of(cluster, STORE)


def _store_url(cluster: LiveCluster) -> str:
    store = cluster.state.store
    assert store is not None, "a ready cluster has a store"
    return store.url


def _wait_until_gone(cluster: LiveCluster, worker: WorkerRecord) -> None:
    def is_gone() -> bool:
        workers = cluster.workers()
        return bool(workers) and worker.id not in {each.id for each in workers}

    cluster.wait(is_gone, f"the lease of {worker.id} has ended", _NOTICE_S)
