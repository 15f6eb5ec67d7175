"""A worker that drains admits requests until routers have seen the drain. In virtual time."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from baton.v1 import inference_pb2
from core.errors import WORKER_DRAINING
from core.messages import worker_pb2
from core.rpc.status import from_rpc_error
from core.types import Pool, WorkerState
from engine.fake import FakeLatency, next_tokens
from router.admission.policy import AdmissionLimits, ClassLimits
from tests.support.scaled_cluster import ScaledCluster, scaled_config
from tests.support.simulated_cluster import POLL_S
from tests.support.simulated_replica import SimReplica
from tests.support.virtual_time import elapse, run_virtually

GRACE_S = 30.0
LIMITS = AdmissionLimits(64, {"only": ClassLimits(1, max_queue=64, queue_timeout_s=30.0)})
PROMPT = [1, 2, 3]
SOON_S = 0.05  # longer than a message takes, and a write to the store


async def call(worker: SimReplica, name: str) -> list[int]:
    """Send a request as a router does. Return its tokens, which take 0.3 s."""
    request = worker_pb2.DecodeRequest(
        key=worker_pb2.TransferKey(request_id=name, attempt=1),
        token_ids=PROMPT,
        sampling=inference_pb2.SamplingParams(max_tokens=4),
    )
    stream = worker.decode(request, timeout_s=100.0)
    return [token async for response in stream for token in response.token_ids]


async def check_drain(worker: SimReplica) -> None:
    """Check which requests a worker admits that has just announced its drain."""
    await elapse(2 * POLL_S - SOON_S)
    early = asyncio.create_task(call(worker, "from a router that has not looked yet"))
    await elapse(2 * SOON_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(worker, "late")
    assert from_rpc_error(caught.value, "w").reason == WORKER_DRAINING
    assert await early == list(next_tokens(PROMPT, 4))


@pytest.mark.parametrize("leaves", [True, False], ids=["it leaves", "it changes its pool"])
def test_a_draining_worker_admits_requests_until_routers_have_seen_the_drain(leaves: bool) -> None:
    async def run() -> None:
        async with ScaledCluster(random.Random(1), LIMITS, scaled_config(GRACE_S)) as cluster:
            worker = cluster.add(Pool.DECODE, FakeLatency(1.0, 100.0))
            await elapse(5.0)
            assert cluster.ready(Pool.DECODE) == [worker]
            leaving: asyncio.Task[None] | None = None
            if leaves:
                leaving = asyncio.create_task(worker.leave(GRACE_S))
            else:
                await cluster.registry.ask_to_change_role(worker.id, Pool.PREFILL)
            while worker.record.state is WorkerState.READY:
                await elapse(0.001)
            await check_drain(worker)
            if leaving is not None:
                await leaving
                assert not worker.alive
            else:
                await elapse(5.0)
                assert cluster.ready(Pool.PREFILL) == [worker]
            assert worker.cut_short == 0

    run_virtually(run(), 0)
