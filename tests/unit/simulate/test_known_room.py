"""What is known of other requests is what the placement says."""

from __future__ import annotations

import random

import pytest

from core.types import Pool, WorkerLoad, WorkerRecord, WorkerState
from router.placement.ledger import PlacementLedger, PlacementPermit
from router.placement.policy import PlacementFacts, PlacementLimits
from router.room import NoRoom
from simulate.known_room import KnownRoom

LIMITS = PlacementLimits(dict.fromkeys(Pool, 8), prefill_backlog_s=1.0)


def records() -> tuple[WorkerRecord, ...]:
    load = WorkerLoad(0, 0, 0, kv_blocks_free=100, kv_blocks_total=100)
    return tuple(
        WorkerRecord(f"{pool}-{number}", pool, WorkerState.READY, "1", "", (), "m", load)
        for pool in Pool
        for number in range(2)
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_known_answer_is_that_of_the_placement(seed: int) -> None:
    rng, now_s = random.Random(seed), 0.0
    room = KnownRoom()
    ledger = PlacementLedger(LIMITS, lambda: now_s, suspect_s=3.0)
    ledger.on_room = room.freed
    permits: list[PlacementPermit] = []
    known_needs = set()
    for _ in range(2000):
        now_s += 0.01
        if permits and rng.random() < 0.05:
            permit = permits.pop(rng.randrange(len(permits)))
            permit.prefill_ended(True)
            if rng.random() < 0.7:
                permit.close()
            else:
                permits.append(permit)
        prompt_tokens, growth_tokens = rng.randint(1, 80), rng.randint(2, 400)
        facts = PlacementFacts(
            "m", prompt_tokens, 400, growth_tokens, "never", may_wait=True, coming=frozenset(Pool)
        )
        sizes = {Pool.PREFILL: prompt_tokens, Pool.DECODE: prompt_tokens + growth_tokens}
        known, answer = room.answer(sizes), ledger.place(records(), facts)
        if known is not None:
            assert known == answer
            known_needs.add(known.need)
        if isinstance(answer, NoRoom):
            room.note(sizes, answer)
        else:
            room.taken()
            permits.append(answer)
    assert len(known_needs) == 3, "prefill, decode, both"
