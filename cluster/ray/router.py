"""The router as Ray Serve runs it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ray.replica import prepare_process
from core.config.schema import Config
from core.state.journal import RedisJournal
from core.state.orders import ROUTER, report_failure
from core.state.registry import RedisRegistry
from router.server import RouterServer


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What the router's replica is started with."""

    config: Config
    redis_url: str = field(repr=False)


class Router:
    """Serve awaits the constructor and drains with ``__del__``; the launcher drains first.

    Args:
        _handles: of the pools, unused: Serve deploys what is bound to its ingress, which is
            the router, although requests don't pass through Serve.
    """

    async def __init__(self, settings: RouterSettings, *_handles: object) -> None:  # type: ignore[misc]
        config = settings.config
        prepare_process(config.cluster.host)
        self._grace_s = config.cluster.stop_grace_s
        self._server: RouterServer | None = None
        self._registry = RedisRegistry(
            settings.redis_url,
            cluster=config.cluster.name,
            lease_s=config.redis.lease_s,
            socket_timeout_s=config.redis.socket_timeout_s,
        )
        try:
            server = RouterServer(config, self._registry, journal=_journal(settings))
            await server.start()
        except Exception as error:
            await report_failure(settings.redis_url, config, ROUTER, error)
            raise
        self._server = server

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and return when the running ones ended, or the grace did."""
        if self._server is not None:
            await self._server.stop(grace_s)

    async def __del__(self) -> None:
        await self.drain(self._grace_s)
        await self._registry.close()


def _journal(settings: RouterSettings) -> RedisJournal | None:
    config = settings.config
    if not config.router.journal:
        return None
    return RedisJournal(
        settings.redis_url,
        cluster=config.cluster.name,
        lease_s=config.redis.lease_s,
        ttl_s=config.router.journal_ttl_s,
        socket_timeout_s=config.redis.socket_timeout_s,
    )
