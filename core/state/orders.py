"""What the command line and the workers tell the launcher, through Redis.

Each key is read once and expires on its own, so nothing is left when nobody reads it.

    baton:{cluster}:scale:{pool}     wanted number of workers
    baton:{cluster}:failure:{part}   why a worker of a pool, or the router, could not start
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from core.errors import BatonError, ConfigError
from core.state.redis import RedisClient
from core.types import Pool

ROUTER = "router"  # the part of a cluster that is no pool
_PARTS = (*Pool, ROUTER)

_ORDER_MS = 60_000  # an order that no launcher took by then is dropped

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartFailure:
    """A part of the cluster that could not start."""

    part: str  # a pool, or ROUTER
    message: str  # one sentence for a person
    is_config: bool  # the configuration is at fault: trying again will not help


class Orders:
    """See the module. Methods raise UnavailableError when the store does not answer."""

    def __init__(self, url: str, *, cluster: str, socket_timeout_s: float) -> None:
        self._client = RedisClient(url, socket_timeout_s=socket_timeout_s)
        self._prefix = f"baton:{cluster}"

    async def ask_scale(self, pool: Pool, replicas: int) -> None:
        """Ask the launcher for ``replicas`` workers in ``pool``; a later call wins."""
        await self._client.execute(
            ("SET", f"{self._prefix}:scale:{pool}", replicas, "PX", _ORDER_MS)
        )

    async def take_scale(self) -> dict[Pool, int]:
        """The orders given since the last call. What is none, is logged and dropped."""
        found = await self._client.execute(
            *(("GETDEL", f"{self._prefix}:scale:{pool}") for pool in Pool)
        )
        orders = {}
        for pool, value in zip(Pool, found, strict=True):
            try:
                if value is not None:
                    orders[pool] = int(value)
            except ValueError:
                _log.warning("dropped an order to scale %s to %r, which is no number", pool, value)
        return orders

    async def report_failure(self, failure: StartFailure) -> None:
        """Say why a part could not start."""
        await self._client.execute(
            (
                "SET",
                f"{self._prefix}:failure:{failure.part}",
                msgspec.json.encode(failure),
                "PX",
                _ORDER_MS,
            )
        )

    async def take_failures(self) -> tuple[StartFailure, ...]:
        """The failures reported since the last call, one per part at most; as ``take_scale``."""
        found = await self._client.execute(
            *(("GETDEL", f"{self._prefix}:failure:{part}") for part in _PARTS)
        )
        failures = []
        for part, value in zip(_PARTS, found, strict=True):
            try:
                if value is not None:
                    failures.append(msgspec.json.decode(value, type=StartFailure))
            except msgspec.MsgspecError:
                _log.warning("dropped a failure of %s that cannot be read: %r", part, value)
        return tuple(failures)

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        await self._client.close()


async def report_failure(orders: Orders, part: str, error: Exception) -> None:
    """Tell the launcher, in one sentence, why ``part`` cannot start. Closes ``orders``.

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
