"""Checks on vLLM's own scheduler what the connector assumes about it.

If an upgrade of vLLM breaks an assumption, these tests must fail. Without them, KV would be
corrupted, blocks would leak or requests would hang.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from vllm.v1.request import RequestStatus

from tests.support.vllm_scheduler import BLOCK_TOKENS, SAMPLED, SchedulerBench, result_of


@pytest.fixture
def bench() -> Iterator[Callable[..., SchedulerBench]]:
    made = []

    def make(pool: str, **options: int) -> SchedulerBench:
        made.append(SchedulerBench(pool, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


Make = Callable[..., SchedulerBench]


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [1000 + seed * 2000 + index for index in range(tokens)]


# prefill


def test_chunks_cover_the_prompt_once_and_in_order(bench: Make) -> None:
    prefill = bench("kv_producer", step_tokens=64)
    prefill.add("r", prompt(150), "send", max_tokens=1)
    chunks = [chunk for _ in range(3) for chunk in prefill.step().plan.chunks]
    assert [(c.token_start, c.token_end) for c in chunks] == [(0, 64), (64, 128), (128, 150)]
    assert {(c.transfer_id, c.request_id, c.num_tokens) for c in chunks} == {("r#1", "r", 150)}
    for before, after in itertools.pairwise(chunks):
        assert after.block_ids[: len(before.block_ids)] == before.block_ids, "blocks are appended"
    assert len(chunks[-1].block_ids) == 10


def test_a_prefix_may_be_hit_in_the_very_step_that_computes_it(bench: Make) -> None:
    """vLLM hashes a block when it allocates the block, before a layer has written KV into it."""
    prefill = bench("kv_producer")
    prefill.add("a", prompt(100), "send", max_tokens=1)
    prefill.add("b", [*prompt(96), 7, 7, 7], "send", max_tokens=1)
    first, second = prefill.step().plan.chunks
    assert (first.token_start, first.token_end) == (0, 100)
    assert (second.token_start, second.token_end) == (96, 99)
    assert second.block_ids[:6] == first.block_ids[:6]


def test_sent_blocks_stay_until_a_rank_releases_them(bench: Make) -> None:
    prefill = bench("kv_producer")
    request = prefill.add("r", prompt(40), "send", max_tokens=1)
    assert prefill.step().tokens == {"r": [SAMPLED]}
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED
    assert prefill.blocks_used == 3
    assert prefill.scheduler.has_requests(), "ranks report only if vLLM takes another step"
    step = prefill.step()
    assert step.plan.sampled == [("r#1", SAMPLED)]
    assert prefill.blocks_used == 3
    prefill.step(sent={"r"})
    assert prefill.blocks_used == 0
    assert not prefill.scheduler.has_requests()


def test_a_first_token_that_decode_samples_itself_is_not_sent(bench: Make) -> None:
    prefill = bench("kv_producer")
    prefill.add("r", prompt(40), "send", max_tokens=1, forwards_first_token=False)
    prefill.step()
    assert prefill.step().plan.sampled == [("r#1", None)]


def test_an_abort_before_the_first_step_holds_nothing(bench: Make) -> None:
    prefill = bench("kv_producer")
    prefill.add("r", prompt(40), "send")
    prefill.abort("r")
    assert not prefill.scheduler.requests
    assert prefill.step().plan.aborted == ["r#1"]


def test_an_abort_after_a_step_waits_for_the_ranks(bench: Make) -> None:
    prefill = bench("kv_producer", step_tokens=64)
    prefill.add("r", prompt(150), "send")
    prefill.step()
    prefill.abort("r")
    assert prefill.blocks_used > 0
    step = prefill.step()
    assert step.plan.aborted == ["r#1"]
    assert not step.plan.chunks
    prefill.step(sent={"r"})
    assert prefill.blocks_used == 0


def test_a_preempted_send_is_named_and_not_streamed_again(bench: Make) -> None:
    prefill = bench("kv_producer", blocks=14, step_tokens=96)
    prefill.add("a", prompt(96), "send", max_tokens=60)
    prefill.add("b", prompt(90, seed=1), "send", max_tokens=60)
    steps = [prefill.step()]
    while not steps[-1].plan.preempted:
        steps.append(prefill.step())
        assert len(steps) < 100, "nothing was preempted"
    assert set(steps[-1].plan.preempted) == {"b#1"}
    later = [prefill.step() for _ in range(40)]
    assert not [
        c for step in [steps[-1], *later] for c in step.plan.chunks if c.transfer_id == "b#1"
    ]


# decode


def test_decode_computes_one_token_after_the_transfer(bench: Make) -> None:
    decode = bench("kv_consumer")
    request = decode.add("r", prompt(40), "receive", max_tokens=4)
    first = decode.step()
    assert first.computed == {}
    assert request.status is RequestStatus.WAITING_FOR_REMOTE_KVS
    (reservation,) = first.plan.reservations
    assert (reservation.token_start, reservation.token_end) == (0, 40)
    assert len(reservation.block_ids) == 3
    assert reservation.addresses == ("tcp://127.0.0.1:1",)
    assert decode.scheduler.has_requests(), "ranks report only if vLLM takes another step"

    decode.step(received=[result_of(first)])
    second = decode.step()
    assert second.computed == {"r": 1}
    assert list(request.all_token_ids) == [*prompt(40), 99, SAMPLED]
    (report,) = second.reports
    assert (report["complete"], report["first_index"], report["computed_tokens"]) == (True, 1, 1)
    decode.step()
    decode.step()
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED
    assert list(request.all_token_ids)[40:] == [99, SAMPLED, SAMPLED, SAMPLED], (
        "4 tokens, including P's first token"
    )
    decode.step()
    assert decode.blocks_used == 0


def test_without_a_first_token_the_last_prompt_token_is_recomputed(bench: Make) -> None:
    decode = bench("kv_consumer")
    request = decode.add("r", prompt(48), "receive", forwards_first_token=False)
    first = decode.step()
    decode.step(received=[result_of(first, first_token_id=None)])
    assert decode.step().computed == {"r": 1}
    assert list(request.all_token_ids) == [*prompt(48), SAMPLED]


def test_received_blocks_are_hit_by_the_next_prompt_but_not_before(bench: Make) -> None:
    decode = bench("kv_consumer")
    decode.add("a", prompt(50), "receive")
    first = decode.step()
    decode.add("b", prompt(60), "receive")
    second = decode.step()
    assert second.plan.reservations[0].token_start == 0, "a's blocks are still being written"
    decode.step(received=[result_of(first), result_of(second)])
    decode.step()
    decode.add("c", prompt(60), "receive")
    (reservation,) = decode.step().plan.reservations
    assert reservation.token_start == 48
    assert reservation.token_start % BLOCK_TOKENS == 0


def test_a_failed_transfer_is_recomputed_from_the_start(bench: Make) -> None:
    decode = bench("kv_consumer")
    request = decode.add("r", prompt(40), "receive")
    first = decode.step()
    decode.step(received=[result_of(first, complete=False)])
    step = decode.step()
    assert step.computed == {"r": 40}
    assert not step.plan.reservations, "a transfer is used once"
    assert list(request.all_token_ids) == [*prompt(40), SAMPLED]
    (report,) = step.reports
    assert (report["complete"], report["first_index"], report["computed_tokens"]) == (False, 0, 40)


@pytest.mark.parametrize("complete", [True, False])
def test_blocks_of_an_aborted_receive_stay_until_it_has_ended(bench: Make, complete: bool) -> None:
    decode = bench("kv_consumer")
    decode.add("r", prompt(40), "receive")
    first = decode.step()
    decode.abort("r")
    assert decode.blocks_used == 3, "the transfer may still write them"
    assert decode.step().plan.cancelled == [("r#1", ("tcp://127.0.0.1:1",), "p1")]
    assert decode.blocks_used == 3
    decode.step(received=[result_of(first, complete=complete)])
    assert decode.blocks_used == 0
    assert not decode.connector.scheduler_side._receives


def test_an_abort_between_the_transfer_and_the_first_step(bench: Make) -> None:
    decode = bench("kv_consumer")
    decode.add("r", prompt(40), "receive")
    first = decode.step()
    decode.step(received=[result_of(first)])
    decode.abort("r")
    step = decode.step()
    assert not step.plan.cancelled, "nothing is left to cancel"
    assert decode.blocks_used == 0
    assert not decode.connector.scheduler_side._receives


def test_an_abort_before_blocks_are_free_cancels_at_prefill(bench: Make) -> None:
    """V#41269: without the CANCEL, P would hold KV that no decode worker fetches."""
    decode = bench("kv_consumer")
    decode.add("r", prompt(40), "receive")
    decode.abort("r")
    assert decode.step().plan.cancelled == [("r#1", ("tcp://127.0.0.1:1",), "p1")]


def test_only_an_idle_step_that_waits_for_kv_sleeps(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = bench("kv_consumer")
    sleeps: list[float] = []
    doorbell = decode.connector.scheduler_side._doorbell
    assert doorbell is not None
    monkeypatch.setattr(doorbell, "wait", sleeps.append)
    decode.step()
    decode.step()
    assert not sleeps, "nothing to wait for"
    decode.add("r", prompt(40), "receive")
    first = decode.step()
    assert not sleeps, "a step that reserves blocks does not sleep"
    decode.step()
    assert len(sleeps) == 1
    decode.add("s", prompt(40, seed=1), "receive")
    decode.step(received=[result_of(first)])
    assert len(sleeps) == 1
    assert decode.step().computed == {"r": 1}
    decode.step()
    assert len(sleeps) == 1, "a step that decodes r does not sleep, although s waits"
