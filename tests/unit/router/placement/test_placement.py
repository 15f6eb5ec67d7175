from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from core.errors import UnavailableError
from core.types import Pool, WorkerKey, WorkerLoad, WorkerRecord, WorkerState
from router.placement.ledger import PlacementLedger, PlacementPermit
from router.placement.policy import (
    NoWorker,
    OwnLoad,
    Placement,
    PlacementFacts,
    PlacementLimits,
    PlacementState,
    decide_placement,
)
from router.room import NoRoom

FACTS = PlacementFacts(
    model="m", prompt_tokens=10, max_tokens=10, growth_tokens=6, local_prefill="never"
)
NEW_REQUEST = replace(FACTS, may_wait=True)
LIMITS = PlacementLimits(dict.fromkeys(Pool, 20), prefill_backlog_s=0.5)
IDLE = WorkerLoad(queue_depth=0, running=0, queued_tokens=0, kv_blocks_free=50, kv_blocks_total=50)


def worker(worker_id: str, **load: int) -> WorkerRecord:
    return WorkerRecord(
        id=worker_id,
        pool=Pool.PREFILL if worker_id.startswith("p") else Pool.DECODE,
        state=WorkerState.READY,
        incarnation="1",
        address="",
        kv_addresses=(),
        model="m",
        load=replace(IDLE, **load),
    )


def choose(
    *workers: WorkerRecord, facts: PlacementFacts = FACTS, state: PlacementState | None = None
) -> tuple[str | None, str | None]:
    placement = decide_placement(workers, facts, state or PlacementState(), LIMITS, now_s=100.0)
    assert isinstance(placement, Placement)
    return (
        placement.prefill.id if placement.prefill else None,
        placement.decode.id if placement.decode else None,
    )


def must_wait(*workers: WorkerRecord, own: dict[WorkerKey, OwnLoad] | None = None) -> bool:
    state = PlacementState(own or {})
    running = decide_placement(workers, FACTS, state, LIMITS, now_s=0.0)
    assert isinstance(running, Placement), "a running request never waits"
    return isinstance(decide_placement(workers, NEW_REQUEST, state, LIMITS, now_s=0.0), NoRoom)


def test_the_fewest_queued_tokens_win_on_prefill() -> None:
    busy, free = worker("p1", queued_tokens=900), worker("p2", queued_tokens=100, queue_depth=9)
    assert choose(busy, free, worker("d1")) == ("p2", "d1")


def test_the_fewest_streams_win_on_decode() -> None:
    assert choose(worker("p1"), worker("d1", running=3), worker("d2", running=2)) == ("p1", "d2")


def test_scarce_kv_room_loses_on_decode() -> None:
    full, busy = worker("d1", kv_blocks_free=1), worker("d2", running=7)
    assert choose(worker("p1"), full, busy) == ("p1", "d2")


def test_more_kv_room_breaks_a_tie_on_decode() -> None:
    assert choose(worker("p1"), worker("d1", kv_blocks_free=20), worker("d2")) == ("p1", "d2")


def test_idle_workers_take_turns() -> None:
    workers = (worker("p1"), worker("p2"), worker("d1"), worker("d2"), worker("d3"))
    state, chosen = PlacementState(), []
    for _ in range(6):
        placement = decide_placement(workers, FACTS, state, LIMITS, now_s=0.0)
        assert isinstance(placement, Placement)
        state = placement.state
        assert placement.prefill is not None
        assert placement.decode is not None
        chosen.append((placement.prefill.id, placement.decode.id))
    assert chosen == [
        ("p1", "d1"),
        ("p2", "d2"),
        ("p1", "d3"),
        ("p2", "d1"),
        ("p1", "d2"),
        ("p2", "d3"),
    ]


@pytest.mark.parametrize(("prefills", "decodes"), [(1, 1), (2, 2), (3, 2), (4, 2), (3, 3), (4, 6)])
def test_every_pair_of_idle_workers_gets_its_turn(prefills: int, decodes: int) -> None:
    """If both pools advanced in lockstep, pools of two workers would form only 2 of 4 pairs."""
    workers = (
        *(worker(f"p{index}") for index in range(prefills)),
        *(worker(f"d{index}") for index in range(decodes)),
    )
    state, pairs = PlacementState(), set()
    for _ in range(prefills * decodes):
        placement = decide_placement(workers, FACTS, state, LIMITS, now_s=0.0)
        assert isinstance(placement, Placement)
        state = placement.state
        assert placement.prefill is not None
        assert placement.decode is not None
        pairs.add((placement.prefill.id, placement.decode.id))
    assert len(pairs) == prefills * decodes


def test_own_load_counts_before_workers_report_it() -> None:
    p1, p2 = worker("p1"), worker("p2", queued_tokens=50)
    own = {p1.key: OwnLoad(1, 80, 1, 80)}
    assert choose(p1, p2, worker("d1"), state=PlacementState(own)) == ("p2", "d1")
    d1, d2 = worker("d1"), worker("d2", running=1)
    own = {d1.key: OwnLoad(2, 80, 2, 80)}
    assert choose(worker("p1"), d1, d2, state=PlacementState(own)) == ("p1", "d2")


def test_ended_requests_do_not_count_even_if_workers_still_report_them() -> None:
    p1, p2 = worker("p1", queued_tokens=80), worker("p2", queued_tokens=50)
    own = {p1.key: OwnLoad(0, 0, 1, 80)}
    assert choose(p1, p2, worker("d1"), state=PlacementState(own)) == ("p1", "d1")


def test_load_of_other_routers_counts_too() -> None:
    p1, p2 = worker("p1", queued_tokens=120), worker("p2", queued_tokens=50)
    own = {p1.key: OwnLoad(1, 20, 2, 80)}  # 40 reported tokens come from other routers
    assert choose(p1, p2, worker("d1"), state=PlacementState(own)) == ("p2", "d1")


def test_a_new_request_waits_while_the_prefill_backlog_is_long() -> None:
    d1 = worker("d1")
    for tokens, waits in ((990, False), (991, True)):
        own = {("p1", "1"): OwnLoad(2, tokens, 2, tokens, tokens_per_s=2000)}
        assert must_wait(worker("p1"), d1, own=own) is waits
        assert not must_wait(worker("p1"), worker("p2"), d1, own=own)


def test_prompts_of_other_routers_count_in_the_backlog() -> None:
    own = {("p1", "1"): OwnLoad(2, 100, 2, 100, tokens_per_s=2000)}
    assert must_wait(worker("p1", queued_tokens=1000), worker("d1"), own=own)


def test_a_prefill_worker_may_always_have_two_prompts() -> None:
    own = {("p1", "1"): OwnLoad(1, 10**6, 1, 10**6, tokens_per_s=10)}
    assert not must_wait(worker("p1"), worker("d1"), own=own)
    own = {("p1", "1"): OwnLoad(2, 20, 2, 20)}
    assert must_wait(worker("p1"), worker("d1"), own=own), "the worker's rate is unknown"


def test_a_new_request_waits_for_kv_room_for_its_growth() -> None:
    p1 = worker("p1")
    # The decode worker has 50 blocks of 16 tokens. The request needs one block.
    assert not must_wait(p1, worker("d1", kv_blocks_free=1))
    assert must_wait(p1, worker("d1", kv_blocks_free=0))
    full = {("d1", "1"): OwnLoad(3, 800 - 15, 3, 800 - 15)}
    assert must_wait(p1, worker("d1", kv_blocks_free=40), own=full), (
        "the running requests will grow"
    )
    roomy = {("d1", "1"): OwnLoad(3, 800 - 16, 3, 800 - 16)}
    assert not must_wait(p1, worker("d1", kv_blocks_free=40), own=roomy)


def test_a_worker_without_room_is_no_candidate_for_a_new_request() -> None:
    workers = worker("p1"), worker("d1", kv_blocks_free=0), worker("d2", running=9)
    assert choose(*workers, facts=NEW_REQUEST) == ("p1", "d2")


def test_a_new_request_waits_while_a_worker_would_refuse_it() -> None:
    own = {("d1", "1"): OwnLoad(20, 0, 20, 0)}
    assert must_wait(worker("p1"), worker("d1"), own=own)


def test_an_empty_worker_takes_any_request() -> None:
    small = worker("d1", kv_blocks_free=0, kv_blocks_total=0)
    huge = replace(NEW_REQUEST, prompt_tokens=5000)
    assert choose(worker("p1"), small, facts=huge) == ("p1", "d1")


@pytest.mark.parametrize(
    "unusable",
    [
        replace(worker("d1"), state=WorkerState.DRAINING),
        replace(worker("d1"), model="other"),
    ],
)
def test_draining_workers_and_other_models_are_left_out(unusable: WorkerRecord) -> None:
    assert choose(worker("p1"), unusable, worker("d2", running=9)) == ("p1", "d2")


def test_a_worker_that_failed_the_request_is_avoided_until_it_restarts() -> None:
    facts = replace(FACTS, excluded=frozenset({("d1", "1")}))
    busy = worker("d2", running=9)
    assert choose(worker("p1"), worker("d1"), busy, facts=facts) == ("p1", "d2")
    restarted = replace(worker("d1"), incarnation="2")
    assert choose(worker("p1"), restarted, busy, facts=facts) == ("p1", "d1")


def test_suspects_are_the_last_resort() -> None:
    state = PlacementState(suspects={("d1", "1"): 101.0, ("p1", "1"): 99.0})
    assert choose(worker("p1"), worker("d1"), worker("d2", running=9), state=state) == ("p1", "d2")
    assert choose(worker("p1"), worker("d1"), state=state) == ("p1", "d1")


def test_one_token_needs_no_decode_worker() -> None:
    assert choose(worker("p1"), facts=replace(FACTS, max_tokens=1)) == ("p1", None)


@pytest.mark.parametrize("max_tokens", [1, 10])
def test_local_prefill_if_it_is_allowed(max_tokens: int) -> None:
    facts = replace(FACTS, local_prefill="fallback", max_tokens=max_tokens)
    assert choose(worker("d1"), facts=facts) == (None, "d1")
    always = replace(facts, local_prefill="always")
    assert choose(worker("p1"), worker("d1"), facts=always) == (None, "d1")


def test_the_worker_that_has_the_kv_is_preferred() -> None:
    facts = replace(FACTS, local_prefill="always", preferred_decode=("d1", "1"))
    assert choose(worker("d1", running=9), worker("d2"), facts=facts) == (None, "d1")
    assert choose(worker("d2"), facts=facts) == (None, "d2")


@pytest.mark.parametrize(
    ("workers", "reason"),
    [((worker("d1"),), "NO_PREFILL_WORKER"), ((worker("p1"),), "NO_DECODE_WORKER")],
)
def test_an_empty_pool_is_unavailable_with_a_hint(
    workers: tuple[WorkerRecord, ...], reason: str
) -> None:
    with pytest.raises(UnavailableError) as caught:
        PlacementLedger(LIMITS, lambda: 0.0, suspect_s=1.0).place(workers, FACTS)
    assert caught.value.reason == reason
    assert caught.value.retry_after_s


PREFILL, DECODE = frozenset({Pool.PREFILL}), frozenset({Pool.DECODE})
BOTH = PREFILL | DECODE
FULL_P = worker("p1", queued_tokens=10**9)
FULL_D = worker("d1", kv_blocks_free=0)
BUSY = {("p1", "1"): OwnLoad(requests=2), ("d1", "1"): OwnLoad()}


@pytest.mark.parametrize(
    ("workers", "coming", "expected"),
    [
        ((FULL_P, worker("d1")), frozenset(), NoRoom(PREFILL)),
        ((worker("p2"), FULL_D), frozenset(), NoRoom(DECODE)),
        ((FULL_P, FULL_D), frozenset(), NoRoom(BOTH)),
        ((worker("d1"),), PREFILL, NoRoom(PREFILL, empty=PREFILL)),
        ((worker("p2"),), DECODE, NoRoom(DECODE, empty=DECODE)),
        ((FULL_D,), PREFILL, NoRoom(BOTH, empty=PREFILL)),
        ((), BOTH, NoRoom(BOTH, empty=BOTH)),
        ((), DECODE, NoWorker(Pool.PREFILL, known=0)),
        ((), PREFILL, NoWorker(Pool.DECODE, known=0)),
        ((replace(worker("d1"), state=WorkerState.STARTING),), PREFILL, NoWorker(Pool.DECODE, 1)),
    ],
)
def test_which_pools_a_request_waits_for(
    workers: tuple[WorkerRecord, ...], coming: frozenset[Pool], expected: NoRoom | NoWorker
) -> None:
    facts, state = replace(NEW_REQUEST, coming=coming), PlacementState(BUSY)
    assert decide_placement(workers, facts, state, LIMITS, now_s=0.0) == expected


def test_requests_wait_for_no_pool_that_they_do_not_need() -> None:
    coming = replace(NEW_REQUEST, coming=BOTH)
    one_token = replace(coming, max_tokens=1)
    decided = decide_placement((), one_token, PlacementState(), LIMITS, now_s=0.0)
    assert decided == NoRoom(PREFILL, empty=PREFILL)
    for local in (
        replace(coming, local_prefill="fallback"),
        replace(coming, local_prefill="always"),
    ):
        assert choose(worker("d1"), facts=local) == (None, "d1"), "the decode worker prefills"
        decided = decide_placement((), local, PlacementState(), LIMITS, now_s=0.0)
        assert decided == NoRoom(DECODE, empty=DECODE)


def test_a_running_request_does_not_wait_in_a_queue_for_a_worker_to_come() -> None:
    facts = replace(FACTS, coming=BOTH)
    decided = decide_placement((), facts, PlacementState(), LIMITS, now_s=0.0)
    assert decided == NoWorker(Pool.PREFILL, known=0)


def test_a_burst_between_two_snapshots_spreads_out() -> None:
    ledger = PlacementLedger(LIMITS, lambda: 0.0, suspect_s=1.0)
    workers = (worker("p1"), worker("p2"), *(worker(f"d{i}", running=i) for i in range(4)))
    counts: Counter[str] = Counter()
    for _ in range(40):
        placement = place(ledger, workers).placement
        for record in (placement.prefill, placement.decode):
            assert record is not None
            counts[record.id] += 1
    assert counts["p1"] == counts["p2"] == 20
    loads = [counts[f"d{i}"] + i for i in range(4)]
    assert max(loads) - min(loads) <= 1


def place(
    ledger: PlacementLedger, workers: tuple[WorkerRecord, ...], facts: PlacementFacts = FACTS
) -> PlacementPermit:
    permit = ledger.place(workers, facts)
    assert isinstance(permit, PlacementPermit)
    return permit


def test_the_ledger_counts_a_request_until_it_ends_on_each_worker() -> None:
    ledger = PlacementLedger(LIMITS, lambda: 0.0, suspect_s=1.0)
    loads: list[tuple[int, int]] = []  # of p1 and d1, at each call of on_room
    permit = place(ledger, (worker("p1"), worker("d1")))
    p1, d1 = ("p1", "1"), ("d1", "1")
    ledger.on_room = lambda: loads.append((ledger.own_load(p1).tokens, ledger.own_load(d1).tokens))
    assert (ledger.own_load(p1).tokens, ledger.own_load(d1).tokens) == (10, 16)
    for _ in range(2):
        permit.prefill_ended(done=True)
    for _ in range(2):
        permit.close()
    assert loads == [(0, 16), (0, 0)]


def test_room_is_not_used_twice_between_two_reports() -> None:
    ledger = PlacementLedger(LIMITS, lambda: 0.0, suspect_s=1.0)
    workers = (worker("p1"), worker("d1", kv_blocks_free=2, kv_blocks_total=2))
    permits = [place(ledger, workers, NEW_REQUEST) for _ in range(2)]
    assert isinstance(ledger.place(workers, NEW_REQUEST), NoRoom)
    permits[0].close()
    assert isinstance(ledger.place(workers, NEW_REQUEST), PlacementPermit)


def test_the_ledger_forgets_ended_requests() -> None:
    now_s = 0.0
    ledger = PlacementLedger(LIMITS, lambda: now_s, suspect_s=1.0, report_snapshots=2)
    permit = place(ledger, (worker("p1"), worker("d1")))
    ledger.new_snapshot(frozenset())
    permit.close()
    after_end = ledger.own_load(("d1", "1"))
    assert after_end == OwnLoad(0, 0, 1, 16), "a report may still contain the request"
    for _ in range(3):
        ledger.new_snapshot(frozenset({("d1", "1")}))
    assert ledger.own_load(("d1", "1")) == OwnLoad()
    ledger.suspect(("d1", "1"))
    now_s = 1.0
    ledger.new_snapshot(frozenset())
    assert ledger.is_empty


def test_the_ledger_measures_the_rate_of_a_busy_prefill_worker() -> None:
    now_s = 0.0
    ledger = PlacementLedger(LIMITS, lambda: now_s, suspect_s=1.0)
    workers = (worker("p1"), worker("d1"))
    for _ in range(100):
        first, second, failed = (place(ledger, workers) for _ in range(3))
        for permit in (first, second):
            now_s += 0.05
            permit.prefill_ended(done=True)
        now_s += 0.1
        failed.prefill_ended(done=False)  # neither its tokens nor its time count
        now_s += 7.0  # idle time does not count
    assert ledger.own_load(("p1", "1")).tokens_per_s == pytest.approx(10 / 0.05)


def test_the_ledger_measures_the_rate_of_a_decode_worker_with_streams() -> None:
    now_s = 0.0
    ledger = PlacementLedger(LIMITS, lambda: now_s, suspect_s=1.0)
    workers = (worker("p1"), worker("d1"))

    def rate() -> float:
        return {share.worker_id: share.tokens_per_s for share in ledger.shares()}["d1"]

    for _ in range(20):
        first, second = (place(ledger, workers) for _ in range(2))
        now_s += 3.0  # the prefill; no stream has begun
        for permit in (first, second):
            permit.decoded(1)
        for _ in range(100):
            now_s += 0.02
            for permit in (first, second):
                permit.decoded(1)
        for permit in (first, second):
            permit.close()
            permit.close()
        now_s += 7.0
    assert rate() == pytest.approx(2 / 0.02, rel=0.02)
    stalled = place(ledger, workers)
    stalled.decoded(1)
    now_s += 30.0
    assert rate() < 10, "a worker that sends nothing is slow"
