from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from typing import Any, cast

import pytest

from core.errors import CapacityError, DeadlineError, InvalidArgumentError, UnavailableError
from core.types import Pool
from router.admission.gate import AdmissionGate
from router.admission.policy import (
    AdmissionLimits,
    AdmissionRequest,
    ClassLimits,
    Queues,
    decide_admission,
    decide_dispatch,
)
from router.admission.turns import MAX_PASSED
from router.room import NoRoom
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
    assert reason(before=60, rate=0) is None, "the wait is unknown"


def test_a_request_that_would_be_late_is_refused_at_once() -> None:
    # The wait is 10 s. It may take half of the spare time (time left minus service time).
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
    """Return filled queues. Each argument is ``class=(weight, {item: deadline_s})``."""
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
        waiting.start(head[1])
    return order


def test_the_earliest_deadline_is_first_and_equal_deadlines_keep_their_order() -> None:
    waiting = queues(c=(1, {"late": 9, "first": 1, "second": 1, "mid": 5}))
    assert drain(waiting) == ["first", "second", "mid", "late"]


def test_classes_share_by_weight() -> None:
    waiting = queues(
        a=(3, {f"a{i}": i for i in range(30)}),
        b=(1, {f"b{i}": i for i in range(30)}),
    )
    order = drain(waiting)
    assert Counter(item[0] for item in order[:20]) == {"a": 15, "b": 5}
    assert len(order) == 60, "every request got its turn"


def test_costly_requests_take_more_of_their_class_share() -> None:
    waiting: Queues[str] = Queues({name: ClassLimits(1, 99, 99) for name in "ab"})
    for index in range(30):
        waiting.push(AdmissionRequest("a", index, cost=1), "a")
        waiting.push(AdmissionRequest("b", index, cost=4), "b")
    assert Counter(drain(waiting, 20)) == {"a": 16, "b": 4}


def test_an_empty_class_saves_nothing_up() -> None:
    waiting = queues(a=(1, {f"a{i}": i for i in range(30)}), b=(1, {}))
    drain(waiting, 10)
    for index in range(10):
        waiting.push(AdmissionRequest("b", index), f"b{index}")
    assert Counter(item[0] for item in drain(waiting, 10)) == {"a": 5, "b": 5}


@pytest.mark.parametrize("seed", range(20))
def test_the_estimate_of_how_many_run_before_a_request(seed: int) -> None:
    rng = random.Random(seed)
    classes = {name: ClassLimits(rng.randint(1, 8), 99, 99) for name in "abc"}
    waiting: Queues[str] = Queues(classes)
    for number in range(rng.randrange(60)):
        waiting.push(AdmissionRequest(rng.choice("abc"), rng.random()), f"other {number}")
    mine = AdmissionRequest(rng.choice("abc"), rng.random())
    expected = waiting.before(mine)
    waiting.push(mine, "mine")
    # Allowed error: 1 + the requests that all classes run while the class of ``mine`` runs one.
    slack = 1 + sum(each.weight for each in classes.values()) / classes[mine.service_class].weight
    assert abs(drain(waiting).index("mine") - expected) <= slack


class FakePermit:
    """Takes free places of the harness until it is closed."""

    def __init__(self, harness: GateHarness, needs: int) -> None:
        self._harness = harness
        self._needs = needs
        self._open = True
        harness.places -= needs

    def close(self) -> None:
        if self._open:
            self._open = False
            self._harness.places += self._needs
            self._harness.gate.wake()


class GateHarness:
    """An AdmissionGate, a limited number of permits, and requests that run as tasks.

    Attributes:
        places: how many permits are free.
        no_room: what ``acquire`` returns if too few places are free.
        error: if set, ``acquire`` raises it.
        order: names of the requests, in the order in which they began to run.
    """

    def __init__(self, limits: AdmissionLimits = LIMITS, places: int = 1000) -> None:
        self.gate = AdmissionGate(limits, asyncio.get_running_loop().time)
        self.places = places
        self.no_room = NoRoom(frozenset({Pool.DECODE}))
        self.error: UnavailableError | None = None
        self.order: list[str] = []

    def acquire(self, needs: int = 1) -> FakePermit | NoRoom:
        if self.error is not None:
            raise self.error
        return FakePermit(self, needs) if self.places >= needs else self.no_room

    def start(
        self, name: str, deadline_s: float = FAR_S, needs: int = 1
    ) -> tuple[asyncio.Task[None], asyncio.Event]:
        """Start a request. Return its task, and the event that lets the running request end."""
        end = asyncio.Event()

        async def run() -> None:
            acquire = functools.partial(self.acquire, needs)
            wanted = AdmissionRequest("c", deadline_s)
            async with self.gate.admit(wanted, acquire, needs_room=needs > 0):
                self.order.append(name)
                await end.wait()

        return asyncio.create_task(run()), end


async def turns(count: int = 5) -> None:
    """Let the event loop run ``count`` turns."""
    loop = asyncio.get_running_loop()
    for _ in range(count):
        turn = loop.create_future()
        loop.call_soon(turn.set_result, None)
        await turn


@pytest.mark.parametrize(("max_concurrent", "places"), [(1, 1000), (1000, 1)])
async def test_the_earliest_deadline_runs_first(max_concurrent: int, places: int) -> None:
    harness = GateHarness(one_class(max_concurrent, 10, 30), places)
    first, end = harness.start("first")
    await turns()
    waiting = [harness.start(name, FAR_S + after) for name, after in (("c", 3), ("a", 1), ("b", 2))]
    await turns()
    end.set()
    for _, end_next in waiting:
        end_next.set()
    await asyncio.gather(first, *(task for task, _ in waiting))
    assert harness.order == ["first", "a", "b", "c"]
    assert harness.gate.running == 0
    assert harness.places == places


async def test_a_request_that_does_not_fit_leaves_room_to_others_for_a_while() -> None:
    """Only so many requests pass it. Then room is kept for it, so it does not starve."""
    harness = GateHarness(one_class(1000, 1000, 30), places=10)
    running = [harness.start("long-lived", needs=5)]
    await turns()
    running.append(harness.start("big", needs=10))
    await turns()
    passed = 0
    while passed < MAX_PASSED:
        task, end = harness.start("small")
        await turns()
        assert harness.order[-1] == "small", "five places are free"
        end.set()
        await task
        passed += 1
    running.append(harness.start("late"))
    await turns()
    assert harness.order.count("small") == MAX_PASSED
    assert "late" not in harness.order
    running.append(harness.start("resumed", needs=0))
    await turns()
    assert harness.order[-1] == "resumed", "it was admitted before, and needs no room"
    for _, end in running:
        end.set()
    await asyncio.gather(*(task for task, _ in running))
    assert harness.order[-2:] == ["big", "late"]


async def test_requests_of_two_classes_in_front_do_not_starve_each_other() -> None:
    classes = {name: ClassLimits(1, 1000, 30) for name in "ab"}
    harness = GateHarness(AdmissionLimits(1000, classes), places=10)
    ends: list[asyncio.Event] = []
    tasks: list[asyncio.Task[None]] = []

    def start(name: str, service_class: str, needs: int) -> None:
        end = asyncio.Event()

        async def run() -> None:
            wanted = AdmissionRequest(service_class, FAR_S)
            async with harness.gate.admit(wanted, functools.partial(harness.acquire, needs)):
                harness.order.append(name)
                await end.wait()

        ends.append(end)
        tasks.append(asyncio.create_task(run()))

    start("long-lived", "a", 5)
    await turns()
    for service_class in "ab":
        start(f"big {service_class}", service_class, 10)
        await turns()
    for number in range(4 * MAX_PASSED):
        start("small", "ab"[number % 2], 1)
        await turns()
        if harness.order[-1] == "small":
            ends[-1].set()
            await turns()
    assert harness.order.count("small") <= 2 * MAX_PASSED
    for end in ends:
        end.set()
    await asyncio.gather(*tasks)
    assert {"big a", "big b"} < set(harness.order)


async def test_when_the_request_in_front_gives_up_the_next_one_runs() -> None:
    harness = GateHarness(one_class(1000, 1000, 30), places=1)
    first, end = harness.start("first")
    await turns()
    big, _ = harness.start("big", needs=2)
    small = [harness.start(f"small {number}") for number in range(MAX_PASSED + 1)]
    await turns()
    end.set()
    for task, end_small in small[:MAX_PASSED]:
        end_small.set()
        await task
    await turns()
    assert harness.order[-1] != f"small {MAX_PASSED}"
    big.cancel()
    await asyncio.gather(big, return_exceptions=True)
    await turns()
    assert harness.order[-1] == f"small {MAX_PASSED}"
    small[-1][1].set()
    await asyncio.gather(first, small[-1][0])


@pytest.mark.parametrize("seed", range(15))
def test_no_worker_idles_and_no_request_starves(seed: int) -> None:
    """Random requests with random needs. Each waits for a bounded number of others."""
    rng = random.Random(seed)

    async def scenario() -> None:
        harness = GateHarness(one_class(1000, 1000, 1e6), places=8)
        tasks = []
        needs_of: dict[str, int] = {}

        async def live(name: str) -> None:
            needs_of[name] = rng.choice((1, 1, 1, 2, 8))
            task, end = harness.start(name, FAR_S + len(needs_of), needs_of[name])
            while name not in harness.order and not task.done():
                await elapse(0.1)
            await elapse(rng.choice((0.5, 2, 10)))
            end.set()
            await task

        for number in range(120):
            tasks.append(asyncio.create_task(live(f"r{number}")))
            await elapse(rng.choice((0, 0.1, 0.5)))
            queues = harness.gate.turns._queues
            head = queues.peek()
            if head is not None and head[1].passed < MAX_PASSED:
                waiting = [
                    cast(functools.partial[Any], turn.acquire).args[0]
                    for _, turn in queues.after_next(16)
                ]
                assert all(needs > harness.places for needs in waiting), "a place idles"
        await asyncio.gather(*tasks)
        for place, name in enumerate(harness.order):
            assert place - int(name[1:]) <= 2 * MAX_PASSED, f"{name} starved"

    run_virtually(scenario(), seed)


async def test_a_full_queue_refuses_a_new_request_at_once() -> None:
    harness = GateHarness()
    running = [harness.start(str(i)) for i in range(5)]
    await turns()
    with pytest.raises(CapacityError) as caught:
        async with harness.gate.admit(AdmissionRequest("c", FAR_S), harness.acquire):
            pass
    assert caught.value.reason == "QUEUE_FULL"
    for _, end in running:
        end.set()
    await asyncio.gather(*(task for task, _ in running))


async def test_a_cancelled_request_leaves_the_queue() -> None:
    harness = GateHarness(one_class(1, 10, 30))
    first, end = harness.start("first")
    second, _ = harness.start("second")
    third, end_third = harness.start("third")
    await turns()
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert harness.gate.waiting == 1
    end.set()
    end_third.set()
    await asyncio.gather(first, third)
    assert harness.order == ["first", "third"]


def test_waits_are_bounded() -> None:
    async def run() -> None:
        harness = GateHarness(one_class(1, 10, 2))
        first, end = harness.start("first")
        await turns()
        now_s = asyncio.get_running_loop().time()
        with pytest.raises(CapacityError) as caught:
            async with harness.gate.admit(AdmissionRequest("c", now_s + 60), harness.acquire):
                pass
        assert caught.value.reason == "QUEUE_TIMEOUT"
        assert asyncio.get_running_loop().time() == pytest.approx(now_s + 2)
        with pytest.raises(DeadlineError):
            async with harness.gate.admit(AdmissionRequest("c", now_s + 3), harness.acquire):
                pass
        assert asyncio.get_running_loop().time() == pytest.approx(now_s + 3)
        assert harness.gate.waiting == 0
        end.set()
        await first

    run_virtually(run(), 0)


async def test_an_expired_request_acquires_no_permit() -> None:
    harness = GateHarness()
    with pytest.raises(DeadlineError):
        async with harness.gate.admit(AdmissionRequest("c", 0.0), harness.acquire):
            pass
    assert harness.places == 1000


def test_a_request_whose_wait_would_be_too_long_does_not_wait() -> None:
    async def run() -> None:
        harness = GateHarness(one_class(2, 100, 5))
        # Each request runs for 2 s. If two run at a time, one request ends per second.
        for _ in range(40):
            async with harness.gate.admit(AdmissionRequest("c", FAR_S), harness.acquire):
                await elapse(2)
        tasks = [harness.start(str(i)) for i in range(2 + 5)]
        await turns()
        assert harness.gate.waiting == 5
        with pytest.raises(CapacityError) as caught:
            harness.gate.check(AdmissionRequest("c", FAR_S))
        assert caught.value.retry_after_s == pytest.approx(6, rel=0.1)
        for _, end in tasks:
            end.set()
        await asyncio.gather(*(task for task, _ in tasks))

    run_virtually(run(), 0)


def test_a_request_whose_turn_comes_too_late_is_not_run() -> None:
    async def run() -> None:
        harness = GateHarness(one_class(1, 10, 1000))
        first, end = harness.start("first")
        await turns()

        async def ask() -> None:
            async with harness.gate.admit(AdmissionRequest("c", 10, service_s=4), harness.acquire):
                raise AssertionError("the request runs, but cannot end in time")

        second = asyncio.create_task(ask())
        await elapse(7)
        end.set()
        with pytest.raises(CapacityError) as caught:
            await second
        assert caught.value.reason == "WOULD_BE_LATE"
        await first
        assert harness.gate.running == harness.gate.waiting == 0

    run_virtually(run(), 0)


async def test_waiting_requests_get_the_error_when_no_worker_is_left() -> None:
    harness = GateHarness(one_class(10, 10, 30), places=1)
    first, end = harness.start("first")
    waiting = [harness.start("x")[0] for _ in range(3)]
    await turns()
    harness.error = UnavailableError("all workers are gone")
    end.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert results == [harness.error] * 3
    await first
    assert harness.gate.running == harness.gate.waiting == 0


async def test_classes_by_name() -> None:
    limits = AdmissionLimits(1, {name: ClassLimits(1, 2, 30) for name in ("fast", "slow")})
    admission = AdmissionGate(limits, asyncio.get_running_loop().time)
    assert [admission.class_of(name) for name in ("", "slow")] == ["fast", "slow"]
    assert admission.max_requests == 5
    with pytest.raises(InvalidArgumentError, match="'other'; this cluster knows fast, slow"):
        admission.class_of("other")


@pytest.mark.parametrize("seed", range(30))
async def test_random_arrivals_cancels_and_ends_leak_no_permit(seed: int) -> None:
    rng = random.Random(seed)
    harness = GateHarness(one_class(3, 5, 30), places=rng.choice((2, 1000)))
    places = harness.places
    tasks: list[asyncio.Task[None]] = []
    ends: list[asyncio.Event] = []
    for _ in range(200):
        action = rng.random()
        if action < 0.5:
            task, end = harness.start("x", FAR_S + rng.random())
            tasks.append(task)
            ends.append(end)
        elif action < 0.75 and tasks:
            rng.choice(tasks).cancel()
        elif ends:
            rng.choice(ends).set()
        await turns(rng.randrange(3))
        assert harness.gate.running <= 3, f"seed {seed}"
        assert harness.gate.waiting <= 5, f"seed {seed}"
    for end in ends:
        end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (harness.gate.running, harness.gate.waiting) == (0, 0), f"seed {seed}"
    assert harness.places == places, f"seed {seed}"


async def test_a_permit_granted_in_the_turn_of_a_cancel_goes_to_the_next_request() -> None:
    harness = GateHarness(one_class(1, 10, 30))

    async def end_and_cancel() -> None:
        async with harness.gate.admit(AdmissionRequest("c", FAR_S), harness.acquire):
            await turns()
        second.cancel()  # its permit is granted, but its task has not run since

    first = asyncio.create_task(end_and_cancel())
    await turns(1)
    second, _ = harness.start("second")
    third, end_third = harness.start("third")
    end_third.set()
    await asyncio.gather(first, third)
    await asyncio.gather(second, return_exceptions=True)
    assert harness.order == ["third"]
    assert harness.gate.running == 0
    assert harness.places == 1000
