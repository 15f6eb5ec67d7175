"""Calls in flight: waiting for their end, and ending them early."""

from __future__ import annotations

import asyncio

import pytest

from core.errors import UnavailableError
from core.rpc.in_flight import InFlight

pytestmark = pytest.mark.asyncio


class Call:
    """A call in flight that is served until ``end`` is set."""

    def __init__(self, calls: InFlight, key: str) -> None:
        self.end = asyncio.Event()
        self.task = asyncio.create_task(self._serve(calls, key))

    async def _serve(self, calls: InFlight, key: str) -> None:
        with calls.track(key):
            await self.end.wait()


def make() -> InFlight:
    return InFlight(lambda: UnavailableError("the server shuts down", reason="DRAINING"))


async def run_other_tasks() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_drained_returns_when_the_last_call_has_ended() -> None:
    calls = make()
    await calls.drained()
    first, second = Call(calls, "a"), Call(calls, "b")
    await run_other_tasks()
    assert len(calls) == 2
    drained = asyncio.create_task(calls.drained())
    first.end.set()
    await run_other_tasks()
    assert "a" not in calls
    assert not drained.done()
    second.end.set()
    await drained
    assert len(calls) == 0


async def test_a_call_sent_away_gets_an_error_and_a_cancelled_call_does_not() -> None:
    calls = make()
    first, second = Call(calls, "a"), Call(calls, "b")
    await run_other_tasks()
    second.task.cancel()
    await run_other_tasks()
    assert second.task.cancelled()
    calls.send_away()
    calls.send_away()  # idempotent
    await calls.drained()
    with pytest.raises(UnavailableError, match="shuts down"):
        await first.task
