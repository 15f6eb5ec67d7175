"""The values in requests and responses. The name of a duration ends with its unit."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypedDict


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. ``None`` means the model's own default (generation_config.json), or
    else the default in brackets below."""

    temperature: float | None = None  # [1]; in [0, 2], 0 is greedy
    top_p: float | None = None  # [1]; in (0, 1]
    top_k: int | None = None  # [0, off]
    min_p: float | None = None  # [0]; in [0, 1]
    presence_penalty: float | None = None  # [0]; in [-2, 2]
    frequency_penalty: float | None = None  # [0]; in [-2, 2]
    repetition_penalty: float | None = None  # [1]; in (0, 2]
    seed: int | None = None  # [not reproducible]
    stop: str | Sequence[str] | None = None  # [none]; the returned text ends before it
    stop_token_ids: Sequence[int] | None = None  # [none]
    max_tokens: int | None = None  # [up to the model's context]
    min_tokens: int | None = None  # [0]
    ignore_eos: bool | None = None  # [False]
    logprobs: int | None = None  # [none]; top alternatives per token, at most 20


class SamplingFields(TypedDict, total=False):
    """The fields of ``SamplingParams``, as keyword arguments."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    max_tokens: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    logprobs: int | None


class RequestFields(SamplingFields, total=False):
    """Keyword arguments of ``generate`` and ``complete``, besides the prompt and the timeout.

    A request has exactly one input: the prompt, ``messages`` or ``token_ids``.
    """

    # Rendered with the model's chat template. Dicts have the keys "role" and "content".
    messages: Sequence[ChatMessage | Mapping[str, str]] | None
    # Whether a special token's string in a message becomes the special token. If not (default), it
    # is tokenised as text, so that whoever writes a message cannot forge turns.
    parse_special_tokens: bool | None
    token_ids: Sequence[int] | None  # used unchanged
    sampling: SamplingParams | None  # keyword arguments override its fields
    request_id: str | None  # unique among requests in flight; the router mints one for None
    model: str | None  # served name; None selects the cluster's model
    service_class: str | None  # names a queue of the router; None selects the first one


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end of sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    UNKNOWN = "unknown"  # this client is too old to know the reason


class KvOutcome(enum.StrEnum):
    TRANSFERRED = "transferred"
    RECOMPUTED = "recomputed"  # a transfer failed, so the decode worker prefilled
    LOCAL = "local"  # no transfer was requested
    UNKNOWN = "unknown"  # this client is too old to know the outcome


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    logprob: float  # of the sampled token
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    # Prompt tokens found in the prefix cache of the prefill worker. If no prefill worker took part:
    # in the prefix cache of the decode worker.
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class KvReport:
    """The KV transfer of one request over the process group, for all tensor-parallel ranks."""

    outcome: KvOutcome
    backend: str  # "nccl" or "gloo"
    bytes: int
    messages: int
    tokens: int  # positions whose KV was received
    transfer_ms: float  # first message announced -> all messages received and checked
    cached_tokens: int  # positions found in the decode worker's prefix cache
    computed_tokens: int  # positions that the decode worker computed to get its first token
    hidden_bytes: int  # the part of bytes that was sent while prefill was computing
    tail_ms: float  # prefill's last layer -> last byte sent; 0 if all bytes were hidden
    stall_ms: float  # how long prefill waited because all its buffers were in flight
    retries: int  # reservations repeated over a new process group


@dataclass(frozen=True, slots=True)
class Phases:
    """How the time of one request was spent, measured by the router."""

    queue_ms: float  # accepted -> first dispatch
    prefill_ms: float  # first dispatch -> first token at the router
    ttft_ms: float  # accepted -> first token handed to the stream
    handoff_ms: float  # first token -> second token
    decode_ms: float  # second token -> last token
    tokens_per_s: float  # tokens after the first / (handoff + decode)
    kv: KvReport | None
    prefill_worker: str  # empty if no prefill worker took part
    decode_worker: str  # empty if no decode worker took part
    attempts: int  # number of dispatches; 1 if nothing failed


@dataclass(frozen=True, slots=True)
class Response:
    """One message of a stream. Only the last has ``finish_reason``, ``usage`` and ``phases``."""

    request_id: str
    sequence: int  # 0, 1, 2, … without gaps
    text: str  # never changes later; may be empty although token_ids is not
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one per token if requested
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    phases: Phases | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: all responses of one stream joined."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    usage: Usage
    phases: Phases

    @classmethod
    def join(cls, responses: Sequence[Response]) -> Self:
        """Join all responses of one stream. Raise ValueError if the last one is missing."""
        last = responses[-1] if responses else None
        if last is None or last.finish_reason is None or last.usage is None or last.phases is None:
            raise ValueError("the stream has not ended")
        return cls(
            request_id=last.request_id,
            text="".join(each.text for each in responses),
            token_ids=tuple(token for each in responses for token in each.token_ids),
            logprobs=tuple(logprob for each in responses for logprob in each.logprobs),
            finish_reason=last.finish_reason,
            usage=last.usage,
            phases=last.phases,
        )
