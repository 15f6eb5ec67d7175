from __future__ import annotations

import asyncio
import random

import pytest

from cluster.errors import CapacityError, DeadlineError
from router.admission import AdmissionLimits, AdmissionState, Verdict, decide
from router.gate import Admission

LIMITS = AdmissionLimits(max_concurrent=2, max_queue=3, queue_timeout_s=30)
FAR_S = 1e6


def verdict(running: int, waiting: int) -> Verdict:
    return decide(LIMITS, AdmissionState(running, waiting, 0.0), 10.0, 0.0).verdict


def test_verdicts() -> None:
    assert verdict(0, 0) is Verdict.ADMITTED
    assert verdict(1, 0) is Verdict.ADMITTED
    assert verdict(2, 0) is Verdict.QUEUED
    assert verdict(2, 2) is Verdict.QUEUED
    assert verdict(2, 3) is Verdict.REJECTED
    assert verdict(1, 1) is Verdict.QUEUED, "nobody passes those who wait"


def test_a_wait_ends_by_the_deadline_or_the_bound() -> None:
    state = AdmissionState(2, 0, 0.0)
    assert decide(LIMITS, state, deadline_s=105.0, now_s=100.0).wait_until_s == 105.0
    assert decide(LIMITS, state, deadline_s=500.0, now_s=100.0).wait_until_s == 130.0


def test_the_retry_hint_follows_the_rate_of_departures() -> None:
    hints = [
        decide(LIMITS, AdmissionState(2, 3, mean_s), 10.0, 0.0).retry_after_s
        for mean_s in (0.0, 1.0, 1000.0)
    ]
    assert hints == [0.1, 2.0, 30.0]


class Gate:
    """An Admission whose users are tasks that hold their slot until told to leave."""

    def __init__(self, limits: AdmissionLimits = LIMITS) -> None:
        self.admission = Admission(limits, asyncio.get_running_loop().time)
        self.order: list[str] = []

    def user(
        self, name: str, deadline_s: float = FAR_S
    ) -> tuple[asyncio.Task[None], asyncio.Event]:
        leave = asyncio.Event()

        async def use() -> None:
            async with self.admission.slot(deadline_s):
                self.order.append(name)
                await leave.wait()

        return asyncio.create_task(use()), leave


async def turns(count: int = 5) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        turn = loop.create_future()
        loop.call_soon(turn.set_result, None)
        await turn


@pytest.mark.asyncio
async def test_slots_go_to_the_earliest_deadline_first() -> None:
    gate = Gate(AdmissionLimits(1, 10, 30))
    first, leave = gate.user("first")
    await turns()
    users = [gate.user(name, FAR_S + after) for name, after in (("c", 3), ("a", 1), ("b", 2))]
    await turns()
    leave.set()
    for _, leave_next in users:
        leave_next.set()
    await asyncio.gather(first, *(task for task, _ in users))
    assert gate.order == ["first", "a", "b", "c"]
    assert gate.admission.state.running == 0


@pytest.mark.asyncio
async def test_a_full_queue_refuses_at_once() -> None:
    gate = Gate()
    users = [gate.user(str(i)) for i in range(5)]
    await turns()
    with pytest.raises(CapacityError) as caught:
        async with gate.admission.slot(FAR_S):
            pass
    assert caught.value.reason == "QUEUE_FULL"
    for _, leave in users:
        leave.set()
    await asyncio.gather(*(task for task, _ in users))


@pytest.mark.asyncio
async def test_who_is_cancelled_leaves_the_queue() -> None:
    gate = Gate(AdmissionLimits(1, 10, 30))
    first, leave = gate.user("first")
    second, _ = gate.user("second")
    third, leave_third = gate.user("third")
    await turns()
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert gate.admission.state.waiting == 1
    leave.set()
    leave_third.set()
    await asyncio.gather(first, third)
    assert gate.order == ["first", "third"]


@pytest.mark.asyncio
async def test_waits_are_bounded() -> None:
    gate = Gate(AdmissionLimits(1, 10, 0.01))
    first, leave = gate.user("first")
    await turns()
    now_s = asyncio.get_running_loop().time()
    with pytest.raises(CapacityError) as caught:
        async with gate.admission.slot(now_s + 60):
            pass
    assert caught.value.reason == "QUEUE_TIMEOUT"
    with pytest.raises(DeadlineError):
        async with gate.admission.slot(now_s):
            pass
    assert gate.admission.state.waiting == 0
    leave.set()
    await first


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(30))
async def test_random_comings_cancels_and_goings_leak_no_slot(seed: int) -> None:
    rng = random.Random(seed)
    gate = Gate(AdmissionLimits(3, 5, 30))
    tasks: list[asyncio.Task[None]] = []
    leaves: list[asyncio.Event] = []
    for _ in range(200):
        action = rng.random()
        if action < 0.5:
            task, leave = gate.user("x", FAR_S + rng.random())
            tasks.append(task)
            leaves.append(leave)
        elif action < 0.75 and tasks:
            rng.choice(tasks).cancel()
        elif leaves:
            rng.choice(leaves).set()
        await turns(rng.randrange(3))
        state = gate.admission.state
        assert state.running <= 3, f"seed {seed}"
        assert state.waiting <= 5, f"seed {seed}"
    for leave in leaves:
        leave.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (gate.admission.state.running, gate.admission.state.waiting) == (0, 0), f"seed {seed}"


@pytest.mark.asyncio
async def test_a_slot_granted_to_one_who_is_cancelled_in_the_same_turn_goes_on() -> None:
    gate = Gate(AdmissionLimits(1, 10, 30))

    async def leave_and_cancel() -> None:
        async with gate.admission.slot(FAR_S):
            await turns()
        second.cancel()  # it holds the slot already and has not run since

    first = asyncio.create_task(leave_and_cancel())
    await turns(1)
    second, _ = gate.user("second")
    third, leave_third = gate.user("third")
    leave_third.set()
    await asyncio.gather(first, third)
    await asyncio.gather(second, return_exceptions=True)
    assert gate.order == ["third"]
    assert gate.admission.state.running == 0
