"""A request that ends early, in whatever phase it is, leaves the cluster as if it had never been.

In virtual time, so "within 100 ms" is exact; the fake engine has no step that would have to end
first. With real engines: tests/integration/test_cancel_engines.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from baton.v1 import inference_pb2
from core.types import Pool
from engine.fake import FakeLatency
from router.admission.policy import AdmissionLimits, ClassLimits
from tests.support.simulated_cluster import (
    CONTEXT_TOKENS,
    KV_BLOCKS,
    RENEW_S,
    SimClient,
    SimCluster,
)
from tests.support.virtual_time import elapse, run_virtually

FREED_S = 0.1
PROMPT_TOKENS = 20
MAX_TOKENS = CONTEXT_TOKENS - PROMPT_TOKENS
FILLS_KV = KV_BLOCKS * 4 // CONTEXT_TOKENS  # requests of that size that take all of D's blocks
PATIENCE_S = 3.0  # each phase is reached long before, and lasts longer
LONG_MS = 60_000.0
SEEDS = range(10)

QUICK = FakeLatency(prefill_ms_per_token=0.1, decode_step_ms=1.0, transfer_ms=0.0)
SLOW_PREFILL = FakeLatency(prefill_ms_per_token=LONG_MS / PROMPT_TOKENS, decode_step_ms=1.0)
SLOW_DECODE = FakeLatency(prefill_ms_per_token=0.1, decode_step_ms=LONG_MS, transfer_ms=0.0)
STEADY_DECODE = FakeLatency(prefill_ms_per_token=0.1, decode_step_ms=200.0, transfer_ms=0.0)
HOLDS_KV = FakeLatency(prefill_ms_per_token=0.1, decode_step_ms=1.0, transfer_ms=LONG_MS)


@dataclass(frozen=True)
class Scene:
    """One prefill and one decode worker, and the request that will end early."""

    cluster: SimCluster
    client: SimClient
    began_s: float

    def worker(self, pool: Pool) -> Any:
        (worker,) = (each for each in self.cluster.workers.values() if each.pool is pool)
        return worker

    def asks(self, pool: Pool) -> int:
        """How often the request came to the worker."""
        mine = f"{self.client.request.request_id}~"
        return sum(key.startswith(mine) for key in self.worker(pool).asked)

    def running(self, pool: Pool) -> int:
        running: int = self.worker(pool).engine.load().running
        return running


@dataclass(frozen=True)
class Phase:
    """A cluster in which a request stays in one phase.

    ``others`` came before it, and stand still as well; at another router, of which its own has
    heard nothing yet, if that would let it wait else.
    """

    name: str
    reached: Callable[[Scene], bool]
    prefill: FakeLatency = QUICK
    decode: FakeLatency = QUICK
    transfer_s: float = 0.0
    others: int = 0
    max_concurrent: int = 16
    loses_decode: bool = False
    another_router: bool = False


def in_router_queue(scene: Scene) -> bool:
    """The other one has the only place; this one has got no further for half a second."""
    waited_s = scene.cluster.clock() - scene.began_s
    return waited_s > 0.5 and not scene.asks(Pool.PREFILL) and not scene.asks(Pool.DECODE)


def awaits_blocks(scene: Scene) -> bool:
    load = scene.worker(Pool.DECODE).engine.load()
    return bool(load.queue_depth == 1 and load.kv_blocks_free == 0 and scene.client.responses)


def awaits_prefill(scene: Scene) -> bool:
    """Both have blocks for it, and the prefill worker computes another prompt."""
    return scene.running(Pool.PREFILL) == scene.running(Pool.DECODE) == 2


def prefilling(scene: Scene) -> bool:
    return scene.running(Pool.PREFILL) == scene.running(Pool.DECODE) == 1


def transferring(scene: Scene) -> bool:
    load = scene.worker(Pool.PREFILL).engine.load()
    holds = load.running == 0 and load.kv_blocks_free < load.kv_blocks_total
    return holds and scene.running(Pool.DECODE) == 1 and len(scene.client.responses) == 1


def decoding(scene: Scene) -> bool:
    load = scene.worker(Pool.PREFILL).engine.load()
    sent = load.kv_blocks_free == load.kv_blocks_total and not scene.worker(Pool.PREFILL).prefilled
    return sent and scene.running(Pool.DECODE) == 1 and len(scene.client.responses) > 1


def awaits_another_worker(scene: Scene) -> bool:
    decode = scene.worker(Pool.DECODE)
    return not decode.alive and not decode.calls and not scene.worker(Pool.PREFILL).calls


PHASES = [
    Phase("queued in the router", in_router_queue, decode=SLOW_DECODE, others=1, max_concurrent=1),
    Phase(
        "queued on D", awaits_blocks, HOLDS_KV, SLOW_DECODE, others=FILLS_KV, another_router=True
    ),
    Phase("reserved on D", awaits_prefill, SLOW_PREFILL, others=1),
    Phase("prefilling", prefilling, SLOW_PREFILL),
    Phase("transferring", transferring, HOLDS_KV, transfer_s=LONG_MS / 1000),
    Phase("decoding", decoding, decode=STEADY_DECODE),
    Phase("waiting for another D", awaits_another_worker, decode=STEADY_DECODE, loses_decode=True),
]


def new_client(cluster: SimCluster, name: str, timeout_s: float) -> SimClient:
    request = inference_pb2.GenerateRequest(request_id=name)
    request.token_ids.ids.extend(cluster.rng.randrange(3, 200) for _ in range(PROMPT_TOKENS))
    request.sampling.max_tokens = MAX_TOKENS
    return SimClient(request, cluster.clock, cluster.living_routers, timeout_s)


def held(cluster: SimCluster) -> dict[str, object]:
    """All that requests hold, by where."""
    router = cluster.routers[0]
    found: dict[str, object] = {"tasks": asyncio.all_tasks() - cluster.standing_tasks()}
    for name, worker in cluster.workers.items():
        if worker.alive:
            found[name] = worker.engine.load(), frozenset(worker.calls), frozenset(worker.prefilled)
        key = worker.record.key
        load = router.ledger.own_load(key)
        found[f"router's ledger of {name}"] = load.requests, load.tokens
    return found


async def reach(scene: Scene, phase: Phase) -> None:
    async with asyncio.timeout(PATIENCE_S / 2):
        if phase.loses_decode:
            while not decoding(scene):
                await elapse(0.001)
            scene.worker(Pool.DECODE).kill()
        while not phase.reached(scene):
            await elapse(0.001)


async def ends_early(phase: Phase, seed: int, end: grpc.StatusCode) -> None:
    limits = AdmissionLimits(phase.max_concurrent, {"only": ClassLimits(1, 4, LONG_MS)})
    async with SimCluster(random.Random(seed), limits) as cluster:
        cluster.transfer_s = phase.transfer_s
        cluster.add(Pool.PREFILL, phase.prefill)
        cluster.add(Pool.DECODE, phase.decode)
        await elapse(1)
        if phase.another_router:
            await cluster.add_router()
        router, theirs = cluster.routers[0], cluster.routers[-1]
        others = [
            asyncio.create_task(new_client(cluster, f"other-{n}", LONG_MS).call(theirs))
            for n in range(phase.others)
        ]
        await elapse(RENEW_S / 2)
        before = held(cluster)
        client = new_client(cluster, "mine", PATIENCE_S)
        scene = Scene(cluster, client, cluster.clock())
        call = asyncio.create_task(client.call(router))
        await reach(scene, phase)
        if end is grpc.StatusCode.CANCELLED:
            call.cancel()
            ended_s = cluster.clock()
        else:
            ended_s = client.deadline_s
            await elapse(ended_s - cluster.clock() - 0.001)
            assert phase.reached(scene), "it stayed in the phase"
            assert not call.done()
        asked = scene.asks(Pool.PREFILL), scene.asks(Pool.DECODE)
        await elapse(ended_s + FREED_S - cluster.clock())
        assert call.done()
        ((code, _),) = client.statuses
        assert code is end
        assert client.ended_s <= ended_s + 0.001
        assert (scene.asks(Pool.PREFILL), scene.asks(Pool.DECODE)) == asked
        after = held(cluster)
        if phase.loses_decode:
            del before["decode-2"]  # with all that it held
        assert after == before
        assert not any(call.done() for call in others)
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@pytest.mark.parametrize("end", [grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_whatever_phase_a_request_ends_in_nothing_of_it_is_left(
    phase: Phase, end: grpc.StatusCode
) -> None:
    for seed in SEEDS:
        run_virtually(ends_early(phase, seed, end), seed)
