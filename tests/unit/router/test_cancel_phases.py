"""A request that ends early, in any phase, leaves nothing behind in the cluster.

These tests run in virtual time. The fake engine has no running step that must end first, so
everything must be free after 100 ms. tests/integration/test_cancel_engines.py tests real engines.
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

FREED_S = 0.1  # everything that a request held is free this long after its end
PROMPT_TOKENS = 20
MAX_TOKENS = CONTEXT_TOKENS - PROMPT_TOKENS
# This many requests with CONTEXT_TOKENS tokens each use all blocks of the decode worker.
FILLS_KV = KV_BLOCKS * 4 // CONTEXT_TOKENS
DEADLINE_S = 3.0  # each phase begins long before this deadline and lasts beyond it
LONG_MS = 60_000.0
SEEDS = range(10)

QUICK = FakeLatency(prefill_ms_per_token=0.1, decode_step_ms=1.0, transfer_ms=0.0)
SLOW_PREFILL = FakeLatency(prefill_ms_per_token=LONG_MS / PROMPT_TOKENS, decode_step_ms=1.0)
SLOW_DECODE = FakeLatency(prefill_ms_per_token=0.1, decode_step_ms=LONG_MS, transfer_ms=0.0)
STEADY_DECODE = FakeLatency(prefill_ms_per_token=0.1, decode_step_ms=200.0, transfer_ms=0.0)
SLOW_TRANSFER = FakeLatency(prefill_ms_per_token=0.1, decode_step_ms=1.0, transfer_ms=LONG_MS)


@dataclass(frozen=True)
class Scene:
    """One prefill worker, one decode worker, and the request that will end early."""

    cluster: SimCluster
    client: SimClient
    began_s: float

    def worker(self, pool: Pool) -> Any:
        (worker,) = (each for each in self.cluster.workers.values() if each.pool is pool)
        return worker

    def calls(self, pool: Pool) -> int:
        """Return how many calls the pool's worker has got for the request."""
        mine = f"{self.client.request.request_id}~"
        return sum(key.startswith(mine) for key in self.worker(pool).asked)

    def running(self, pool: Pool) -> int:
        running: int = self.worker(pool).engine.load().running
        return running


@dataclass(frozen=True)
class Phase:
    """A cluster in which a request stays in one phase.

    Attributes:
        reached: whether the request is in the phase.
        others: how many other requests start before the request and end after it.
        loses_decode: whether the decode worker is killed while the request decodes.
        another_router: whether the others run at another router. The request's router does not
            know their load yet, so it sends the request to the workers instead of queueing it.
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
    """After 0.5 s, the request is still not sent. Another request uses the only slot."""
    waited_s = scene.cluster.clock() - scene.began_s
    return waited_s > 0.5 and not scene.calls(Pool.PREFILL) and not scene.calls(Pool.DECODE)


def waits_for_blocks(scene: Scene) -> bool:
    load = scene.worker(Pool.DECODE).engine.load()
    return bool(load.queue_depth == 1 and load.kv_blocks_free == 0 and scene.client.responses)


def waits_for_prefill(scene: Scene) -> bool:
    """Both workers have reserved blocks. The prefill worker computes another request's prompt."""
    return scene.running(Pool.PREFILL) == scene.running(Pool.DECODE) == 2


def prefilling(scene: Scene) -> bool:
    return scene.running(Pool.PREFILL) == scene.running(Pool.DECODE) == 1


def transferring(scene: Scene) -> bool:
    load = scene.worker(Pool.PREFILL).engine.load()
    unsent = load.running == 0 and load.kv_blocks_free < load.kv_blocks_total
    return unsent and scene.running(Pool.DECODE) == 1 and len(scene.client.responses) == 1


def decoding(scene: Scene) -> bool:
    load = scene.worker(Pool.PREFILL).engine.load()
    sent = load.kv_blocks_free == load.kv_blocks_total and not scene.worker(Pool.PREFILL).prefilled
    return sent and scene.running(Pool.DECODE) == 1 and len(scene.client.responses) > 1


def waits_for_another_worker(scene: Scene) -> bool:
    decode = scene.worker(Pool.DECODE)
    return not decode.alive and not decode.calls and not scene.worker(Pool.PREFILL).calls


PHASES = [
    Phase(
        name="queued in the router",
        reached=in_router_queue,
        decode=SLOW_DECODE,
        others=1,
        max_concurrent=1,
    ),
    Phase(
        name="queued on the decode worker",
        reached=waits_for_blocks,
        prefill=SLOW_TRANSFER,
        decode=SLOW_DECODE,
        others=FILLS_KV,
        another_router=True,
    ),
    Phase(
        name="reserved on the decode worker",
        reached=waits_for_prefill,
        prefill=SLOW_PREFILL,
        others=1,
    ),
    Phase(name="prefilling", reached=prefilling, prefill=SLOW_PREFILL),
    Phase(
        name="transferring",
        reached=transferring,
        prefill=SLOW_TRANSFER,
        transfer_s=LONG_MS / 1000,
    ),
    Phase(name="decoding", reached=decoding, decode=STEADY_DECODE),
    Phase(
        name="waiting for another decode worker",
        reached=waits_for_another_worker,
        decode=STEADY_DECODE,
        loses_decode=True,
    ),
]


def new_client(cluster: SimCluster, name: str, timeout_s: float) -> SimClient:
    request = inference_pb2.GenerateRequest(request_id=name)
    request.token_ids.ids.extend(cluster.rng.randrange(3, 200) for _ in range(PROMPT_TOKENS))
    request.sampling.max_tokens = MAX_TOKENS
    return SimClient(request, cluster.clock, cluster.living_routers, timeout_s)


def resources(cluster: SimCluster) -> dict[str, object]:
    """Return everything that requests hold, by owner."""
    router = cluster.routers[0]
    found: dict[str, object] = {"tasks": asyncio.all_tasks() - cluster.standing_tasks()}
    for name, worker in cluster.workers.items():
        if worker.alive:
            found[name] = worker.engine.load(), frozenset(worker.calls), frozenset(worker.prefilled)
        key = worker.record.key
        load = router.ledger.own_load(key)
        found[f"router's ledger of {name}"] = load.requests, load.tokens
    return found


async def until_reached(scene: Scene, phase: Phase) -> None:
    async with asyncio.timeout(DEADLINE_S / 2):
        if phase.loses_decode:
            while not decoding(scene):
                await elapse(0.001)
            scene.worker(Pool.DECODE).kill()
        while not phase.reached(scene):
            await elapse(0.001)


async def check_early_end(phase: Phase, seed: int, end: grpc.StatusCode) -> None:
    limits = AdmissionLimits(
        phase.max_concurrent, {"only": ClassLimits(weight=1, max_queue=4, queue_timeout_s=LONG_MS)}
    )
    async with SimCluster(random.Random(seed), limits) as cluster:
        cluster.transfer_s = phase.transfer_s
        cluster.add(Pool.PREFILL, phase.prefill)
        cluster.add(Pool.DECODE, phase.decode)
        await elapse(1)
        if phase.another_router:
            await cluster.add_router()
        router, router_of_others = cluster.routers[0], cluster.routers[-1]
        others = [
            asyncio.create_task(new_client(cluster, f"other-{n}", LONG_MS).call(router_of_others))
            for n in range(phase.others)
        ]
        await elapse(RENEW_S / 2)
        before = resources(cluster)
        client = new_client(cluster, "mine", DEADLINE_S)
        scene = Scene(cluster, client, cluster.clock())
        call = asyncio.create_task(client.call(router))
        await until_reached(scene, phase)
        if end is grpc.StatusCode.CANCELLED:
            call.cancel()
            ended_s = cluster.clock()
        else:
            ended_s = client.deadline_s
            await elapse(ended_s - cluster.clock() - 0.001)
            assert phase.reached(scene), "the request is still in the phase"
            assert not call.done()
        calls = scene.calls(Pool.PREFILL), scene.calls(Pool.DECODE)
        await elapse(ended_s + FREED_S - cluster.clock())
        assert call.done()
        ((code, _),) = client.statuses
        assert code is end
        assert client.ended_s <= ended_s + 0.001
        assert (scene.calls(Pool.PREFILL), scene.calls(Pool.DECODE)) == calls
        after = resources(cluster)
        if phase.loses_decode:
            del before["decode-2"]  # the killed worker
        assert after == before
        assert not any(call.done() for call in others)
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@pytest.mark.parametrize("end", [grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_request_that_ends_in_any_phase_leaves_nothing(
    phase: Phase, end: grpc.StatusCode
) -> None:
    for seed in SEEDS:
        run_virtually(check_early_end(phase, seed, end), seed)
