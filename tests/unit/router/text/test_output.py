from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.v1 import inference_pb2
from router.request import UNFINISHED, TokenBatch
from router.text.output import TextOutput
from tests.support.router_harness import make_tokenizer

STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH
TOKENIZER = make_tokenizer()
TEXT = "the quick brown fox"


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text).ids)


def batch(
    token_ids: tuple[int, ...], finish: inference_pb2.FinishReason = UNFINISHED
) -> TokenBatch:
    return TokenBatch(token_ids, (), finish)


def test_an_end_token_has_an_id_and_no_text() -> None:
    output = TextOutput(TOKENIZER, (), 0)
    piece = output.push(batch((*ids("fox"), *ids("z")), STOP))
    assert piece.text == "fox"
    assert piece.token_ids == (*ids("fox"), *ids("z"))
    assert output.completion_tokens == len(piece.token_ids)


def test_held_text_is_returned_at_the_end() -> None:
    output = TextOutput(TOKENIZER, ("fox!",), 0)
    first = output.push(batch(ids(TEXT)))
    last = output.push(batch((), LENGTH))
    assert first.text + last.text == TEXT
    assert last.text == "fox"


def test_tokens_after_a_stop_string_are_cut() -> None:
    output = TextOutput(TOKENIZER, ("quick",), 0)
    piece = output.push(batch(ids(TEXT)))
    assert piece.text == "the "
    assert piece.finish_reason == STOP
    assert TOKENIZER.decode(piece.token_ids).startswith("the quick")
    assert len(piece.token_ids) < len(ids(TEXT))
    assert output.completion_tokens == len(piece.token_ids)


def test_a_stop_string_overrides_the_finish_reason_of_its_batch() -> None:
    output = TextOutput(TOKENIZER, ("fox",), 0)
    piece = output.push(batch(ids(TEXT), LENGTH))
    assert (piece.text, piece.finish_reason) == ("the quick brown ", STOP)


def test_stop_strings_count_only_after_min_tokens() -> None:
    words = ids("the the the the")
    output = TextOutput(TOKENIZER, ("the",), 2)
    text = ""
    for token_id in words:
        piece = output.push(batch((token_id,)))
        text += piece.text
        if piece.finish_reason == STOP:
            break
    assert output.completion_tokens > 2
    assert text.strip() == TOKENIZER.decode(words[:2]).strip()


def test_logprobs_are_cut_with_their_tokens() -> None:
    tokens = ids(TEXT)
    logprobs = tuple(inference_pb2.TokenLogprobs(logprob=-i) for i in range(len(tokens)))
    piece = TextOutput(TOKENIZER, ("quick",), 0).push(TokenBatch(tokens, logprobs, UNFINISHED))
    assert piece.logprobs == logprobs[: len(piece.token_ids)]


@given(st.data())
def test_batches_of_any_size_give_the_same_text_and_tokens(data: st.DataObject) -> None:
    tokens = ids(TEXT * 3)
    whole = TextOutput(TOKENIZER, ("brown",), 0).push(batch(tokens, LENGTH))
    output = TextOutput(TOKENIZER, ("brown",), 0)
    text, start = "", 0
    token_ids: list[int] = []
    while start < len(tokens):
        size = data.draw(st.integers(1, 5))
        last = start + size >= len(tokens)
        piece = output.push(batch(tokens[start : start + size], LENGTH if last else UNFINISHED))
        text += piece.text
        token_ids += piece.token_ids
        start += size
        if piece.finish_reason != UNFINISHED:
            break
    assert (text, tuple(token_ids)) == (whole.text, whole.token_ids)
