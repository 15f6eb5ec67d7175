"""Requests, responses and errors are translated to and from the protocol. No server runs."""

from __future__ import annotations

import dataclasses
import pickle
import typing
from typing import Any

import grpc
import pytest

from baton import (
    BatonError,
    CapacityError,
    ChatMessage,
    Completion,
    InternalError,
    InvalidArgumentError,
    RequestFields,
    SamplingFields,
    SamplingParams,
    UnavailableError,
)
from baton._wire import StreamReader, build_request
from baton.errors import ERROR_DETAIL_KEY, from_status
from baton.v1 import inference_pb2 as pb
from tests.unit.baton.scripted import answer

LIMIT_BYTES = 1 << 20


def test_sampling_fields_match_sampling_params_and_the_protocol() -> None:
    dataclass_hints = typing.get_type_hints(SamplingParams)
    assert typing.get_type_hints(SamplingFields) == dataclass_hints
    assert list(dataclass_hints) == [field.name for field in pb.SamplingParams.DESCRIPTOR.fields]


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        (None, {}),
        ("a", {"token_ids": [1]}),
        ("a", {"messages": [ChatMessage("user", "a")]}),
        (None, {"token_ids": [], "messages": []}),
    ],
)
def test_a_request_needs_exactly_one_input(prompt: str | None, fields: RequestFields) -> None:
    with pytest.raises(InvalidArgumentError, match="exactly one") as caught:
        build_request(prompt, LIMIT_BYTES, **fields)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.reason == "INVALID_INPUT"


@pytest.mark.parametrize(
    ("prompt", "fields", "which"),
    [
        ("", {}, "prompt"),
        (None, {"messages": []}, "chat"),
        (None, {"token_ids": []}, "token_ids"),
    ],
)
def test_an_empty_input_still_selects_that_input(
    prompt: str | None, fields: RequestFields, which: str
) -> None:
    assert build_request(prompt, LIMIT_BYTES, **fields).WhichOneof("input") == which


@pytest.mark.parametrize(
    "message",
    ["Hi", {"role": "user"}, {"role": "user", "content": "Hi", "name": "x"}, {"role": 1}, None],
)
def test_a_message_of_another_form_is_refused(message: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="role and content"):
        build_request(None, LIMIT_BYTES, messages=[message])


def test_a_message_may_be_a_dict() -> None:
    dicts = build_request(None, LIMIT_BYTES, messages=[{"role": "user", "content": "Hi"}])
    assert dicts == build_request(None, LIMIT_BYTES, messages=[ChatMessage("user", "Hi")])


def test_special_tokens_of_messages_are_parsed_on_request() -> None:
    messages = [ChatMessage("user", "Hi")]
    assert not build_request(None, LIMIT_BYTES, messages=messages).chat.parse_special_tokens
    request = build_request(None, LIMIT_BYTES, messages=messages, parse_special_tokens=True)
    assert request.chat.parse_special_tokens


def test_all_fields_of_a_request() -> None:
    request = build_request(
        None,
        LIMIT_BYTES,
        messages=[ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")],
        sampling=SamplingParams(temperature=0.5, seed=7, max_tokens=99),
        request_id="r-9",
        model="m",
        service_class="batch",
        max_tokens=5,
        stop="END",
        stop_token_ids=(2, 3),
        ignore_eos=False,
    )
    assert request == pb.GenerateRequest(
        request_id="r-9",
        model="m",
        service_class="batch",
        chat=pb.ChatInput(
            messages=[
                pb.ChatMessage(role="system", content="Be brief."),
                pb.ChatMessage(role="user", content="Hi"),
            ]
        ),
        sampling=pb.SamplingParams(
            temperature=0.5,
            seed=7,
            max_tokens=5,
            stop=["END"],
            stop_token_ids=[2, 3],
            ignore_eos=False,
        ),
    )
    assert not request.sampling.HasField("top_p")  # an unset field takes the router's default


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop_token_ids": [-5]}, "stop_token_ids"),
        ({"stop": 3}, "stop"),
        ({"token_ids": [1 << 32]}, "ids"),
    ],
)
def test_a_value_that_the_protocol_cannot_carry_is_named_in_the_error(
    fields: RequestFields, named: str
) -> None:
    prompt = None if "token_ids" in fields else "a"
    with pytest.raises(InvalidArgumentError, match=f"^{named}: "):
        build_request(prompt, LIMIT_BYTES, **fields)


def test_a_misspelt_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        build_request("a", LIMIT_BYTES, max_token=5)  # type: ignore[call-arg]


def test_a_request_over_the_size_limit_is_not_sent() -> None:
    with pytest.raises(InvalidArgumentError, match="max_message_bytes=100") as caught:
        build_request("a" * 100, 100)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


@pytest.mark.parametrize(
    ("sequences", "reason"),
    [([0, 2], "SEQUENCE_GAP"), ([0, 1, 1], "SEQUENCE_GAP"), ([1], "SEQUENCE_GAP")],
)
def test_a_gap_or_a_repeat_in_the_sequence_raises(sequences: list[int], reason: str) -> None:
    reader = StreamReader("")
    for sequence in sequences[:-1]:
        reader.read(pb.GenerateResponse(request_id="r-1", sequence=sequence))
    with pytest.raises(InternalError) as caught:
        reader.read(pb.GenerateResponse(request_id="r-1", sequence=sequences[-1]))
    assert caught.value.reason == reason
    assert caught.value.request_id == "r-1"


def test_a_stream_ends_only_with_its_last_response() -> None:
    reader = StreamReader("")
    first, last = answer("a", "b")
    reader.read(first)
    with pytest.raises(InternalError, match="without a finish reason"):
        reader.end()
    reader.read(last)
    reader.end()
    with pytest.raises(InternalError, match="after the last one"):
        reader.read(pb.GenerateResponse(sequence=2))


def test_an_unknown_finish_reason_ends_the_stream() -> None:
    reader = StreamReader("")
    response = reader.read(pb.GenerateResponse(finish_reason=77))  # type: ignore[arg-type]
    reader.end()
    assert response.finish_reason == "unknown"
    assert response.phases is not None
    assert response.phases.kv is None


def test_an_error_has_the_fields_of_its_detail_and_can_be_pickled() -> None:
    detail = pb.ErrorDetail(reason="OVERLOADED", request_id="r-1", retry_after_ms=1500)
    error = from_status(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
        [("other", "x"), (ERROR_DETAIL_KEY, detail.SerializeToString())],
        address="h:1",
    )
    assert type(error) is CapacityError
    assert (str(error), error.reason, error.retry_after_s, error.request_id) == (
        "the queue is full",
        "OVERLOADED",
        1.5,
        "r-1",
    )
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is CapacityError
    assert copy.__dict__ == error.__dict__
    assert str(copy) == str(error)


def test_an_unreadable_detail_does_not_hide_the_error() -> None:
    error = from_status(
        grpc.StatusCode.INTERNAL, "broken", [(ERROR_DETAIL_KEY, b"\xff\xff")], address="h:1"
    )
    assert (type(error), error.reason, str(error)) == (InternalError, "INTERNAL", "broken")


def test_unavailable_without_a_detail_is_a_connection_failure() -> None:
    error = from_status(grpc.StatusCode.UNAVAILABLE, "refused", [], address="h:1")
    assert type(error) is UnavailableError
    assert error.reason == "CONNECTION_FAILED"
    assert str(error) == "no connection to a Baton router at h:1: refused"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name != "OK"])
def test_every_status_code_becomes_a_baton_error_with_that_code(code: grpc.StatusCode) -> None:
    # Without a detail, CANCELLED comes from a gRPC server that stops.
    metadata = [("baton-error-bin", pb.ErrorDetail(reason="X").SerializeToString())]
    error = from_status(code, "", metadata, address="h:1", request_id="r-2")
    assert isinstance(error, BatonError)
    assert error.code is code
    assert error.request_id == "r-2"
    assert error.retry_after_s is None
    assert str(error)


def test_join_needs_the_whole_stream() -> None:
    reader = StreamReader("")
    responses = [reader.read(message) for message in answer("a", "b")]
    assert Completion.join(responses).text == "ab"
    for part in ([], responses[:1]):
        with pytest.raises(ValueError, match="not ended"):
            Completion.join(part)


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 3  # type: ignore[misc]
