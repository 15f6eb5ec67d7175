"""A task that must always run is started again when it fails, and its process knows of it."""

from __future__ import annotations

import asyncio

import pytest

from core.tasks import HEALTHY_S, MAX_FAILURES, RESTART_S, Supervisor
from tests.support.virtual_time import elapse, run_virtually


@pytest.mark.parametrize("ending", ["raises", "returns", "cancels itself"])
def test_a_task_that_ends_is_started_again(ending: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        changes: list[bool] = []
        starts = 0
        supervisor = Supervisor(lambda: changes.append(supervisor.failing))

        async def work() -> None:
            nonlocal starts
            starts += 1
            if starts > 2:
                await asyncio.get_running_loop().create_future()
            if ending == "raises":
                raise KeyError("a defect")
            if ending == "cancels itself":
                raise asyncio.CancelledError

        supervisor.start("work", work)
        await elapse(2.5 * RESTART_S)
        assert starts == 3
        assert changes == [True, True]
        assert not supervisor.has_given_up
        await elapse(HEALTHY_S)
        assert changes == [True, True, False]
        await supervisor.stop()

    run_virtually(scenario(), seed=1)
    assert "it is started again" in caplog.text
    assert ("KeyError: 'a defect'" in caplog.text) == (ending == "raises")


def test_a_task_that_always_fails_gives_its_process_up() -> None:
    async def scenario() -> None:
        supervisor = Supervisor()

        async def work() -> None:
            raise KeyError("a defect")

        supervisor.start("work", work)
        await elapse((MAX_FAILURES - 1.5) * RESTART_S)
        early = supervisor.has_given_up
        await elapse(RESTART_S)
        assert (early, supervisor.has_given_up) == (False, True)
        await supervisor.stop()

    run_virtually(scenario(), seed=1)
