"""Sends scale orders to the autoscaler, and start failures to the launcher, through Redis.

``baton scale`` sends scale orders. Workers and the router report why they could not start. Reading
a key deletes it. A key that nobody reads expires.

    baton:{cluster}:scale:{pool}     number of workers that the pool should have
    baton:{cluster}:failure:{part}   why a worker of a pool, or the router, could not start
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from core.errors import BatonError, ConfigError
from core.state.redis import RedisClient
from core.types import Pool

ROUTER = "router"  # the part of a cluster that is not a pool
_PARTS = (*Pool, ROUTER)

_ORDER_TTL_MS = 60_000  # an order or failure that nobody has read by then is outdated

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartFailure:
    """A part of the cluster that could not start."""

    part: str  # a pool, or ROUTER
    message: str  # shown to the user
    is_config: bool  # the configuration is wrong, so another try would fail, too


class Orders:
    """The scale orders and start failures of one cluster, in Redis or Valkey.

    All methods except ``close`` raise UnavailableError when the store does not answer.

    Args:
        url: address of the store, see ``RedisClient``.
        cluster: name of the cluster, which is part of every key.
        socket_timeout_s: bound on one wait for the store, see ``RedisClient``.
    """

    def __init__(self, url: str, *, cluster: str, socket_timeout_s: float) -> None:
        self._client = RedisClient(url, socket_timeout_s=socket_timeout_s)
        self._prefix = f"baton:{cluster}"

    async def ask_scale(self, pool: Pool, replicas: int) -> None:
        """Ask the autoscaler for ``replicas`` workers in ``pool``. Replaces an unread order."""
        await self._client.execute(
            ("SET", f"{self._prefix}:scale:{pool}", replicas, "PX", _ORDER_TTL_MS)
        )

    async def take_scale(self) -> dict[Pool, int]:
        """Return the orders given since the last call. Malformed orders are logged and dropped."""
        found = await self._client.execute(
            *(("GETDEL", f"{self._prefix}:scale:{pool}") for pool in Pool)
        )
        orders = {}
        for pool, value in zip(Pool, found, strict=True):
            try:
                if value is not None:
                    orders[pool] = int(value)
            except ValueError:
                _log.warning("dropped an order to scale %s to %r: not a number", pool, value)
        return orders

    async def report_failure(self, failure: StartFailure) -> None:
        """Report why a part could not start. Replaces an unread report on the same part."""
        await self._client.execute(
            (
                "SET",
                f"{self._prefix}:failure:{failure.part}",
                msgspec.json.encode(failure),
                "PX",
                _ORDER_TTL_MS,
            )
        )

    async def take_failures(self) -> tuple[StartFailure, ...]:
        """Return the failures reported since the last call, at most one per part.

        Malformed failures are logged and dropped.
        """
        found = await self._client.execute(
            *(("GETDEL", f"{self._prefix}:failure:{part}") for part in _PARTS)
        )
        failures = []
        for part, value in zip(_PARTS, found, strict=True):
            try:
                if value is not None:
                    failures.append(msgspec.json.decode(value, type=StartFailure))
            except msgspec.MsgspecError:
                _log.warning("dropped a malformed failure report of %s: %r", part, value)
        return tuple(failures)

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        await self._client.close()


async def report_failure(orders: Orders, part: str, error: Exception) -> None:
    """Report to the launcher why ``part`` cannot start, then close ``orders``.

    Raises:
        UnavailableError: the store does not answer.
    """
    if isinstance(error, ConfigError | BatonError):
        message = str(error)
    else:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        failure = StartFailure(part, message, is_config=isinstance(error, ConfigError))
        await orders.report_failure(failure)
    finally:
        await orders.close()
