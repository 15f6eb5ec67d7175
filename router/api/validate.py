"""Checks a client's request once, and makes it ready for the workers. Pure.

``check_request`` checks everything that needs no tokeniser. ``with_prompt`` then adds the token ids
and fits ``max_tokens`` and ``min_tokens`` to the model's context. An error about an invalid value
names the field, the value and the allowed values. Every error carries a stable reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from baton.v1 import inference_pb2
from core.errors import InvalidArgumentError, NotFoundError
from router.request import TokenRequest, shown
from router.text.codec import ChatTurn, ModelFacts

# The limits that inference.proto documents. The limits on sampling fields bound the work per token.
MAX_REQUEST_ID_CHARS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_CHAT_MESSAGES = 1024  # bounds the work of a template
ROLES = ("system", "user", "assistant")

_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_CHARS}}}")


@dataclass(frozen=True, slots=True)
class Range:
    low: float
    high: float
    low_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return math.isfinite(value) and above and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"


# The ranges that inference.proto documents.
_FLOAT_RANGES = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, low_open=True),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 2, low_open=True),
}


@dataclass(frozen=True, slots=True)
class PromptText:
    text: str


@dataclass(frozen=True, slots=True)
class ChatTurns:
    turns: tuple[ChatTurn, ...]
    parse_special: bool = False  # whether contents may hold special tokens


@dataclass(frozen=True, slots=True)
class PromptTokens:
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request whose fields are valid. Its prompt may not be tokenised yet."""

    request_id: str
    prompt: PromptText | ChatTurns | PromptTokens
    sampling: inference_pb2.SamplingParams  # as the client sent it; never modified


def check_request_id(request_id: str) -> None:
    """Raises InvalidArgumentError unless a client may use this id."""
    if not _REQUEST_ID.fullmatch(request_id):
        raise _invalid(
            "request_id",
            request_id,
            f"1 to {MAX_REQUEST_ID_CHARS} characters of A-Z a-z 0-9 . _ : -",
            "INVALID_REQUEST_ID",
        )


def check_request(
    request: inference_pb2.GenerateRequest, request_id: str, model: ModelFacts
) -> CheckedRequest:
    """Check everything that needs no tokeniser.

    Raises:
        NotFoundError: the request names a model that this cluster does not serve.
        InvalidArgumentError: a field is invalid. The error is about the first one found.
    """
    if request.model not in ("", model.served_name):
        raise NotFoundError(
            f"model is {shown(request.model)}; this cluster serves {model.served_name!r}",
            reason="UNKNOWN_MODEL",
        )
    _check_sampling(request.sampling, model)
    return CheckedRequest(request_id, _prompt(request, model), request.sampling)


def with_prompt(
    checked: CheckedRequest, token_ids: Sequence[int], model: ModelFacts
) -> TokenRequest:
    """Add the prompt's token ids and the model's sampling defaults.

    ``max_tokens`` and ``min_tokens`` are made to fit into the context.

    Raises:
        InvalidArgumentError: the prompt has no tokens, or it leaves no room for an output token.
    """
    if not token_ids:
        raise InvalidArgumentError("the prompt has no tokens", reason="EMPTY_PROMPT")
    model.check_fits(len(token_ids))
    left_tokens = model.max_model_len - len(token_ids)
    sampling = inference_pb2.SamplingParams()
    sampling.CopyFrom(checked.sampling)
    for name, value in model.sampling_defaults.items():
        if not sampling.HasField(name):
            setattr(sampling, name, value)
    stops = tuple(sampling.stop)
    sampling.ClearField("stop")
    wanted = sampling.max_tokens if sampling.HasField("max_tokens") else left_tokens
    sampling.max_tokens = min(wanted, left_tokens)
    sampling.min_tokens = min(sampling.min_tokens, sampling.max_tokens)
    return TokenRequest(checked.request_id, tuple(token_ids), sampling, stops)


def _prompt(
    request: inference_pb2.GenerateRequest, model: ModelFacts
) -> PromptText | ChatTurns | PromptTokens:
    kind = request.WhichOneof("input")
    if kind == "prompt":
        if not request.prompt:
            raise _empty("prompt")
        return PromptText(request.prompt)
    if kind == "chat":
        return _chat(request.chat)
    if kind == "token_ids":
        if not request.token_ids.ids:
            raise _empty("token_ids")
        # The cheap check comes first: there may be a million ids.
        model.check_fits(len(request.token_ids.ids))
        _check_token_ids("token_ids", request.token_ids.ids, model)
        return PromptTokens(tuple(request.token_ids.ids))
    raise InvalidArgumentError(
        "the request has no input: set prompt, chat or token_ids", reason="NO_INPUT"
    )


def _chat(chat: inference_pb2.ChatInput) -> ChatTurns:
    if not any(message.content for message in chat.messages):
        raise _empty("chat")
    if len(chat.messages) > MAX_CHAT_MESSAGES:
        raise InvalidArgumentError(
            f"chat has {len(chat.messages)} messages; at most {MAX_CHAT_MESSAGES} are allowed",
            reason="TOO_MANY_MESSAGES",
        )
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise _invalid(
                f"chat.messages[{index}].role", message.role, f"one of {ROLES}", "INVALID_ROLE"
            )
    turns = tuple(ChatTurn(message.role, message.content) for message in chat.messages)
    return ChatTurns(turns, chat.parse_special_tokens)


def _check_sampling(sampling: inference_pb2.SamplingParams, model: ModelFacts) -> None:
    for name, allowed in _FLOAT_RANGES.items():
        if sampling.HasField(name):
            value = float(getattr(sampling, name))
            if value not in allowed:
                raise _invalid_sampling(name, value, f"in {allowed}")
    if sampling.top_k < 0:
        raise _invalid_sampling("top_k", sampling.top_k, "0 (off) or more")
    if sampling.logprobs > MAX_LOGPROBS:
        raise _invalid_sampling("logprobs", sampling.logprobs, f"at most {MAX_LOGPROBS}")
    _check_lengths(sampling)
    _check_stops(sampling, model)


def _check_lengths(sampling: inference_pb2.SamplingParams) -> None:
    if not sampling.HasField("max_tokens"):
        return
    if sampling.max_tokens < 1:
        raise _invalid_sampling("max_tokens", sampling.max_tokens, "at least 1")
    if sampling.min_tokens > sampling.max_tokens:
        raise _invalid_sampling(
            "min_tokens", sampling.min_tokens, f"at most max_tokens, {sampling.max_tokens}"
        )


def _check_stops(sampling: inference_pb2.SamplingParams, model: ModelFacts) -> None:
    if len(sampling.stop) > MAX_STOPS:
        raise _invalid_sampling("stop", f"{len(sampling.stop)} strings", f"at most {MAX_STOPS}")
    for index, stop in enumerate(sampling.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise _invalid_sampling(f"stop[{index}]", stop, f"1 to {MAX_STOP_CHARS} characters")
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _invalid_sampling(
            "stop_token_ids", f"{len(sampling.stop_token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS}"
        )
    _check_token_ids("sampling.stop_token_ids", sampling.stop_token_ids, model)


def _check_token_ids(field: str, token_ids: Sequence[int], model: ModelFacts) -> None:
    if not token_ids or max(token_ids) < model.vocab_size:
        return
    index = next(i for i, token_id in enumerate(token_ids) if token_id >= model.vocab_size)
    raise _invalid(
        f"{field}[{index}]",
        token_ids[index],
        f"a token id in [0, {model.vocab_size - 1}]",
        "TOKEN_ID_OUT_OF_RANGE",
    )


def _empty(field: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field} is empty; send some input", reason="EMPTY_PROMPT")


def _invalid_sampling(name: str, value: object, allowed: str) -> InvalidArgumentError:
    return _invalid(f"sampling.{name}", value, allowed, "INVALID_SAMPLING")


def _invalid(field: str, value: object, allowed: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field} is {shown(value)}; must be {allowed}", reason=reason)
