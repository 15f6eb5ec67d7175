"""The registry of live workers and routers, and what the autoscaler plans for the pools.

A worker's record is a lease. The worker renews it while it is alive. Without a renewal, the record
expires after ``lease_s``, so routers stop using a dead worker without any other action. A router's
record is a lease, too: what a dead router has measured is forgotten.

    baton:{cluster}:worker:{id}   JSON of the record; expires after lease_s
    baton:{cluster}:workers       set of the ids, so that a listing need not scan all keys
    baton:{cluster}:drain:{id}    exists if the worker was asked to drain
    baton:{cluster}:role:{id}     the pool that the worker was asked to join
    baton:{cluster}:router:{id}   JSON of a router's record; expires after lease_s
    baton:{cluster}:routers       set of the routers' ids
    baton:{cluster}:pools         JSON of the pools' plans; expires some leases after the last write

A worker's next renewal reads and deletes ``drain`` and ``role``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from core.errors import UnavailableError
from core.state.redis import Command, RedisClient
from core.types import Pool, PoolPlan, RegistrySnapshot, RouterRecord, WorkerOrder, WorkerRecord

# Lifetime of the set of ids and of orders to workers, in leases. They outlive a short absence of
# all workers, and expire some time after the cluster ends.
_INDEX_LEASES = 100
# Lifetime of the pools' plans, in leases: about the time in which an autoscaler that died is
# replaced. Meanwhile, requests that wait for a pool's first worker must not be refused.
_PLAN_LEASES = 10

T = TypeVar("T")


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

    async def snapshot(self) -> RegistrySnapshot:
        """Return the workers, as ``list`` does, and the pools' plans.

        Plans that cannot be read count as missing.
        """

    async def put_plans(self, plans: tuple[PoolPlan, ...]) -> None:
        """Replace the plans of all pools. Without another call, they expire."""

    async def put_router(self, record: RouterRecord) -> None:
        """Take or renew the lease of a router."""

    async def remove_router(self, router_id: str) -> None:
        """End a router's lease. An unknown id is not an error."""

    async def list_routers(self) -> tuple[RouterRecord, ...]:
        """Return the routers with valid leases, ordered by id."""

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
        self._router_prefix = f"baton:{cluster}:router:"
        self._router_index = f"baton:{cluster}:routers"
        self._plans = f"baton:{cluster}:pools"
        self._lease_ms = round(lease_s * 1000)

    async def put(self, record: WorkerRecord) -> WorkerOrder | None:
        """See ``Registry``."""
        *_, drain, role = await self._client.execute(
            *self._renewal(self._prefix, self._index, record),
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
        return (await self.snapshot()).workers

    async def snapshot(self) -> RegistrySnapshot:
        """See ``Registry``."""
        values, plans = await self._read(self._prefix, self._index, self._plans)
        workers = tuple(decode_record(value) for value in values)
        return RegistrySnapshot(workers, decode_plans(plans) if plans is not None else ())

    async def put_plans(self, plans: tuple[PoolPlan, ...]) -> None:
        """See ``Registry``."""
        ttl_ms = self._lease_ms * _PLAN_LEASES
        await self._client.execute(("SET", self._plans, msgspec.json.encode(plans), "PX", ttl_ms))

    async def put_router(self, record: RouterRecord) -> None:
        """See ``Registry``."""
        await self._client.execute(*self._renewal(self._router_prefix, self._router_index, record))

    async def remove_router(self, router_id: str) -> None:
        """See ``Registry``."""
        await self._client.execute(
            ("DEL", self._router_prefix + router_id), ("SREM", self._router_index, router_id)
        )

    async def list_routers(self) -> tuple[RouterRecord, ...]:
        """See ``Registry``."""
        values, _ = await self._read(self._router_prefix, self._router_index)
        return tuple(decode_router(value) for value in values)

    def _renewal(
        self, prefix: str, index: str, record: WorkerRecord | RouterRecord
    ) -> tuple[Command, ...]:
        return (
            ("SET", prefix + record.id, msgspec.json.encode(record), "PX", self._lease_ms),
            ("SADD", index, record.id),
            ("PEXPIRE", index, self._lease_ms * _INDEX_LEASES),
        )

    async def _read(
        self, prefix: str, index: str, another: str | None = None
    ) -> tuple[tuple[bytes, ...], bytes | None]:
        """Return the records whose ids are in a set, ordered by id, and the value of ``another``
        key, which comes with the same answer."""
        ids: tuple[bytes, ...] = (*sorted((await self._client.execute(("SMEMBERS", index)))[0]),)
        more = (another.encode(),) if another is not None else ()
        keys = (*(prefix.encode() + each for each in ids), *more)
        if not keys:
            return (), None
        found: tuple[bytes | None, ...] = (*(await self._client.execute(("MGET", *keys)))[0],)
        values, other = found[: len(ids)], found[-1] if more else None
        # If a lease is taken again before this SREM, the set of ids lacks it until its next
        # renewal.
        expired = [each for each, value in zip(ids, values, strict=True) if value is None]
        if expired:
            await self._client.execute(("SREM", index, *expired))
        return tuple(value for value in values if value is not None), other

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
        self._routers: dict[str, tuple[float, RouterRecord]] = {}
        self._plans: tuple[float, tuple[PoolPlan, ...]] = (0.0, ())
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
        return (await self.snapshot()).workers

    async def snapshot(self) -> RegistrySnapshot:
        """See ``Registry``."""
        self._check()
        until_s, plans = self._plans
        workers = self._valid(self._leases)
        return RegistrySnapshot(workers, plans if until_s > self._clock() else ())

    async def put_plans(self, plans: tuple[PoolPlan, ...]) -> None:
        """See ``Registry``."""
        self._check()
        self._plans = self._clock() + _PLAN_LEASES * self._lease_s, plans

    async def put_router(self, record: RouterRecord) -> None:
        """See ``Registry``."""
        self._check()
        self._routers[record.id] = (self._clock() + self._lease_s, record)

    async def remove_router(self, router_id: str) -> None:
        """See ``Registry``."""
        self._check()
        self._routers.pop(router_id, None)

    async def list_routers(self) -> tuple[RouterRecord, ...]:
        """See ``Registry``."""
        self._check()
        return self._valid(self._routers)

    async def close(self) -> None:
        """See ``Registry``."""

    def _valid(self, leases: dict[str, tuple[float, T]]) -> tuple[T, ...]:
        """Drop expired leases. Return the records of the others, ordered by id."""
        now_s = self._clock()
        for each in [each for each, (until_s, _) in leases.items() if until_s <= now_s]:
            del leases[each]
        return tuple(leases[each][1] for each in sorted(leases))

    def _check(self) -> None:
        if not self.available:
            raise UnavailableError(
                "the registry does not answer", reason="REGISTRY_UNAVAILABLE", retry_after_s=1.0
            )


def _decode_role(value: bytes) -> WorkerOrder | None:
    """Return the order. An order that this version does not know is logged and dropped."""
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
    return _decode(value, WorkerRecord)


def decode_router(value: bytes) -> RouterRecord:
    """Decode a router's record, as ``decode_record`` does.

    Raises:
        UnavailableError: ``value`` is not a record. Without it, the numbers would be too low.
    """
    return _decode(value, RouterRecord)


def decode_plans(value: bytes) -> tuple[PoolPlan, ...]:
    """Decode the pools' plans; none if they cannot be read."""
    try:
        return msgspec.json.decode(value, type=tuple[PoolPlan, ...])
    except msgspec.MsgspecError:
        return ()


def _decode(value: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError as error:
        raise UnavailableError(
            f"the registry holds a record that cannot be read: {error}",
            reason="REGISTRY_CORRUPT",
        ) from None
