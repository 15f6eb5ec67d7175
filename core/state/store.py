"""The address and the settings of a cluster's store, and how to open each part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # these modules import the driver, which takes 0.1 s
    from core.config.schema import Config
    from core.state.autoscale import AutoscaleStore
    from core.state.journal import RedisJournal
    from core.state.orders import Orders
    from core.state.registry import RedisRegistry


@dataclass(frozen=True, slots=True)
class Store:
    """One cluster's keys in one Redis or Valkey. The caller closes each part that it opens."""

    url: str = field(repr=False)  # may contain a password
    cluster: str  # name of the cluster, which is part of every key
    lease_s: float  # lifetime of a worker's lease that is not renewed
    journal_lease_s: float  # the same of a request's lease
    journal_ttl_s: float  # lifetime of a journal entry after its last change
    journal_max_bytes: int  # memory that the journal may take
    socket_timeout_s: float  # bound on one wait for the store

    @classmethod
    def of(cls, config: Config, url: str) -> Self:
        """Return the store of the configured cluster at ``url``.

        ``url`` is a separate argument, because ``config`` has no address for an embedded Valkey.
        """
        return cls(
            url=url,
            cluster=config.cluster.name,
            lease_s=config.redis.lease_s,
            journal_lease_s=config.router.journal_lease_s,
            journal_ttl_s=config.router.journal_ttl_s,
            journal_max_bytes=int(config.router.journal_max_bytes),
            socket_timeout_s=config.redis.socket_timeout_s,
        )

    def registry(self) -> RedisRegistry:
        """Open the registry of workers."""
        from core.state.registry import RedisRegistry

        return RedisRegistry(
            self.url,
            cluster=self.cluster,
            lease_s=self.lease_s,
            socket_timeout_s=self.socket_timeout_s,
        )

    def journal(self) -> RedisJournal:
        """Open the journal of requests."""
        from core.state.journal import RedisJournal

        return RedisJournal(
            self.url,
            cluster=self.cluster,
            lease_s=self.journal_lease_s,
            ttl_s=self.journal_ttl_s,
            budget_bytes=self.journal_max_bytes,
            socket_timeout_s=self.socket_timeout_s,
        )

    def orders(self) -> Orders:
        """Open the launcher's inbox: orders to scale, and reports of failed starts."""
        from core.state.orders import Orders

        return Orders(self.url, cluster=self.cluster, socket_timeout_s=self.socket_timeout_s)

    def autoscale(self) -> AutoscaleStore:
        """Open the autoscaler's policy, memory and view."""
        from core.state.autoscale import AutoscaleStore

        return AutoscaleStore(
            self.url,
            cluster=self.cluster,
            view_s=self.lease_s,
            socket_timeout_s=self.socket_timeout_s,
        )
