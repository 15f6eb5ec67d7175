"""The liveness probe finds an engine that hangs. The tests run in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from core.errors import WorkerLostError
from tests.support.virtual_time import elapse, run_virtually
from worker.liveness import LivenessProbe

TIMEOUT_S = 5.0


class Core:
    """An engine core that answers a ping between two steps."""

    def __init__(self) -> None:
        self.pings = 0
        self.answered = 0
        self.between_steps = asyncio.Event()
        self.between_steps.set()
        self.defect: Exception | None = None

    async def ping(self) -> None:
        self.pings += 1
        await self.between_steps.wait()
        self.answered += 1
        if self.defect is not None:
            raise self.defect


@asynccontextmanager
async def probed(core: Core) -> AsyncIterator[LivenessProbe]:
    probe = LivenessProbe(core.ping, TIMEOUT_S, asyncio.get_running_loop().time)
    try:
        yield probe
    finally:
        await probe.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def checks(probe: LivenessProbe, count: int) -> None:
    """Check ``count`` times, once a second."""
    for _ in range(count):
        await probe.check()
        await elapse(1)


def virtually(test: Callable[[Core], Coroutine[Any, Any, None]]) -> None:
    run_virtually(test(Core()), seed=0)


def test_an_engine_that_answers_is_pinged_at_each_check_and_never_hangs() -> None:
    async def run(core: Core) -> None:
        async with probed(core) as probe:
            await checks(probe, 50)
            assert core.pings == 50
            await elapse(50)  # a pause between two checks is no hang
            await checks(probe, 1)

    virtually(run)


def test_an_engine_that_does_not_answer_within_the_timeout_hangs() -> None:
    async def run(core: Core) -> None:
        async with probed(core) as probe:
            await checks(probe, 10)
            core.between_steps.clear()
            await checks(probe, 6)
            for silent_s in (6, 8):
                with pytest.raises(WorkerLostError, match=f"done nothing for {silent_s} s"):
                    await probe.check()
                await elapse(1)
            assert core.pings - core.answered == 1, "there is at most one ping at a time"
            core.between_steps.set()
            await elapse(1)
            await checks(probe, 10)
            assert core.pings == 21, "the probe pings again after the engine has answered"

    virtually(run)


def test_a_step_that_takes_the_whole_timeout_is_no_hang() -> None:
    async def run(core: Core) -> None:
        async with probed(core) as probe:
            for steps in range(1, 4):
                core.between_steps.clear()
                await checks(probe, 6)
                assert core.pings == steps
                core.between_steps.set()
                await elapse(0)

    virtually(run)


def test_a_check_of_a_hanging_engine_takes_less_than_a_second() -> None:
    async def run(core: Core) -> None:
        core.between_steps.clear()
        async with probed(core) as probe:
            await checks(probe, 1)
            await elapse(100)
            with pytest.raises(WorkerLostError):
                async with asyncio.timeout(1):
                    await probe.check()

    virtually(run)


def test_an_answer_that_was_not_read_in_time_counts() -> None:
    """After a suspension of the worker's process, time has passed, but no task has run."""

    async def run(core: Core) -> None:
        now_s = 0.0
        probe = LivenessProbe(core.ping, TIMEOUT_S, lambda: now_s)
        await probe.check()
        now_s += 100
        await probe.check()
        assert core.pings == 1
        await elapse(0)
        assert core.pings == 2
        await probe.close()

    virtually(run)


def test_a_check_raises_the_error_of_the_last_ping() -> None:
    async def run(core: Core) -> None:
        core.defect = ValueError("no such thing")
        async with probed(core) as probe:
            await checks(probe, 1)
            with pytest.raises(ValueError, match="no such thing"):
                await probe.check()

    virtually(run)
