"""The interface between Baton and an inference engine.

It has two implementations: ``engine.vllm.engine`` runs vLLM's AsyncLLM, and ``engine.fake`` is a
deterministic engine with a latency model, for tests of everything around the engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from baton.v1 import inference_pb2
from core.errors import InvalidArgumentError
from core.types import Pool, WorkerLoad


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Properties of an engine that do not change once it has started."""

    max_model_len: int  # tokens, prompt and output together
    vocab_size: int
    # Addresses of the KV control servers, one per TP rank. Empty if the engine cannot send KV.
    kv_addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KvSend:
    """Tells the engine to hold the prompt's KV for a decode worker.

    The decode worker reserves this KV under the request's transfer id.
    """

    forwards_first_token: bool  # whether the sampled token travels with the KV


@dataclass(frozen=True, slots=True)
class KvReceive:
    """Tells the engine to reserve KV blocks and fetch the prompt's KV from a prefill worker."""

    incarnation: str  # of the prefill worker
    control_addresses: tuple[str, ...]  # of the prefill worker, one per TP rank
    forwards_first_token: bool  # whether the prefill worker's token travels with the KV


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One attempt of one request."""

    transfer_id: str  # "request_id#attempt", unique among the requests in flight
    token_ids: tuple[int, ...]  # the prompt, then the output of earlier attempts
    sampling: inference_pb2.SamplingParams  # validated by the router
    kv: KvSend | KvReceive | None  # None if no KV is transferred
    tokens_so_far: int = 0  # number of output tokens at the end of token_ids


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Consecutive output tokens of one request. The last output has a finish reason.

    ``kv`` is None and the last three fields are 0 in all outputs but the first.
    """

    # Position of token_ids[0] in the output of this attempt. The first output begins at 1 if
    # token 0 came with the KV, else at 0.
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[inference_pb2.TokenLogprobs, ...]  # one per token; empty if not requested
    finish_reason: inference_pb2.FinishReason  # UNSPECIFIED if more outputs follow
    kv: inference_pb2.KvReport | None
    cached_tokens: int  # prompt positions found in the prefix cache or received from prefill
    queue_ms: float  # from acceptance to the first step
    prefill_ms: float  # from the first step to the first token


class Engine(Protocol):
    """Serves requests concurrently. Start it once and stop it once."""

    async def start(self) -> EngineFacts:
        """Load the model and return when the engine can serve.

        Raises:
            ConfigError: the engine refuses a setting, or the model is missing.
        """

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Stream the output of one request.

        Closing the iterator (or cancelling the task that reads it) aborts the request and
        frees its KV blocks. For a ``KvReceive`` request, the prefill worker also drops the KV.

        Raises:
            InvalidArgumentError: the engine cannot serve this request.
            WorkerLostError: the engine died.
        """

    async def pair_up(self, others: Mapping[str, tuple[str, ...]], pool: Pool) -> Set[str]:
        """Make KV pairs with workers of the other pool before a request needs them.

        A pair connects one prefill rank and one decode rank. On a decode worker, this call starts
        to make the pairs and does not wait for them. On a prefill worker, it only checks which
        pairs exist.

        Args:
            others: KV control addresses of the other workers, by incarnation. Pairs are made once
                with each worker, and again if an earlier call did not list the worker.
            pool: this worker's pool. It may change if ``cluster.role_change`` is set.

        Returns:
            The incarnations in ``others`` whose pairs do not exist yet but may still be made.
        """

    async def release(self, transfer_id: str) -> None:
        """Drop the KV held for a ``KvSend`` request. An unknown id is not an error."""

    def load(self) -> WorkerLoad:
        """Return the current load. Must be cheap: it is called at each lease renewal."""

    async def check_health(self) -> None:
        """Raise WorkerLostError if the engine can no longer serve requests."""

    async def ping(self) -> None:
        """Return when the engine's own loop has answered. The loop answers between two steps.

        Raises:
            WorkerLostError: the engine died.
        """

    def must_be_replaced(self) -> str | None:
        """Return why an engine that still serves should be drained and stopped, or None."""

    async def stop(self) -> None:
        """Abort all requests and end all processes of the engine. Idempotent."""


def check_prompt(request: EngineRequest, max_model_len: int) -> None:
    """Raise InvalidArgumentError if the prompt's length or ``tokens_so_far`` is out of range.

    The prompt needs at least one token, and must leave room for one output token within
    ``max_model_len`` tokens.
    """
    tokens = len(request.token_ids)
    if not 1 <= tokens < max_model_len:
        raise InvalidArgumentError(
            f"the prompt has {tokens} tokens, but the model takes 1 to {max_model_len - 1}",
            reason="PROMPT_TOO_LONG" if tokens else "EMPTY_PROMPT",
        )
    if not 0 <= request.tokens_so_far < tokens:
        raise InvalidArgumentError(
            f"tokens_so_far is {request.tokens_so_far}, but must be less than the number of "
            f"token_ids, {tokens}, and not negative"
        )
