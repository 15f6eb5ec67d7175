"""Runs hundreds of random schedules of the whole control loop, in virtual time.

The autoscaler, the routers and the workers' lifecycle are real. Serve, the engines, the sockets and
the stores are simulated. Each seed makes a policy with short windows, a load in waves, troubles of
Serve and some faults. What must hold:

- Every request ends as in ``test_schedules``. Without a fault, none is even refused.
- The workers never hold more GPUs than the budget has, those that leave included.
- Without a fault, each pool stays within its bounds.
- After the load, both pools return to their minimums, and nothing is left.

``BATON_SCHEDULE_SEED=n`` runs one seed alone.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from baton.v1 import inference_pb2
from core.types import Pool
from engine.fake import FakeLatency
from router.admission.policy import AdmissionLimits, ClassLimits
from tests.support.scaled_cluster import ScaledCluster, scaled_config, seeded_ids
from tests.support.schedules import (
    FAR_S,
    Cut,
    KillRouter,
    RegistryAway,
    RegistryEmptied,
    SlowLink,
    StoreSlow,
    cancel_running,
    check_ended,
    check_nothing_left,
    run_client,
    run_seeds,
    seeds_in_chunks,
)
from tests.support.simulated_cluster import LEASE_S, SimClient, SimCluster
from tests.support.simulated_replica import HOLD_S
from tests.support.simulated_serve import SimAutoscaler, SimServe, SimStore
from tests.support.virtual_time import elapse

SEEDS = 150
SEEDS_PER_TEST = 50
RETURN_S = 240.0  # time in which idle pools return to their minimums
LOOK_S = 0.25


@dataclass(frozen=True)
class Scale:
    """What one seed decides about the policy."""

    text: str
    least: dict[Pool, int]
    most: dict[Pool, int]
    gpus: dict[Pool, float]
    budget: float | None


class Autoscaled:
    """A cluster with Serve and an autoscaler."""

    def __init__(self, cluster: ScaledCluster, scale: Scale, grace_s: float) -> None:
        self.cluster = cluster
        self.scale = scale
        loads = cluster.rng.choice(((0.0, 1.0), (1.0, 4.0), (8.0,), (2.0, 15.0)))
        self.serve = SimServe(cluster, scale.gpus, scale.budget, loads, grace_s)
        store = SimStore(cluster, scale.text)
        self.autoscaler = SimAutoscaler(cluster, self.serve, store, scale.gpus)

    async def watch(self, *, strict: bool) -> None:
        """Check the bounds all the time.

        Args:
            strict: whether no fault can make a pool leave its bounds.
        """
        while True:
            self.autoscaler.check()
            assert not self.serve.defects
            for pool in Pool if strict else ():
                count = self.serve.count(pool)
                assert self.scale.least[pool] <= count <= self.scale.most[pool], (pool, count)
            await elapse(LOOK_S)

    async def has_returned(self) -> bool:
        """Wait until each pool has its fewest workers, and all is calm."""
        for _ in range(int(RETURN_S)):
            counts = {pool: self.serve.count(pool) for pool in Pool}
            if self.serve.is_settled and counts == self.scale.least:
                return True
            await elapse(1.0)
        return False


class Fault:
    """What disturbs a schedule. Subclasses say what happens."""

    async def strike(self, all_: Autoscaled) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Strike(Fault):
    """A fault of ``schedules``."""

    fault: Cut | SlowLink | RegistryAway | RegistryEmptied | StoreSlow | KillRouter

    async def strike(self, all_: Autoscaled) -> None:
        await self.fault.strike(all_.cluster)


@dataclass(frozen=True)
class KillWorker(Fault):
    """A worker is killed with kill -9. Serve replaces it."""

    async def strike(self, all_: Autoscaled) -> None:
        if found := all_.cluster.replicas():
            all_.cluster.rng.choice(found).kill()


@dataclass(frozen=True)
class OrderDrain(Fault):
    """A worker is asked in the registry to drain. Serve replaces it."""

    async def strike(self, all_: Autoscaled) -> None:
        found = all_.cluster.replicas()
        if found and all_.cluster.registry.available:
            await all_.cluster.registry.ask_to_drain(all_.cluster.rng.choice(found).id)


@dataclass(frozen=True)
class RestartAutoscaler(Fault):
    """The autoscaler dies in the middle of a step. Another one replaces it."""

    after_s: float

    async def strike(self, all_: Autoscaled) -> None:
        await all_.autoscaler.restart(self.after_s)


@dataclass(frozen=True)
class ServeAway(Fault):
    """Serve does not answer."""

    for_s: float

    async def strike(self, all_: Autoscaled) -> None:
        all_.serve.troubles.available = False
        await elapse(self.for_s)
        all_.serve.troubles.available = True


def random_fault(rng: random.Random) -> Fault:
    pool = rng.choice(tuple(Pool))
    makes: tuple[Callable[[], Fault], ...] = (
        KillWorker,
        KillWorker,
        OrderDrain,
        lambda: RestartAutoscaler(rng.choice((0.0, 1.0, 5.0))),
        lambda: ServeAway(rng.choice((1.0, 8.0))),
        lambda: Strike(Cut(pool)),
        lambda: Strike(SlowLink(pool, 5.0)),
        lambda: Strike(RegistryAway(rng.choice((0.3, 8.0)))),
        lambda: Strike(RegistryEmptied()),
        lambda: Strike(StoreSlow(8.0)),
        lambda: Strike(KillRouter(rng.choice((0.0, 1.0, 8.0)))),
    )
    return rng.choice(makes)()


def random_scale(rng: random.Random) -> Scale:
    least = {pool: rng.randint(0, 1) for pool in Pool}
    most = {pool: rng.randint(1, 4) for pool in Pool}
    budget = rng.choice((None, 2.0, 3.0, 3.0, 4.0))
    changes = budget is not None and rng.random() < 0.8
    gpus = {pool: 1.0 if changes else rng.choice((1.0, 1.0, 2.0)) for pool in Pool}
    if budget is not None:
        budget = max(budget, sum(gpus.values()))
    signals: dict[Pool, list[dict[str, Any]]] = {
        Pool.PREFILL: [
            {"type": "QueueRequests", "target": rng.choice((1.0, 3.0))},
            {"type": "QueueTokens", "target": 20.0},
            {"type": "QueueSeconds", "target": 0.3},
            {"type": "Utilization", "target": 0.7},
            {"type": "TTFT", "targetMilliseconds": 300.0},
        ],
        Pool.DECODE: [
            {"type": "QueueRequests", "target": rng.choice((1.0, 3.0))},
            {"type": "QueueTokens", "target": 60.0},
            {"type": "KVUtilization", "target": 0.5},
            {"type": "ITL", "targetMilliseconds": 40.0},
        ],
    }
    pools = {
        pool.value: {
            "minReplicas": least[pool],
            "maxReplicas": most[pool],
            "signals": rng.sample(signals[pool], rng.randint(1, 2)),
            "behavior": random_behavior(rng),
        }
        for pool in Pool
    }
    spec: dict[str, Any] = {
        "warmupSeconds": rng.choice((0.0, 2.0)),
        "placementTimeoutSeconds": 5.0,
        "placementRetrySeconds": 2.0,
        "placementMaxRetrySeconds": 10.0,
        "roleChangeTimeoutSeconds": rng.choice((10.0, 60.0)),
        **pools,
    }
    if budget is not None:
        spec["budget"] = {
            "gpus": budget, "priority": rng.choice(("Prefill", "Decode", "Neither"))
        }  # fmt: skip
    if changes:
        spec["roleChange"] = "WhenBudgetIsSpent"
    if rng.random() < 0.3:
        spec["ratio"] = {"min": 0.5, "max": 2.0}
    document = {"apiVersion": "baton/v1", "kind": "AutoscalingPolicy", "metadata": {"name": "p"}}
    return Scale(json.dumps({**document, "spec": spec}), least, most, gpus, budget)


def random_behavior(rng: random.Random) -> dict[str, Any]:
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": rng.choice((0, 0, 2)),
            "tolerance": 0.0,
            "policies": [{"type": "Pods", "value": rng.choice((1, 4)), "periodSeconds": 2}],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": rng.choice((0, 2, 8)),
            "tolerance": 0.0,
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": 2}],
        },
    }


# Lengths of prompts and of outputs, in tokens; each wave has one kind.
KINDS = (((1, 8, 30), (1, 2, 10, 33)), ((30,), (1, 2)), ((1, 4), (20, 33)))
Kind = tuple[tuple[int, ...], tuple[int, ...]]


def random_client(cluster: SimCluster, number: int, kind: Kind) -> SimClient:
    rng = cluster.rng
    request = inference_pb2.GenerateRequest(request_id=f"r{number}")
    request.token_ids.ids.extend(rng.randrange(3, 200) for _ in range(rng.choice(kind[0])))
    request.sampling.max_tokens = rng.choice(kind[1])
    if rng.random() < 0.2:
        request.sampling.min_tokens = 1  # the decode worker samples the first token
    timeout_s = rng.choice((0.03, 0.3)) if rng.random() < 0.05 else FAR_S
    return SimClient(request, cluster.clock, cluster.living_routers, timeout_s)


LIMITS = AdmissionLimits(64, {"only": ClassLimits(1, max_queue=1000, queue_timeout_s=150)})


async def run_schedule(seed: int, counts: Counter[str] | None = None) -> None:
    rng = random.Random(seed)
    grace_s = rng.choice((0.1, 1.0, 30.0))
    scale = random_scale(rng)
    config = scaled_config(
        grace_s, **{f"{pool}.max_replicas": 8 for pool in Pool}, **{"prefill.replicas": 1}
    )
    with seeded_ids(seed):
        async with ScaledCluster(rng, LIMITS, config) as cluster:
            cluster.latency = FakeLatency(rng.choice((1.0, 20.0)), rng.choice((5.0, 50.0, 200.0)))
            cluster.transfer_s = rng.choice((0.0, 0.05, 1.0))
            await _run_all(Autoscaled(cluster, scale, grace_s), counts)


async def _run_all(all_: Autoscaled, counts: Counter[str] | None) -> None:
    cluster, serve, rng = all_.cluster, all_.serve, all_.cluster.rng
    for _ in range(rng.randrange(2)):
        await cluster.add_router()
    tasks_before = asyncio.all_tasks()
    all_.autoscaler.start()
    await elapse(3.0)  # routers know the plans
    assert await all_.has_returned(), "the first workers do not start"
    faults = [random_fault(rng) for _ in range(rng.choice((0, 0, 1, 3)))]
    if has_troubles := rng.random() < 0.3:
        serve.troubles.unplaced = rng.choice((0.0, 0.5))
        serve.troubles.unplaced_s = rng.choice((1.0, 12.0))
        serve.troubles.failed = rng.choice((0.0, 0.3))
        serve.troubles.lost_answer = rng.choice((0.0, 0.2))
    watch = asyncio.create_task(all_.watch(strict=not faults and not has_troubles))
    clients: list[tuple[SimClient, float]] = []
    for _ in range(rng.randint(1, 3)):
        await _run_wave(all_, clients, faults)
        await elapse(rng.choice((0.0, 3.0, 20.0)))
    if watch.done():
        watch.result()
    struck = [each.fault for each in faults if isinstance(each, Strike)]
    store_failed = any(
        isinstance(each, RegistryAway | RegistryEmptied | StoreSlow) for each in struck
    )
    for client, patient_s in clients:
        check_ended(client, gave_up=patient_s < FAR_S, store_failed=store_failed)
        if not faults and not has_troubles:
            assert not client.refusals, client.refusals
    serve.troubles.unplaced = serve.troubles.failed = 0.0
    assert await all_.has_returned(), (
        {pool: serve.count(pool) for pool in Pool}, all_.scale.least, await serve.list()
    )  # fmt: skip
    for router in cluster.living_routers():
        await router.handler.drained()
    await elapse(HOLD_S + LEASE_S)
    if watch.done():
        watch.result()
    assert await all_.has_returned(), "the pools did not stay"
    cancel_running(watch)  # it may have found something since
    await all_.autoscaler.stop()
    standing = cluster.standing_tasks() | serve.tasks()
    check_nothing_left(cluster, tasks_before | standing | {watch})
    await serve.stop()
    if counts is not None:
        counts.update(serve.counts)


async def _run_wave(
    all_: Autoscaled, clients: list[tuple[SimClient, float]], faults: list[Fault]
) -> None:
    cluster, rng = all_.cluster, all_.cluster.rng

    async def start_client(client: SimClient, patience_s: float, within_s: float) -> None:
        await elapse(rng.random() * within_s)
        await run_client(cluster, client, patience_s)

    async def strike(fault: Fault) -> None:
        await elapse(rng.choice((0.5, 5.0, 20.0)) * rng.random())
        await fault.strike(all_)

    within_s = rng.choice((0.1, 5.0, 15.0))
    kind = rng.choice(KINDS)
    new = [
        (
            random_client(cluster, len(clients) + number, kind),
            rng.choice((0.05, 1.0)) if rng.random() < 0.05 else 3 * FAR_S,
        )
        for number in range(rng.choice((1, 5, 15, 30)))
    ]
    clients += new
    await asyncio.gather(
        *(start_client(*each, within_s) for each in new), *(strike(each) for each in faults)
    )


CHUNKS = seeds_in_chunks(SEEDS, SEEDS_PER_TEST)


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: f"from-{chunk.start}")
def test_the_autoscaler_loses_no_request(chunk: range) -> None:
    run_seeds(run_schedule, chunk)
