"""What waiting requests wait for, and how long they wait for a pool without a worker. A caller
drives ``Turns`` as the simulator does, without tasks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.errors import CapacityError, DeadlineError, UnavailableError
from core.types import Need, Pool, QueueLoad
from router.admission.policy import AdmissionLimits, AdmissionRequest, ClassLimits
from router.admission.turns import MAX_PASSED, Turn, Turns
from router.room import NoRoom

BOTH, DECODE_ONLY = frozenset(Pool), frozenset({Pool.DECODE})
COLD_S, QUEUE_S = 100.0, 10.0
REQUEST = AdmissionRequest("c", 1e6, prompt_tokens=100, kv_tokens=150)


class FakePermit:
    def __init__(self, cluster: Cluster, pools: frozenset[Pool]) -> None:
        self._cluster, self._pools = cluster, pools
        cluster.take(pools, 1)

    def close(self) -> None:
        self._cluster.take(self._pools, -1)
        self._pools = frozenset()


class Cluster:
    """``Turns`` over two pools. ``places`` says how many more requests each pool has room for."""

    def __init__(self, prefill: int = 0, decode: int = 0, max_concurrent: int = 1000) -> None:
        limits = AdmissionLimits(
            max_concurrent,
            {"c": ClassLimits(1, 1000, QUEUE_S), "other": ClassLimits(1, 1000, QUEUE_S)},
            cold_start_timeout_s=COLD_S,
        )
        self.now_s = 0.0
        self.turns = Turns(limits, lambda: self.now_s)
        self.places = {Pool.PREFILL: prefill, Pool.DECODE: decode}
        self.empty: frozenset[Pool] = frozenset()
        self.tries = 0
        self.decided: list[Turn[FakePermit]] = []

    def take(self, pools: frozenset[Pool], count: int) -> None:
        for pool in pools:
            self.places[pool] -= count

    def enter(
        self, request: AdmissionRequest = REQUEST, needed: frozenset[Pool] = BOTH
    ) -> Turn[FakePermit]:
        def acquire() -> FakePermit | NoRoom:
            self.tries += 1
            full = frozenset(pool for pool in needed if not self.places[pool])
            return NoRoom(full, full & self.empty) if full else FakePermit(self, needed)

        return self.turns.enter(request, acquire, self.decided.append)

    def needs(self) -> dict[Need, int]:
        return {each.need: each.requests for each in self.turns.queue_loads()}


@pytest.mark.parametrize(
    ("prefill", "decode", "need"),
    [(2, 9, Need.PREFILL), (9, 2, Need.DECODE), (2, 2, Need.BOTH)],
)
def test_each_waiting_request_has_the_need_of_the_full_pool(
    prefill: int, decode: int, need: Need
) -> None:
    cluster = Cluster(prefill, decode)
    for _ in range(50):
        cluster.enter()
    assert cluster.turns.running == 2
    assert cluster.needs() == {need: 48}, "also those that were not tried"
    for turn in [turn for _, turn in cluster.turns._queues]:
        cluster.turns.leave(turn)
    assert cluster.turns.queue_loads() == ()


def test_requests_that_need_different_pools() -> None:
    cluster = Cluster(prefill=1, decode=0)
    cluster.enter()
    assert cluster.needs() == {Need.DECODE: 1}
    cluster.enter(needed=frozenset({Pool.PREFILL}))
    assert cluster.needs() == {Need.BOTH: 1}, "the other request runs"
    cluster.enter(needed=frozenset({Pool.PREFILL}))
    assert cluster.needs() == {Need.BOTH: 1, Need.PREFILL: 1}


def test_the_need_follows_what_is_full_now() -> None:
    cluster = Cluster(prefill=0, decode=9)
    turn = cluster.enter()
    assert cluster.turns.need(turn) is Need.PREFILL
    cluster.places = {Pool.PREFILL: 9, Pool.DECODE: 0}
    cluster.turns.wake()
    assert cluster.turns.need(turn) is Need.DECODE


def test_requests_wait_for_the_router_while_it_runs_as_many_as_it_may() -> None:
    cluster = Cluster(prefill=9, decode=9, max_concurrent=2)
    running = [cluster.enter() for _ in range(2)]
    waiting = cluster.enter()
    assert cluster.turns.need(waiting) is Need.ROUTER
    cluster.places[Pool.PREFILL] = -1  # a worker was lost; both that run still hold theirs
    cluster.turns.end(running[0])
    assert cluster.turns.need(waiting) is Need.PREFILL
    cluster.turns.end(running[1])
    assert waiting.permit is not None
    assert cluster.decided == [waiting]


def test_a_queue_in_numbers() -> None:
    cluster = Cluster()
    cluster.enter()
    cluster.now_s = 3.0
    cluster.enter(replace(REQUEST, prompt_tokens=7, kv_tokens=9))
    cluster.enter(replace(REQUEST, service_class="other"))
    cluster.now_s = 5.0
    assert cluster.turns.queue_loads() == (
        QueueLoad("c", Need.BOTH, 2, prompt_tokens=107, kv_tokens=159, oldest_wait_s=5.0),
        QueueLoad("other", Need.BOTH, 1, prompt_tokens=100, kv_tokens=150, oldest_wait_s=2.0),
    )


def test_a_request_waits_or_runs_never_both() -> None:
    cluster = Cluster(prefill=3, decode=3)
    turns = [cluster.enter() for _ in range(8)]
    for turn in turns[:3]:
        waiting = sum(each.requests for each in cluster.turns.queue_loads())
        assert (waiting, cluster.turns.running) == (cluster.turns.waiting, 3)
        cluster.turns.end(turn)
    assert (cluster.turns.waiting, cluster.turns.running) == (2, 3)
    assert cluster.decided == turns[3:6]


def test_needs_cost_no_more_tries() -> None:
    """A wake tries the request in front and 16 more, however long the queue is."""
    cluster = Cluster()
    for _ in range(200):
        cluster.enter()
    before = cluster.tries
    cluster.turns.wake()
    assert cluster.tries == before + 17
    assert cluster.needs() == {Need.BOTH: 200}
    assert cluster.tries == before + 17


def test_the_wait_for_the_first_worker_of_a_pool_has_its_own_bound() -> None:
    cluster = Cluster(decode=9)
    cluster.empty = frozenset({Pool.PREFILL})
    cluster.now_s = 5.0
    turn = cluster.enter()
    assert cluster.turns.need(turn) is Need.PREFILL
    assert cluster.turns.give_up_s(turn) == 5.0 + COLD_S
    cluster.now_s = 5.0 + COLD_S
    error = cluster.turns.give_up(turn)
    assert isinstance(error, UnavailableError)
    assert error.reason == "NO_PREFILL_WORKER"
    assert error.retry_after_s
    assert cluster.turns.waiting == 0


def test_a_deadline_also_bounds_that_wait() -> None:
    cluster = Cluster(decode=9)
    cluster.empty = frozenset({Pool.PREFILL})
    turn = cluster.enter(replace(REQUEST, deadline_s=7.0))
    assert cluster.turns.give_up_s(turn) == 7.0
    cluster.now_s = 7.0
    assert isinstance(cluster.turns.give_up(turn), DeadlineError)


def test_the_wait_for_a_first_worker_does_not_count_towards_the_queue_timeout() -> None:
    cluster = Cluster(decode=9)
    changed: list[float] = []
    early = cluster.enter()
    early.on_limit = lambda: changed.append(cluster.turns.give_up_s(early))
    assert cluster.turns.give_up_s(early) == QUEUE_S
    cluster.now_s = 4.0
    cluster.empty = frozenset({Pool.PREFILL})  # the pool's last worker died
    cluster.turns.wake()
    assert changed == [4.0 + COLD_S]
    cluster.now_s = 50.0
    late = cluster.enter()
    assert cluster.turns.give_up_s(late) == 50.0 + COLD_S
    cluster.now_s = 60.0
    cluster.empty = frozenset()  # a worker is there, but it is full
    cluster.turns.wake()
    assert changed == [4.0 + COLD_S, 60.0 + QUEUE_S - 4.0]
    assert cluster.turns.give_up_s(late) == 60.0 + QUEUE_S
    cluster.now_s = 66.0
    error = cluster.turns.give_up(early)
    assert isinstance(error, CapacityError)
    assert error.reason == "QUEUE_TIMEOUT"


def test_requests_to_an_empty_pool_wait_however_long_the_streams_of_the_other_run() -> None:
    cluster = Cluster(decode=9)
    ended = cluster.enter(needed=DECODE_ONLY)
    cluster.now_s = 4 * QUEUE_S
    cluster.turns.end(ended)
    cluster.enter(needed=DECODE_ONLY)  # if it runs as long, none ends within QUEUE_S
    with pytest.raises(CapacityError):
        cluster.enter()  # prefill is full, not empty
    cluster.empty = frozenset({Pool.PREFILL})
    first = cluster.enter()
    cluster.turns.check(REQUEST)
    second = cluster.enter()
    for turn in (first, second):
        assert turn.permit is None
        assert cluster.turns.give_up_s(turn) == cluster.now_s + COLD_S
    cluster.turns.leave(first)
    cluster.turns.leave(second)
    cluster.empty = frozenset()
    with pytest.raises(CapacityError):
        cluster.enter()


def test_the_wait_for_a_first_worker_ends_also_if_the_router_is_full_then() -> None:
    cluster = Cluster(decode=9, max_concurrent=1)
    cluster.empty = frozenset({Pool.PREFILL})
    first, second = cluster.enter(), cluster.enter()
    cluster.now_s = 30.0
    cluster.empty = frozenset()
    cluster.places[Pool.PREFILL] = 9
    cluster.turns.wake()
    assert first.permit is not None
    assert cluster.turns.need(second) is Need.ROUTER
    assert cluster.turns.give_up_s(second) == 30.0 + QUEUE_S
    cluster.now_s = 30.0 + QUEUE_S
    error = cluster.turns.give_up(second)
    assert isinstance(error, CapacityError)
    assert error.reason == "QUEUE_TIMEOUT"


def test_requests_that_left_or_were_refused_say_nothing_about_empty_pools() -> None:
    cluster = Cluster(decode=9, max_concurrent=1)
    cluster.empty = frozenset({Pool.PREFILL})
    cluster.turns.leave(cluster.enter())
    with pytest.raises(CapacityError):
        cluster.enter(replace(REQUEST, deadline_s=1.0, service_s=5.0))
    cluster.now_s = 30.0
    cluster.enter(needed=DECODE_ONLY)
    waiting = cluster.enter(needed=DECODE_ONLY)
    assert cluster.turns.give_up_s(waiting) == 30.0 + QUEUE_S


def test_a_request_behind_others_also_waits_for_a_first_worker() -> None:
    """The one in front waits for room on a busy prefill worker; decode has no worker yet."""
    cluster = Cluster()
    cluster.empty = frozenset({Pool.DECODE})
    front = cluster.enter(needed=frozenset({Pool.PREFILL}))
    behind = cluster.enter()
    assert cluster.needs() == {Need.PREFILL: 1, Need.BOTH: 1}
    assert cluster.turns.give_up_s(behind) == COLD_S
    cluster.places = {Pool.PREFILL: 1, Pool.DECODE: 1}
    cluster.empty = frozenset()
    cluster.turns.wake()
    assert front.permit is not None
    assert behind.permit is None
    cluster.turns.end(front)
    assert behind.permit is not None


def test_a_request_refused_at_its_turn_is_told_so() -> None:
    cluster = Cluster(decode=1)
    late = cluster.enter(replace(REQUEST, deadline_s=9.0, service_s=5.0))
    cluster.now_s = 6.0
    cluster.turns.wake()
    assert cluster.decided == [late]
    assert late.error is not None
    assert late.error.reason == "WOULD_BE_LATE"
    cluster.turns.leave(late)
    assert cluster.turns.running == cluster.turns.waiting == 0
    with pytest.raises(DeadlineError):
        cluster.enter(replace(REQUEST, deadline_s=1.0))


def test_a_request_without_a_worker_keeps_no_room_from_others() -> None:
    cluster = Cluster(prefill=1)
    cluster.empty = frozenset({Pool.DECODE})
    waiting = cluster.enter()
    for _ in range(2 * MAX_PASSED):
        other = cluster.enter(needed=frozenset({Pool.PREFILL}))
        assert other.permit is not None
        cluster.turns.end(other)
    assert waiting.permit is None
