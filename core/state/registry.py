"""The registry of live workers: their addresses, states and loads.

A worker's record is a lease. The worker renews it while it is alive. Without a renewal, the record
expires after ``lease_s``, so routers stop using a dead worker without any other action.

    baton:{cluster}:worker:{id}   JSON of the record; expires after lease_s
    baton:{cluster}:workers       set of the ids, so that a listing need not scan all keys
    baton:{cluster}:drain:{id}    exists if the worker was asked to drain
    baton:{cluster}:role:{id}     the pool that the worker was asked to join

The worker's next renewal reads and deletes the last two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from core.errors import UnavailableError
from core.state.redis import RedisClient
from core.types import Pool, WorkerOrder, WorkerRecord

# Lifetime of the set of ids and of orders to workers, in leases. They outlive a short absence of
# all workers, and expire some time after the cluster ends.
_INDEX_LEASES = 100


_log = logging.getLogger(__name__)


class Registry(Protocol):
    """All methods except ``close`` raise UnavailableError when the store does not answer."""

    async def put(self, record: WorkerRecord) -> WorkerOrder | None:
        """Take or renew the lease of ``record.id``.

        Returns what the worker was asked to do since the last renewal. A drain wins over a change
        of role, and the latest role over earlier ones. If the store's answer is lost, so is the
        order: whoever gave it sees that the record does not change, and gives it again.
        """

    async def ask_to_drain(self, worker_id: str) -> None:
        """Ask a worker to drain and stop. An unknown id is not an error."""

    async def ask_to_change_role(self, worker_id: str, pool: Pool) -> None:
        """Ask a worker to drain and then serve ``pool``. An unknown id is not an error."""

    async def remove(self, worker_id: str) -> None:
        """End a lease. An unknown id is not an error."""

    async def list(self) -> tuple[WorkerRecord, ...]:
        """Return the workers with valid leases, ordered by id."""

    async def close(self) -> None:
        """Disconnect. Leases stay until they expire. Idempotent."""


class RedisRegistry:
    """The registry of one cluster in Redis or Valkey.

    Args:
        url: address of the store, see ``RedisClient``.
        cluster: name of the cluster, which is part of every key.
        lease_s: lifetime of a record that is not renewed.
        socket_timeout_s: bound on one wait for the store, see ``RedisClient``.
    """

    def __init__(self, url: str, *, cluster: str, lease_s: float, socket_timeout_s: float) -> None:
        self._client = RedisClient(url, socket_timeout_s=socket_timeout_s)
        self._prefix = f"baton:{cluster}:worker:"
        self._index = f"baton:{cluster}:workers"
        self._drain = f"baton:{cluster}:drain:"
        self._role = f"baton:{cluster}:role:"
        self._lease_ms = round(lease_s * 1000)

    async def put(self, record: WorkerRecord) -> WorkerOrder | None:
        """See ``Registry``."""
        *_, drain, role = await self._client.execute(
            ("SET", self._prefix + record.id, msgspec.json.encode(record), "PX", self._lease_ms),
            ("SADD", self._index, record.id),
            ("PEXPIRE", self._index, self._lease_ms * _INDEX_LEASES),
            ("GETDEL", self._drain + record.id),
            ("GETDEL", self._role + record.id),
        )
        if drain is not None:
            return WorkerOrder.DRAIN
        return _decode_role(role) if role is not None else None

    async def ask_to_drain(self, worker_id: str) -> None:
        """See ``Registry``."""
        await self._client.execute(
            ("SET", self._drain + worker_id, 1, "PX", self._lease_ms * _INDEX_LEASES)
        )

    async def ask_to_change_role(self, worker_id: str, pool: Pool) -> None:
        """See ``Registry``."""
        await self._client.execute(
            ("SET", self._role + worker_id, pool.value, "PX", self._lease_ms * _INDEX_LEASES)
        )

    async def remove(self, worker_id: str) -> None:
        """See ``Registry``."""
        await self._client.execute(
            ("DEL", self._prefix + worker_id), ("SREM", self._index, worker_id)
        )

    async def list(self) -> tuple[WorkerRecord, ...]:
        """See ``Registry``."""
        ids: list[bytes] = sorted((await self._client.execute(("SMEMBERS", self._index)))[0])
        if not ids:
            return ()
        keys = [self._prefix.encode() + worker_id for worker_id in ids]
        values: list[bytes | None] = (await self._client.execute(("MGET", *keys)))[0]
        # If a worker takes its lease again before this SREM, the set of ids lacks the worker until
        # its next renewal.
        expired = [worker_id for worker_id, value in zip(ids, values, strict=True) if value is None]
        if expired:
            await self._client.execute(("SREM", self._index, *expired))
        return tuple(decode_record(value) for value in values if value is not None)

    async def close(self) -> None:
        """See ``Registry``."""
        await self._client.close()


class MemoryRegistry:
    """A registry inside one process, for tests.

    Args:
        lease_s: lifetime of a record that is not renewed.
        clock: returns seconds on any monotonic scale.
    """

    def __init__(self, *, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._leases: dict[str, tuple[float, WorkerRecord]] = {}  # id -> (end of lease, record)
        self._orders: dict[str, WorkerOrder] = {}
        self.available = True  # False: every call fails, as if the store did not answer

    async def put(self, record: WorkerRecord) -> WorkerOrder | None:
        """See ``Registry``."""
        self._check()
        self._leases[record.id] = (self._clock() + self._lease_s, record)
        return self._orders.pop(record.id, None)

    async def ask_to_drain(self, worker_id: str) -> None:
        """See ``Registry``."""
        self._check()
        self._orders[worker_id] = WorkerOrder.DRAIN

    async def ask_to_change_role(self, worker_id: str, pool: Pool) -> None:
        """See ``Registry``."""
        self._check()
        if self._orders.get(worker_id) is not WorkerOrder.DRAIN:
            self._orders[worker_id] = WorkerOrder(pool.value)

    async def remove(self, worker_id: str) -> None:
        """See ``Registry``."""
        self._check()
        self._leases.pop(worker_id, None)

    async def list(self) -> tuple[WorkerRecord, ...]:
        """See ``Registry``."""
        self._check()
        now_s = self._clock()
        self._leases = {key: lease for key, lease in self._leases.items() if lease[0] > now_s}
        return tuple(self._leases[worker_id][1] for worker_id in sorted(self._leases))

    async def close(self) -> None:
        """See ``Registry``."""

    def _check(self) -> None:
        if not self.available:
            raise UnavailableError(
                "the registry does not answer", reason="REGISTRY_UNAVAILABLE", retry_after_s=1.0
            )


def _decode_role(value: bytes) -> WorkerOrder | None:
    """Return the order. An order that no version of Baton knows is logged and dropped."""
    try:
        return WorkerOrder(Pool(value.decode()).value)
    except ValueError:
        _log.warning("dropped an order to change to the pool %r: there is no such pool", value)
        return None


def decode_record(value: bytes) -> WorkerRecord:
    """Decode a record. Unknown fields, which a newer version may write, are ignored.

    Raises:
        UnavailableError: ``value`` is not a record, so another program writes to the same keys.
    """
    try:
        return msgspec.json.decode(value, type=WorkerRecord)
    except msgspec.MsgspecError as error:
        raise UnavailableError(
            f"the registry holds a record that cannot be read: {error}",
            reason="REGISTRY_CORRUPT",
        ) from None
