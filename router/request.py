"""Defines a tokenised request and its output, for several parts of the router."""

from __future__ import annotations

from dataclasses import dataclass

from baton.v1 import inference_pb2

UNFINISHED = inference_pb2.FINISH_REASON_UNSPECIFIED

_SHOWN_CHARS = 40  # keeps error messages readable


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request that was checked and tokenised, ready for the workers."""

    request_id: str
    prompt: tuple[int, ...]
    # What workers get: max_tokens is set and fits the context, and there are no stop strings,
    # because only the router has text.
    sampling: inference_pb2.SamplingParams
    stops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Consecutive output tokens; a finish reason marks the request's last batch."""

    token_ids: tuple[int, ...]
    logprobs: tuple[inference_pb2.TokenLogprobs, ...]  # one per token, or none
    finish_reason: inference_pb2.FinishReason


def shown(value: object) -> str:
    """A value that a client sent, as text for an error message. Long strings are cut."""
    if not isinstance(value, str):
        return str(value)
    short = value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "…"
    return repr(short)
