from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from baton.v1 import inference_pb2
from core.errors import InvalidArgumentError, NotFoundError
from router.api.validate import (
    ChatTurns,
    PromptText,
    PromptTokens,
    check_request,
    check_request_id,
    with_prompt,
)
from router.request import TokenRequest
from router.text.codec import ModelFacts

MODEL = ModelFacts(served_name="m", max_model_len=16, vocab_size=100)


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**{"prompt": "x", **fields})


def fitted(prompt_tokens: int = 4, **sampling: Any) -> TokenRequest:
    checked = check_request(request(sampling=sampling), "r", MODEL)
    return with_prompt(checked, [1] * prompt_tokens, MODEL)


def reason_of(**fields: Any) -> str:
    with pytest.raises((InvalidArgumentError, NotFoundError)) as caught:
        check_request(request(**fields), "r", MODEL)
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("temperature", [-0.1, 2.1], [0, 2]),
        ("top_p", [-1, 0, 1.01], [0.01, 1]),
        ("top_k", [-1], [0, 5]),
        ("min_p", [-0.1, 1.1], [0, 1]),
        ("presence_penalty", [-2.1, 2.1], [-2, 2]),
        ("frequency_penalty", [-2.1, 2.1], [-2, 2]),
        ("repetition_penalty", [-1, 0, 2.1], [0.01, 2]),
        ("max_tokens", [0], [1, 10**6]),
        ("logprobs", [21], [0, 20]),
        ("stop", [[""], ["x" * 257], ["x"] * 17], [["x" * 256] * 16]),
        ("stop_token_ids", [[1] * 65], [[99] * 64]),
        ("seed", [], [0, -5, 2**62]),
    ],
)
def test_each_field_of_sampling_has_its_range(name: str, bad: list[Any], good: list[Any]) -> None:
    for value in good:
        check_request(request(sampling={name: value}), "r", MODEL)
    if isinstance(good[0], float) or name in ("temperature", "min_p", "presence_penalty"):
        bad = [*bad, math.nan, math.inf, -math.inf]
    for value in bad:
        with pytest.raises(InvalidArgumentError, match=rf"sampling\.{name}") as caught:
            check_request(request(sampling={name: value}), "r", MODEL)
        assert caught.value.reason == "INVALID_SAMPLING"


def test_min_tokens_is_at_most_max_tokens() -> None:
    with pytest.raises(InvalidArgumentError, match=r"min_tokens is 6; must be at most .* 5"):
        check_request(request(sampling={"min_tokens": 6, "max_tokens": 5}), "r", MODEL)


def test_token_ids_are_in_the_vocabulary() -> None:
    assert reason_of(token_ids={"ids": [5, 100]}) == "TOKEN_ID_OUT_OF_RANGE"
    assert reason_of(sampling={"stop_token_ids": [100]}) == "TOKEN_ID_OUT_OF_RANGE"


def test_reasons() -> None:
    assert reason_of(model="other") == "UNKNOWN_MODEL"
    assert reason_of(prompt="") == "EMPTY_PROMPT"
    assert reason_of(chat={"messages": [{"role": "user", "content": ""}]}) == "EMPTY_PROMPT"
    assert reason_of(chat={"messages": [{"role": "", "content": "x"}]}) == "INVALID_ROLE"
    turn = {"role": "user", "content": "x"}
    assert reason_of(chat={"messages": [turn] * 1025}) == "TOO_MANY_MESSAGES"
    check_request(request(chat={"messages": [turn] * 1024}), "r", MODEL)


def test_inputs() -> None:
    assert check_request(request(model="m"), "r", MODEL).prompt == PromptText("x")
    assert check_request(request(token_ids={"ids": [1, 2]}), "r", MODEL).prompt == PromptTokens(
        (1, 2)
    )
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    prompt = check_request(request(chat=chat), "r", MODEL).prompt
    assert isinstance(prompt, ChatTurns)
    assert [(turn.role, turn.content) for turn in prompt.turns] == [("user", "hi")]


@pytest.mark.parametrize("request_id", ["a", "A-b_c.d:9", "x" * 128])
def test_good_request_ids(request_id: str) -> None:
    check_request_id(request_id)


@pytest.mark.parametrize("request_id", ["", " ", "x" * 129, "ä", "a~b", "a\n"])
def test_bad_request_ids(request_id: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_request_id(request_id)


def test_a_long_bad_value_is_shortened_in_the_error() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_request_id("x" * 10_000)
    assert len(caught.value.message) < 200


def test_max_tokens_fills_and_fits_the_context() -> None:
    assert fitted(4).sampling.max_tokens == 12
    assert fitted(4, max_tokens=100).sampling.max_tokens == 12
    assert fitted(4, max_tokens=5).sampling.max_tokens == 5
    assert fitted(15).sampling.max_tokens == 1
    assert fitted(4, min_tokens=50).sampling.min_tokens == 12


@pytest.mark.parametrize(("tokens", "reason"), [(0, "EMPTY_PROMPT"), (16, "PROMPT_TOO_LONG")])
def test_prompts_that_do_not_fit(tokens: int, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        fitted(tokens)
    assert caught.value.reason == reason


def test_the_models_defaults_fill_what_the_request_leaves_unset() -> None:
    model = replace(MODEL, sampling_defaults={"temperature": 0.25, "top_k": 5, "max_tokens": 4})
    for sent, expected in (
        ({}, {"temperature": 0.25, "top_k": 5, "max_tokens": 4}),
        ({"temperature": 0, "top_k": 0}, {"temperature": 0, "top_k": 0, "max_tokens": 4}),
        ({"max_tokens": 9, "seed": 1}, {"temperature": 0.25, "top_k": 5, "max_tokens": 9}),
    ):
        request = inference_pb2.GenerateRequest(token_ids={"ids": [1]}, sampling=sent)
        sampling = with_prompt(check_request(request, "r", model), [1], model).sampling
        assert {name: getattr(sampling, name) for name in expected} == expected
    request = inference_pb2.GenerateRequest(token_ids={"ids": [1]})
    plain = with_prompt(check_request(request, "r", MODEL), [1], MODEL).sampling
    assert not plain.HasField("temperature")


def test_stop_strings_stay_in_the_router() -> None:
    ready = fitted(stop=["a", "b"], stop_token_ids=[7])
    assert ready.stops == ("a", "b")
    assert not ready.sampling.stop
    assert list(ready.sampling.stop_token_ids) == [7]
