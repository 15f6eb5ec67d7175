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
    """Answers between two steps."""

    def __init__(self) -> None:
        self.asked = 0
        self.answered = 0
        self.between_steps = asyncio.Event()
        self.between_steps.set()
        self.defect: Exception | None = None

    async def ask(self) -> None:
        self.asked += 1
        await self.between_steps.wait()
        self.answered += 1
        if self.defect is not None:
            raise self.defect


@asynccontextmanager
async def probed(core: Core) -> AsyncIterator[LivenessProbe]:
    probe = LivenessProbe(core.ask, TIMEOUT_S, asyncio.get_running_loop().time)
    try:
        yield probe
    finally:
        await probe.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def checks(probe: LivenessProbe, count: int) -> None:
    """One a second."""
    for _ in range(count):
        await probe.check()
        await elapse(1)


def virtually(test: Callable[[Core], Coroutine[Any, Any, None]]) -> None:
    run_virtually(test(Core()), seed=0)


def test_an_engine_that_answers_is_asked_at_each_check_and_never_hangs() -> None:
    async def run(core: Core) -> None:
        async with probed(core) as probe:
            await checks(probe, 50)
            assert core.asked == 50
            await elapse(50)  # whoever checks was away
            await checks(probe, 1)

    virtually(run)


def test_an_engine_hangs_that_gives_no_answer_for_the_timeout() -> None:
    async def run(core: Core) -> None:
        async with probed(core) as probe:
            await checks(probe, 10)
            core.between_steps.clear()
            await checks(probe, 6)
            for silent_s in (6, 8):
                with pytest.raises(WorkerLostError, match=f"done nothing for {silent_s} s"):
                    await probe.check()
                await elapse(1)
            assert core.asked - core.answered == 1, "questions don't pile up"
            core.between_steps.set()
            await elapse(1)
            await checks(probe, 10)
            assert core.asked == 21, "it is asked again when it is back"

    virtually(run)


def test_a_step_as_long_as_the_timeout_is_no_hang() -> None:
    async def run(core: Core) -> None:
        async with probed(core) as probe:
            for steps in range(1, 4):
                core.between_steps.clear()
                await checks(probe, 6)
                assert core.asked == steps
                core.between_steps.set()
                await elapse(0)

    virtually(run)


def test_a_check_takes_no_longer_than_the_last_look() -> None:
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
    """As after a stop of this process, in which time has passed and nothing has run."""

    async def run(core: Core) -> None:
        now_s = 0.0
        probe = LivenessProbe(core.ask, TIMEOUT_S, lambda: now_s)
        await probe.check()
        now_s += 100
        await probe.check()
        assert core.asked == 1
        await elapse(0)
        assert core.asked == 2
        await probe.close()

    virtually(run)


def test_what_the_question_ends_in_is_not_lost() -> None:
    async def run(core: Core) -> None:
        core.defect = ValueError("no such thing")
        async with probed(core) as probe:
            await checks(probe, 1)
            with pytest.raises(ValueError, match="no such thing"):
                await probe.check()

    virtually(run)
