"""The live workers: snapshots of the registry, and one channel to each worker process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from core.rpc.credentials import ClusterCredentials
from core.types import Pool, RegistrySnapshot, WorkerKey, WorkerRecord, WorkerState
from router.workers.client import WorkerClient

logger = logging.getLogger(__name__)


class WorkerList(Protocol):
    """The part of the registry that the router reads."""

    async def snapshot(self) -> RegistrySnapshot: ...


@dataclass(frozen=True, slots=True)
class WorkersSettings:
    poll_s: float  # time between two reads of the registry
    poll_timeout_s: float  # a read that takes longer counts as failed
    lost_after_s: float  # a worker that is missing for this long may be lost
    connect_timeout_s: float
    max_message_bytes: int
    connection_silence_s: float  # a connection silent for this long counts as broken
    credentials: ClusterCredentials | None = None  # see ``WorkerClient``


@dataclass(slots=True)
class _Connection:
    client: WorkerClient
    users: int = 0
    # ``on_lost`` of each user, see ``Workers.connection``.
    watchers: set[Callable[[], None]] = field(default_factory=set)


class Workers:
    """Polls the registry, and owns the channels to the workers in it.

    If the registry fails, the last snapshot stays. A restarted store does not know a worker until
    the worker renews its lease. After a possible restart, missing workers therefore stay in the
    snapshot for ``lost_after_s``. A channel is closed when its worker has left the snapshot and
    nothing uses the channel.

    Args:
        clock: monotonic time, seconds.
        on_snapshot: called after each successful read.
        connect: creates the client for one worker process.
    """

    def __init__(
        self,
        registry: WorkerList,
        settings: WorkersSettings,
        clock: Callable[[], float],
        on_snapshot: Callable[[tuple[WorkerRecord, ...]], None],
        connect: Callable[[WorkerRecord], WorkerClient] | None = None,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._on_snapshot = on_snapshot
        self._connect = connect or self._connect_grpc
        self._connections: dict[WorkerKey, _Connection] = {}
        self._missing_since_s: dict[WorkerKey, float] = {}
        self._registry_failed = False
        self._refilling_since_s: float | None = None  # since a possible restart of the store
        self._plans_missing_since_s: float | None = None
        self.snapshot: tuple[WorkerRecord, ...] = ()
        # Pools for which the autoscaler may start workers; see ``RegistrySnapshot``.
        self.coming: frozenset[Pool] = frozenset()

    @property
    def lost_after_s(self) -> float:
        """How long a worker must be missing from the registry before it may be lost."""
        return self._settings.lost_after_s

    @property
    def open_channels(self) -> int:
        return len(self._connections)

    async def poll(self) -> None:
        """Read the registry again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.poll_s)
            await self.refresh()

    async def close(self) -> None:
        """Close all channels. Idempotent."""
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.client.close()

    async def refresh(self) -> None:
        """Read the registry once. A failure is logged and leaves the snapshot as it is."""
        try:
            async with asyncio.timeout(self._settings.poll_timeout_s):
                read = await self._registry.snapshot()
        except Exception as err:  # noqa: BLE001 - routing goes on, whichever error the store raises
            if not self._registry_failed:
                logger.warning("registry failed; routing uses the last snapshot: %r", err)
            self._registry_failed = True
            # While the registry cannot be read, it is unknown which workers are missing.
            self._missing_since_s.clear()
            return
        if self._registry_failed:
            logger.warning("registry works again")
        present = read.workers
        self._note_plans(read)
        returning = self._returning(present)
        self._registry_failed = False
        self.snapshot = (*present, *returning)
        self._on_snapshot(self.snapshot)
        self._note_missing(frozenset(record.key for record in present))
        if not returning:
            await self._close_unused()

    @contextlib.asynccontextmanager
    async def connection(
        self, record: WorkerRecord, on_lost: Callable[[], None]
    ) -> AsyncIterator[WorkerClient]:
        """Use the channel to a worker during the block.

        When the worker has been missing from the registry for ``lost_after_s``, ``on_lost`` is
        called at each successful read until the worker is back. The worker may be dead or hang, or
        it may only be unable to reach the registry.
        """
        key = record.key
        connection = self._connections.get(key)
        if connection is None:
            connection = self._connections[key] = _Connection(self._connect(record))
        connection.users += 1
        connection.watchers.add(on_lost)
        try:
            yield connection.client
        finally:
            connection.users -= 1
            connection.watchers.discard(on_lost)

    def _connect_grpc(self, record: WorkerRecord) -> WorkerClient:
        return WorkerClient(
            record.address,
            credentials=self._settings.credentials,
            connect_timeout_s=self._settings.connect_timeout_s,
            max_message_bytes=self._settings.max_message_bytes,
            silence_s=self._settings.connection_silence_s,
        )

    def _note_plans(self, read: RegistrySnapshot) -> None:
        """Keep plans that are missing for ``lost_after_s``: the store may have been restarted."""
        now_s = self._clock()
        if read.plans:
            self.coming, self._plans_missing_since_s = read.coming, None
            return
        if self._plans_missing_since_s is None:
            self._plans_missing_since_s = now_s
        if now_s - self._plans_missing_since_s >= self._settings.lost_after_s:
            self.coming = frozenset()

    def _returning(self, present: tuple[WorkerRecord, ...]) -> tuple[WorkerRecord, ...]:
        """Workers of the last snapshot that a restarted store may not know yet."""
        keys = frozenset(record.key for record in present)
        missing = tuple(record for record in self.snapshot if record.key not in keys)
        now_s = self._clock()
        if not missing:
            self._refilling_since_s = None
        elif self._registry_failed or (self._refilling_since_s is None and self._lost_most(keys)):
            self._refilling_since_s = now_s
        since_s = self._refilling_since_s
        if since_s is None or now_s - since_s >= self._settings.lost_after_s:
            self._refilling_since_s = None
            return ()
        return missing

    def _lost_most(self, present: frozenset[WorkerKey]) -> bool:
        """Whether more than half of the ready workers are missing at once.

        So many workers rarely die at once. More likely, the store has lost their leases, or they
        could not renew them.
        """
        ready = [each.key for each in self.snapshot if each.state is WorkerState.READY]
        return 2 * len([key for key in ready if key not in present]) > len(ready)

    def _note_missing(self, present: frozenset[WorkerKey]) -> None:
        now_s = self._clock()
        for key, connection in self._connections.items():
            if key in present:
                self._missing_since_s.pop(key, None)
                continue
            since_s = self._missing_since_s.setdefault(key, now_s)
            if now_s - since_s >= self._settings.lost_after_s:
                for on_lost in tuple(connection.watchers):
                    on_lost()

    async def _close_unused(self) -> None:
        for key in [*self._missing_since_s]:
            connection = self._connections.get(key)
            if connection is None or connection.users == 0:
                self._missing_since_s.pop(key)
                if connection is not None:
                    del self._connections[key]
                    await connection.client.close()
