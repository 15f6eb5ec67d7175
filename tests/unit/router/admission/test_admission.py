from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from core.errors import CapacityError, DeadlineError, InvalidArgumentError, UnavailableError
from router.admission.gate import AdmissionGate
from router.admission.policy import (
    AdmissionLimits,
    AdmissionRequest,
    ClassLimits,
    Queues,
    decide_admission,
    decide_dispatch,
)
from tests.support.virtual_time import elapse, run_virtually

FAR_S = 1e6


def one_class(max_concurrent: int, max_queue: int, queue_timeout_s: float) -> AdmissionLimits:
    return AdmissionLimits(max_concurrent, {"c": ClassLimits(1, max_queue, queue_timeout_s)})


LIMITS = one_class(2, 3, 30)


def reason(
    *,
    waiting: int = 0,
    before: float = 0,
    rate: float = 0,
    left_s: float = 100,
    service_s: float = 0,
) -> str | None:
    refusal = decide_admission(
        LIMITS,
        AdmissionRequest("c", 1000 + left_s, service_s),
        waiting=waiting,
        before=before,
        ends_per_s=rate,
        now_s=1000,
    )
    return refusal.reason if refusal is not None else None


def test_a_full_queue_refuses() -> None:
    assert reason(waiting=2) is None
    assert reason(waiting=3) == "QUEUE_FULL"


def test_a_wait_that_would_be_too_long_is_refused_at_once() -> None:
    assert reason(before=59, rate=2) is None  # 30 s
    assert reason(before=60, rate=2) == "QUEUE_FULL"
    assert reason(before=60, rate=0) is None, "nobody knows how long it would be"


def test_who_would_be_late_is_refused_at_once() -> None:
    # 10 s of waiting, of at least twice as much to spare.
    assert reason(before=9, rate=1, left_s=25, service_s=5) is None
    assert reason(before=9, rate=1, left_s=24, service_s=5) == "WOULD_BE_LATE"
    assert reason(rate=0, left_s=4, service_s=5) == "WOULD_BE_LATE"
    assert decide_dispatch(AdmissionRequest("c", 10, 5), now_s=5) is None
    assert decide_dispatch(AdmissionRequest("c", 10, 5), now_s=5.1) is not None


def test_the_retry_hint_is_the_wait() -> None:
    hints = [
        refusal.retry_after_s
        for rate in (0, 100, 2, 0.01)
        if (
            refusal := decide_admission(
                LIMITS,
                AdmissionRequest("c", 1e9),
                waiting=3,
                before=9,
                ends_per_s=rate,
                now_s=0,
            )
        )
        is not None
    ]
    assert hints == [0.1, 0.1, 5, 60]


def queues(**classes: tuple[int, dict[str, float]]) -> Queues[str]:
    """Of classes by name: their weights, and who waits in them with which deadlines."""
    limits = {name: ClassLimits(weight, 99, 99) for name, (weight, _) in classes.items()}
    made: Queues[str] = Queues(limits)
    for name, (_, items) in classes.items():
        for item, deadline_s in items.items():
            made.push(AdmissionRequest(name, deadline_s), item)
    return made


def drain(waiting: Queues[str], count: int = 1000) -> list[str]:
    order: list[str] = []
    while len(order) < count and (head := waiting.peek()):
        order.append(head[1])
        waiting.pop()
    return order


def test_the_earliest_deadline_is_first_and_equal_ones_keep_their_order() -> None:
    waiting = queues(c=(1, {"late": 9, "first": 1, "second": 1, "mid": 5}))
    assert drain(waiting) == ["first", "second", "mid", "late"]


def test_classes_share_by_weight() -> None:
    waiting = queues(
        a=(3, {f"a{i}": i for i in range(30)}),
        b=(1, {f"b{i}": i for i in range(30)}),
    )
    order = drain(waiting)
    assert Counter(item[0] for item in order[:20]) == {"a": 15, "b": 5}
    assert len(order) == 60, "nobody is left behind"


def test_costly_requests_take_more_of_their_class_share() -> None:
    waiting: Queues[str] = Queues({name: ClassLimits(1, 99, 99) for name in "ab"})
    for index in range(30):
        waiting.push(AdmissionRequest("a", index, cost=1), "a")
        waiting.push(AdmissionRequest("b", index, cost=4), "b")
    assert Counter(drain(waiting, 20)) == {"a": 16, "b": 4}


def test_a_class_that_was_empty_saved_nothing_up() -> None:
    waiting = queues(a=(1, {f"a{i}": i for i in range(30)}), b=(1, {}))
    drain(waiting, 10)
    for index in range(10):
        waiting.push(AdmissionRequest("b", index), f"b{index}")
    assert Counter(item[0] for item in drain(waiting, 10)) == {"a": 5, "b": 5}


@pytest.mark.parametrize("seed", range(20))
def test_how_many_run_before_one_is_known(seed: int) -> None:
    rng = random.Random(seed)
    classes = {name: ClassLimits(rng.randint(1, 8), 99, 99) for name in "abc"}
    waiting: Queues[str] = Queues(classes)
    for _ in range(rng.randrange(60)):
        waiting.push(AdmissionRequest(rng.choice("abc"), rng.random()), "other")
    mine = AdmissionRequest(rng.choice("abc"), rng.random())
    expected = waiting.before(mine)
    waiting.push(mine, "mine")
    # Up to one turn of each other class, by its weight.
    slack = 1 + sum(each.weight for each in classes.values()) / classes[mine.service_class].weight
    assert abs(drain(waiting).index("mine") - expected) <= slack


class Room:
    """Takes one of some places."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._open = True
        gate.places -= 1

    def close(self) -> None:
        if self._open:
            self._open = False
            self._gate.places += 1
            self._gate.admission.wake()


class Gate:
    """An Admission whose users are tasks that hold their room until told to leave."""

    def __init__(self, limits: AdmissionLimits = LIMITS, places: int = 1000) -> None:
        self.admission = AdmissionGate(limits, asyncio.get_running_loop().time)
        self.places = places
        self.error: UnavailableError | None = None
        self.order: list[str] = []

    def take(self) -> Room | None:
        if self.error is not None:
            raise self.error
        return Room(self) if self.places else None

    def user(
        self, name: str, deadline_s: float = FAR_S
    ) -> tuple[asyncio.Task[None], asyncio.Event]:
        leave = asyncio.Event()

        async def use() -> None:
            async with self.admission.admit(AdmissionRequest("c", deadline_s), self.take):
                self.order.append(name)
                await leave.wait()

        return asyncio.create_task(use()), leave


async def turns(count: int = 5) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        turn = loop.create_future()
        loop.call_soon(turn.set_result, None)
        await turn


@pytest.mark.parametrize(("max_concurrent", "places"), [(1, 1000), (1000, 1)])
async def test_room_goes_to_the_earliest_deadline_first(max_concurrent: int, places: int) -> None:
    gate = Gate(one_class(max_concurrent, 10, 30), places)
    first, leave = gate.user("first")
    await turns()
    users = [gate.user(name, FAR_S + after) for name, after in (("c", 3), ("a", 1), ("b", 2))]
    await turns()
    leave.set()
    for _, leave_next in users:
        leave_next.set()
    await asyncio.gather(first, *(task for task, _ in users))
    assert gate.order == ["first", "a", "b", "c"]
    assert gate.admission.running == 0
    assert gate.places == places


async def test_a_full_queue_refuses_a_newcomer_at_once() -> None:
    gate = Gate()
    users = [gate.user(str(i)) for i in range(5)]
    await turns()
    with pytest.raises(CapacityError) as caught:
        async with gate.admission.admit(AdmissionRequest("c", FAR_S), gate.take):
            pass
    assert caught.value.reason == "QUEUE_FULL"
    for _, leave in users:
        leave.set()
    await asyncio.gather(*(task for task, _ in users))


async def test_who_is_cancelled_leaves_the_queue() -> None:
    gate = Gate(one_class(1, 10, 30))
    first, leave = gate.user("first")
    second, _ = gate.user("second")
    third, leave_third = gate.user("third")
    await turns()
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert gate.admission.waiting == 1
    leave.set()
    leave_third.set()
    await asyncio.gather(first, third)
    assert gate.order == ["first", "third"]


def test_waits_are_bounded() -> None:
    async def run() -> None:
        gate = Gate(one_class(1, 10, 2))
        first, leave = gate.user("first")
        await turns()
        now_s = asyncio.get_running_loop().time()
        with pytest.raises(CapacityError) as caught:
            async with gate.admission.admit(AdmissionRequest("c", now_s + 60), gate.take):
                pass
        assert caught.value.reason == "QUEUE_TIMEOUT"
        assert asyncio.get_running_loop().time() == pytest.approx(now_s + 2)
        with pytest.raises(DeadlineError):
            async with gate.admission.admit(AdmissionRequest("c", now_s + 3), gate.take):
                pass
        assert asyncio.get_running_loop().time() == pytest.approx(now_s + 3)
        assert gate.admission.waiting == 0
        leave.set()
        await first

    run_virtually(run(), 0)


async def test_an_expired_request_takes_no_room() -> None:
    gate = Gate()
    with pytest.raises(DeadlineError):
        async with gate.admission.admit(AdmissionRequest("c", 0.0), gate.take):
            pass
    assert gate.places == 1000


def test_a_wait_that_is_known_to_be_too_long_does_not_begin() -> None:
    async def run() -> None:
        gate = Gate(one_class(2, 100, 5))
        for _ in range(40):  # each runs for 2 s: one a second
            async with gate.admission.admit(AdmissionRequest("c", FAR_S), gate.take):
                await elapse(2)
        users = [gate.user(str(i)) for i in range(2 + 5)]
        await turns()
        assert gate.admission.waiting == 5
        with pytest.raises(CapacityError) as caught:
            gate.admission.check(AdmissionRequest("c", FAR_S))
        assert caught.value.retry_after_s == pytest.approx(6, rel=0.1)
        for _, leave in users:
            leave.set()
        await asyncio.gather(*(task for task, _ in users))

    run_virtually(run(), 0)


def test_whose_turn_comes_too_late_is_not_begun() -> None:
    async def run() -> None:
        gate = Gate(one_class(1, 10, 1000))
        first, leave = gate.user("first")
        await turns()

        async def ask() -> None:
            async with gate.admission.admit(AdmissionRequest("c", 10, service_s=4), gate.take):
                raise AssertionError("it cannot be done in time")

        second = asyncio.create_task(ask())
        await elapse(7)
        leave.set()
        with pytest.raises(CapacityError) as caught:
            await second
        assert caught.value.reason == "WOULD_BE_LATE"
        await first
        assert gate.admission.running == gate.admission.waiting == 0

    run_virtually(run(), 0)


async def test_those_who_wait_are_told_when_there_can_be_no_room() -> None:
    gate = Gate(one_class(10, 10, 30), places=1)
    first, leave = gate.user("first")
    waiting = [gate.user("x")[0] for _ in range(3)]
    await turns()
    gate.error = UnavailableError("all workers are gone")
    leave.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert results == [gate.error] * 3
    await first
    assert gate.admission.running == gate.admission.waiting == 0


async def test_classes_by_name() -> None:
    limits = AdmissionLimits(1, {name: ClassLimits(1, 2, 30) for name in ("fast", "slow")})
    admission = AdmissionGate(limits, asyncio.get_running_loop().time)
    assert [admission.class_of(name) for name in ("", "slow")] == ["fast", "slow"]
    assert admission.max_requests == 5
    with pytest.raises(InvalidArgumentError, match="'other'; this cluster knows fast, slow"):
        admission.class_of("other")


@pytest.mark.parametrize("seed", range(30))
async def test_random_comings_cancels_and_goings_leak_no_room(seed: int) -> None:
    rng = random.Random(seed)
    gate = Gate(one_class(3, 5, 30), places=rng.choice((2, 1000)))
    places = gate.places
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
        assert gate.admission.running <= 3, f"seed {seed}"
        assert gate.admission.waiting <= 5, f"seed {seed}"
    for leave in leaves:
        leave.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (gate.admission.running, gate.admission.waiting) == (0, 0), f"seed {seed}"
    assert gate.places == places, f"seed {seed}"


async def test_room_granted_to_one_who_is_cancelled_in_the_same_turn_goes_on() -> None:
    gate = Gate(one_class(1, 10, 30))

    async def leave_and_cancel() -> None:
        async with gate.admission.admit(AdmissionRequest("c", FAR_S), gate.take):
            await turns()
        second.cancel()  # it holds the room already and has not run since

    first = asyncio.create_task(leave_and_cancel())
    await turns(1)
    second, _ = gate.user("second")
    third, leave_third = gate.user("third")
    leave_third.set()
    await asyncio.gather(first, third)
    await asyncio.gather(second, return_exceptions=True)
    assert gate.order == ["third"]
    assert gate.admission.running == 0
    assert gate.places == 1000
