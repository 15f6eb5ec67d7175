"""Before a client sends a request, it can tell whether the worker is reachable."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from router.workers.client import WorkerClient
from tests.support.fake_workers import FakePrefill
from tests.support.waiting import until_awaited

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def client(address: str, connect_timeout_s: float = 5) -> AsyncIterator[WorkerClient]:
    client = WorkerClient(
        address,
        credentials=None,
        connect_timeout_s=connect_timeout_s,
        max_message_bytes=1000,
        silence_s=60,
    )
    yield client
    await client.close()


async def test_a_worker_is_connected_until_it_dies() -> None:
    worker = FakePrefill()
    await worker.start()
    async with client(worker.record.address) as to_worker:
        assert await to_worker.connected()
        assert await to_worker.connected()
        await worker.stop()

        async def lost() -> bool:
            return not await to_worker.connected()

        await until_awaited(lost, what="the client notices that the worker died")
        async with asyncio.timeout(1):
            assert not await to_worker.connected()


async def test_a_worker_that_accepts_connections_but_is_silent_is_not_connected() -> None:
    """Checks that wait at the same time report this, and so does a later check."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "{}:{}".format(*listener.getsockname())
        async with client(address, connect_timeout_s=0.2) as to_silent, asyncio.timeout(2):
            assert await asyncio.gather(*(to_silent.connected() for _ in range(3))) == [False] * 3
            assert not await to_silent.connected()


async def test_a_cancelled_wait_does_not_disturb_other_waits() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "{}:{}".format(*listener.getsockname())
        async with client(address, connect_timeout_s=0.3) as to_silent:
            waiting = asyncio.create_task(to_silent.connected())
            cancelled = asyncio.create_task(to_silent.connected())
            await asyncio.sleep(0)
            cancelled.cancel()
            assert not await waiting
            assert cancelled.cancelled()
