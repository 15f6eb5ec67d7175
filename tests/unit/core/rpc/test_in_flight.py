from __future__ import annotations

import asyncio

import pytest

from core.errors import UnavailableError
from core.rpc.in_flight import InFlight

pytestmark = pytest.mark.asyncio


class Call:
    """One that is served until ``end``."""

    def __init__(self, calls: InFlight, key: str) -> None:
        self.end = asyncio.Event()
        self.task = asyncio.create_task(self._serve(calls, key))

    async def _serve(self, calls: InFlight, key: str) -> None:
        with calls.track(key):
            await self.end.wait()


def make() -> InFlight:
    return InFlight(lambda: UnavailableError("leaves", reason="LEAVES"))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_drained_is_when_the_last_call_has_ended() -> None:
    calls = make()
    await calls.drained()
    first, second = Call(calls, "a"), Call(calls, "b")
    await turns()
    assert len(calls) == 2
    drained = asyncio.create_task(calls.drained())
    first.end.set()
    await turns()
    assert "a" not in calls
    assert not drained.done()
    second.end.set()
    await drained
    assert len(calls) == 0


async def test_who_is_sent_away_is_told_and_who_cancels_is_not() -> None:
    calls = make()
    first, second = Call(calls, "a"), Call(calls, "b")
    await turns()
    second.task.cancel()
    await turns()
    assert second.task.cancelled()
    calls.send_away()
    calls.send_away()  # once is enough
    await calls.drained()
    with pytest.raises(UnavailableError, match="leaves"):
        await first.task
