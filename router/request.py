"""The values of one request that every part of the router shares."""

from __future__ import annotations

from dataclasses import dataclass

from baton.v1 import inference_pb2

UNFINISHED = inference_pb2.FINISH_REASON_UNSPECIFIED

_SHOWN_CHARS = 40  # keeps a message readable


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request that is ready for the workers."""

    request_id: str
    prompt: tuple[int, ...]
    # For workers: no stop strings (text is the router's), max_tokens set and fitting.
    sampling: inference_pb2.SamplingParams
    stops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Consecutive output tokens; a finish reason marks the request's last batch."""

    token_ids: tuple[int, ...]
    logprobs: tuple[inference_pb2.TokenLogprobs, ...]  # one per token, or none
    finish_reason: inference_pb2.FinishReason


def shown(value: object) -> str:
    """A value that a client sent, short enough for an error message."""
    if not isinstance(value, str):
        return str(value)
    short = value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "…"
    return repr(short)
