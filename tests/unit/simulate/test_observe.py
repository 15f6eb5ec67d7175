"""The simulator's autoscaler sees what the live one sees of the same router."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from autoscale.snapshot import PoolDemand, Snapshot
from cluster.autoscale.observe import Facts, observe
from core.histogram import Histogram
from core.types import Need, Pool, QueueLoad, RouterRecord, WorkerShare
from simulate.observe import Observer

ROUTER = RouterRecord(
    "router",
    "",
    queues=tuple(
        QueueLoad("interactive", need, number, 10 * number, 30 * number, oldest_wait_s=number / 2)
        for number, need in enumerate(Need, start=1)
    ),
    shares=tuple(
        WorkerShare(f"{pool}-1", "1", pool, requests=3, tokens=700, tokens_per_s=50.0)
        for pool in Pool
    ),
    window_s=8.0,
    arrived_requests=20,
    arrived_prompt_tokens=4000,
    output_tokens=900,
    ttft_s=Histogram({40: 7}),
    itl_s=Histogram({20: 90}),
)


class RouterObserver(Observer):
    """Sees a given record instead of that of a simulated router."""

    def record(self) -> RouterRecord:
        return ROUTER


def simulated() -> Snapshot:
    front: Any = SimpleNamespace(fleet=(), now_s=5.0)
    return RouterObserver(front, gpus=1.0, start_s=100.0).snapshot()


def live() -> Snapshot:
    gpus = dict.fromkeys(Pool, 1.0)
    facts = Facts((), (), (ROUTER,), gpus, roles={}, start_timeout_s=180.0)
    return observe(facts, None, now_s=105.0).snapshot


def test_the_demand_is_that_of_the_live_autoscaler() -> None:
    simulated_demand, live_demand = simulated().demand, live().demand
    assert simulated_demand is not None
    assert live_demand is not None
    for pool in Pool:
        for field in fields(PoolDemand):
            found = getattr(simulated_demand[pool], field.name)
            assert found == getattr(live_demand[pool], field.name), (pool, field.name)
            assert found, f"the record says something of {field.name}"
