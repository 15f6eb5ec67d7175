from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.v1 import inference_pb2
from router.dispatch.assemble import (
    Assembler,
    FirstTokenDiffersError,
    ProtocolViolationError,
)
from router.request import UNFINISHED, TokenBatch

STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH


def batch(*token_ids: int, finish: inference_pb2.FinishReason = UNFINISHED) -> TokenBatch:
    return TokenBatch(token_ids, (), finish)


def tokens_of(batches: tuple[TokenBatch, ...]) -> list[int]:
    return [token_id for each in batches for token_id in each.token_ids]


@given(
    data=st.data(),
    tokens=st.lists(st.integers(0, 9), min_size=2, max_size=12),
    forwards_first_token=st.booleans(),
    recomputed=st.booleans(),
)
def test_any_order_of_arrival_gives_each_token_once(
    data: st.DataObject, tokens: list[int], forwards_first_token: bool, recomputed: bool
) -> None:
    """The prefill answer, if any, comes before, between or after the decode stream's batches."""
    start = 0 if recomputed or not forwards_first_token else 1
    batches: list[tuple[int, TokenBatch]] = []
    while start < len(tokens):
        size = data.draw(st.integers(1, 4))
        part = tokens[start : start + size]
        last = start + size >= len(tokens)
        batches.append((start, batch(*part, finish=LENGTH if last else UNFINISHED)))
        start += size
    arrives = data.draw(st.integers(0, len(batches))) if forwards_first_token else None

    assembler = Assembler(forwards_first_token=forwards_first_token, limit_tokens=len(tokens))
    out: list[TokenBatch] = []
    for index in range(len(batches) + 1):
        if index == arrives and not (out and out[-1].finish_reason != UNFINISHED):
            out += assembler.prefill(batch(tokens[0]))
        if index < len(batches):
            out += assembler.decode(*batches[index])

    assert tokens_of(tuple(out)) == tokens
    assert [each.finish_reason for each in out].count(LENGTH) == 1
    assert out[-1].finish_reason == LENGTH


def test_a_recomputed_token_that_differs_is_an_error() -> None:
    assembler = Assembler(forwards_first_token=True, limit_tokens=5)
    assembler.prefill(batch(7))
    with pytest.raises(FirstTokenDiffersError, match="8 was recomputed, 7 was forwarded"):
        assembler.decode(0, batch(8, 9))


def test_a_recomputed_token_that_comes_first_is_kept() -> None:
    assembler = Assembler(forwards_first_token=True, limit_tokens=5)
    assert tokens_of(assembler.decode(0, batch(8, 9))) == [8, 9]
    assert assembler.prefill(batch(7)) == ()
    assert tokens_of(assembler.decode(2, batch(3))) == [3]


def test_a_first_token_that_ends_the_request_drops_held_tokens() -> None:
    assembler = Assembler(forwards_first_token=True, limit_tokens=5)
    assert assembler.decode(1, batch(2, 3)) == ()
    assert not assembler.started
    assert assembler.prefill(batch(1, finish=STOP)) == (batch(1, finish=STOP),)
    with pytest.raises(ProtocolViolationError):
        assembler.decode(3, batch(4))


def test_an_end_without_tokens_waits_for_the_first_token() -> None:
    assembler = Assembler(forwards_first_token=True, limit_tokens=5)
    assert assembler.decode(1, batch(finish=STOP)) == ()
    assert assembler.prefill(batch(1)) == (batch(1), batch(finish=STOP))


def test_a_response_with_only_a_report_adds_no_batch() -> None:
    assembler = Assembler(forwards_first_token=False, limit_tokens=5)
    assert assembler.decode(0, batch()) == ()
    assert not assembler.started


def test_logprobs_go_with_their_tokens() -> None:
    assembler = Assembler(forwards_first_token=True, limit_tokens=5)
    logprobs = tuple(inference_pb2.TokenLogprobs(logprob=-i) for i in range(2))
    assembler.prefill(batch(7))
    (out,) = assembler.decode(0, TokenBatch((7, 8), logprobs, UNFINISHED))
    assert out == TokenBatch((8,), logprobs[1:], UNFINISHED)


@pytest.mark.parametrize(
    ("forwards_first_token", "calls"),
    [
        (False, [(1, batch(1))]),  # token 0 is missing
        (True, [(2, batch(1))]),  # token 1 is missing
        (False, [(0, batch(1)), (2, batch(1))]),  # a gap
        (False, [(0, batch(1, 2)), (1, batch(2))]),  # a repetition
        (False, [(0, batch(*range(6)))]),  # too many tokens
        (False, [(0, batch(1, finish=STOP)), (1, batch(2))]),  # after the end
        (True, [(1, batch(1, finish=STOP)), (2, batch(2))]),  # after the end, while tokens are held
        (False, [(0, TokenBatch((1, 2), (inference_pb2.TokenLogprobs(),), UNFINISHED))]),
    ],
)
def test_output_that_breaks_the_protocol_is_refused(
    forwards_first_token: bool, calls: list[tuple[int, TokenBatch]]
) -> None:
    assembler = Assembler(forwards_first_token=forwards_first_token, limit_tokens=5)
    for first_index, each in calls[:-1]:
        assembler.decode(first_index, each)
    with pytest.raises(ProtocolViolationError):
        assembler.decode(*calls[-1])


def test_a_first_token_that_was_not_requested_is_refused() -> None:
    with pytest.raises(ProtocolViolationError):
        Assembler(forwards_first_token=False, limit_tokens=5).prefill(batch(1))
