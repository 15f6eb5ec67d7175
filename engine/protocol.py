"""What Baton asks of an inference engine. One screen; two implementations beside it.

``engine.vllm.engine`` runs vLLM's AsyncLLM; ``engine.fake`` is a deterministic engine with
a latency model, for tests of everything around the engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from baton.v1 import inference_pb2
from core.errors import InvalidArgumentError
from core.types import WorkerLoad


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Fixed once the engine has started."""

    max_model_len: int  # prompt and output together, tokens
    vocab_size: int
    kv_addresses: tuple[str, ...]  # KV control channel, one per TP rank; empty: none


@dataclass(frozen=True, slots=True)
class KvSend:
    """Hold the prompt's KV for a decode worker that will reserve it under the key."""

    first_token: bool  # the sampled token travels with the KV


@dataclass(frozen=True, slots=True)
class KvReceive:
    """Reserve blocks and fetch the prompt's KV from a prefill worker."""

    incarnation: str  # of the prefill worker
    control_addresses: tuple[str, ...]
    first_token: bool


@dataclass(frozen=True, slots=True)
class EngineRequest:
    key: str  # unique; "request_id#attempt"
    token_ids: tuple[int, ...]
    sampling: inference_pb2.SamplingParams  # validated by the router
    kv: KvSend | KvReceive | None
    tokens_so_far: int = 0  # at the end of token_ids: output of earlier attempts


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Some tokens of one request, in order; the last output has a finish reason."""

    first_index: int  # output position of token_ids[0]; 1 if token 0 came with the KV
    token_ids: tuple[int, ...]
    logprobs: tuple[inference_pb2.TokenLogprobs, ...]
    finish_reason: inference_pb2.FinishReason  # UNSPECIFIED: more will come
    kv: inference_pb2.KvReport | None  # first output only
    cached_tokens: int  # prompt positions found in this engine's own prefix cache
    queue_ms: float  # accepted -> first step; first output only, else 0
    prefill_ms: float  # first step -> first token; first output only, else 0


class Engine(Protocol):
    """An engine is started once, serves requests concurrently, and is stopped once."""

    async def start(self) -> EngineFacts:
        """Load the model and be ready to serve.

        Raises:
            ConfigError: a setting that the engine refuses, or a model that is not there.
        """

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Stream the output of one request.

        Closing the iterator (or cancelling the task that reads it) aborts the request and
        frees what it holds, on both sides of a transfer.

        Raises:
            InvalidArgumentError: the engine cannot serve such a request.
            WorkerLostError: the engine died.
        """

    async def pair_up(self, others: Mapping[str, tuple[str, ...]]) -> Set[str]:
        """Make KV pairs with workers of the other pool before a request needs them.

        A decode worker begins to, a prefill worker only looks; neither waits.

        Args:
            others: KV control addresses by incarnation.

        Returns:
            Incarnations of ``others`` whose pairs are not up yet and may still come up.
        """

    async def release(self, key: str) -> None:
        """Drop KV held by a finished ``KvSend`` request. Unknown keys are ignored."""

    def load(self) -> WorkerLoad:
        """The current load; cheap, called with each lease renewal."""

    async def check_health(self) -> None:
        """Raises WorkerLostError if the engine can serve no more."""

    async def ping(self) -> None:
        """Return when the engine's own loop has answered, which it does between two steps.

        Raises:
            WorkerLostError: the engine died.
        """

    def must_be_replaced(self) -> str | None:
        """Why this engine should be drained and ended although it serves, if it should."""

    async def stop(self) -> None:
        """Abort what runs and end all processes of the engine. Idempotent."""


def check_prompt(request: EngineRequest, max_model_len: int) -> None:
    """Raises InvalidArgumentError unless there is a prompt, and room for one token more."""
    tokens = len(request.token_ids)
    if not 1 <= tokens < max_model_len:
        raise InvalidArgumentError(
            f"the prompt has {tokens} tokens, the model takes 1 to {max_model_len - 1}",
            reason="PROMPT_TOO_LONG" if tokens else "EMPTY_PROMPT",
        )
    if not 0 <= request.tokens_so_far < tokens:
        raise InvalidArgumentError(
            f"{request.tokens_so_far} of {tokens} tokens cannot be output so far"
        )
