"""A cluster in virtual time whose workers come, leave and change their pools.

The workers are ``SimReplica``s. ``Demand`` says what the routers publish.
"""

from __future__ import annotations

import contextlib
import random
import uuid
from collections.abc import Iterator
from unittest import mock

from cluster.autoscale.observe import Facts, observe
from core.config.schema import Config, load_config
from core.errors import UnavailableError
from core.types import Pool, PoolPlan, WorkerState
from engine.fake import FakeLatency
from router.admission.policy import AdmissionLimits
from tests.support.simulated_cluster import (
    KV_BLOCKS,
    POLL_S,
    RENEW_S,
    SimCluster,
)
from tests.support.simulated_replica import SimReplica
from tests.support.virtual_time import elapse


def scaled_config(grace_s: float, **settings: object) -> Config:
    """Return the configuration of a cluster whose workers may change their pools.

    Args:
        grace_s: how long the requests of a worker that leaves its pool may take to end.
    """
    return load_config(
        None,
        {
            "cluster.role_change": True,
            "redis.renew_s": RENEW_S,
            "router.registry_poll_s": POLL_S,
            "prefill.shutdown_grace_s": grace_s,
            "decode.shutdown_grace_s": grace_s,
            "prefill.max_concurrent": 16,
            "decode.max_concurrent": 16,
            **settings,
        },
    )


@contextlib.contextmanager
def seeded_ids(seed: int) -> Iterator[None]:
    """Make all ids depend on the seed, because the order of workers does."""
    rng = random.Random(seed)

    def next_uuid() -> uuid.UUID:
        return uuid.UUID(bytes=rng.randbytes(16))

    with (
        mock.patch("secrets.token_hex", lambda length: rng.randbytes(length).hex()),
        mock.patch("uuid.uuid4", next_uuid),
    ):
        yield


class ScaledCluster(SimCluster):
    """See the module.

    Args:
        config: of the workers.
    """

    def __init__(self, rng: random.Random, limits: AdmissionLimits, config: Config) -> None:
        super().__init__(rng, limits)
        self.config = config
        self.latency: FakeLatency | None = None  # of all workers; None: a random one for each

    def add(
        self,
        pool: Pool,
        latency: FakeLatency | None = None,
        limit: int = 0,  # the configuration has it
        kv_blocks: int = KV_BLOCKS,
        load_s: float = 0.0,
        application: str = "",
    ) -> SimReplica:
        """Start a worker. It is ready some time after it has loaded its model for ``load_s``."""
        return SimReplica(
            pool,
            self,
            self.config,
            latency or self.latency or self.random_latency(),
            load_s=load_s,
            application=application,
            kv_blocks=kv_blocks,
        )

    def replicas(self, pool: Pool | None = None) -> list[SimReplica]:
        """Return the workers that run and do not leave, also those that start or change."""
        return [
            worker
            for worker in self.workers.values()
            if isinstance(worker, SimReplica) and worker.stays and pool in (None, worker.joins)
        ]

    async def demand(self) -> dict[Pool, int]:
        """Return how many requests each pool has, as the routers publish it.

        Raises:
            UnavailableError: the registry does not answer.
        """
        routers = await self.registry.list_routers()
        nothing = dict.fromkeys(Pool, 0.0)
        facts = Facts((), (), routers, nothing, {}, start_timeout_s=0.0)
        found = observe(facts, None, self.clock())
        demand = found.snapshot.demand or {}
        return {
            pool: demand[pool].waiting_requests + demand[pool].running_requests for pool in demand
        }

    async def keep_up(self, load_s: float) -> None:
        """Act as the simplest autoscaler: a pool without workers gets one if requests need it."""
        plans = tuple(PoolPlan(pool, max_workers=4) for pool in Pool)
        while True:
            with contextlib.suppress(UnavailableError):
                await self.registry.put_plans(plans)
                for pool, requests in (await self.demand()).items():
                    if requests and not self.replicas(pool):
                        self.add(pool, load_s=load_s)
            await elapse(1.0)

    def ready(self, pool: Pool) -> list[SimReplica]:
        """Return the workers of a pool to which routers send requests."""
        return [each for each in self.replicas(pool) if each.record.state is WorkerState.READY]
