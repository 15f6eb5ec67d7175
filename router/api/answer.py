"""Turns the output of one request into its stream of responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from baton.v1 import inference_pb2
from router.dispatch.progress import Progress
from router.request import UNFINISHED, TokenBatch
from router.text.output import TextOutput

Write = Callable[[inference_pb2.GenerateResponse], Awaitable[None]]


class Answer:
    """Turns batches of tokens into responses, numbered from 0 without a gap.

    Args:
        write: writes one response to the client's stream and waits while the client is slow.
            This wait holds back the decode worker too.
        first_sequence: the number of the first response to write. The client has the earlier
            responses already.

    Attributes:
        resume_token: for the first response that is written; empty if there is no journal.
    """

    def __init__(
        self, progress: Progress, output: TextOutput, write: Write, first_sequence: int = 0
    ) -> None:
        self.resume_token = ""
        self._progress = progress
        self._output = output
        self._write = write
        self._first_sequence = first_sequence
        self.next_sequence = 0

    async def emit(self, batch: TokenBatch) -> bool:
        """Write a response if the batch adds text or tokens, or ends the request.

        Returns False after the last response.
        """
        piece = self._output.push(batch)
        last = piece.finish_reason != UNFINISHED
        if not (piece.token_ids or piece.text or last):
            return True
        response = inference_pb2.GenerateResponse(
            request_id=self._progress.request.request_id,
            sequence=self.next_sequence,
            text=piece.text,
            token_ids=piece.token_ids,
            logprobs=piece.logprobs,
        )
        if last:
            response.finish_reason = piece.finish_reason
            response.usage.CopyFrom(self._usage())
            response.phases.CopyFrom(self._phases())
        self.next_sequence += 1
        if response.sequence >= self._first_sequence:
            response.resume_token, self.resume_token = self.resume_token, ""
            await self._write(response)
            self._progress.phases.response_written()
        return not last

    def _usage(self) -> inference_pb2.Usage:
        prompt_tokens = len(self._progress.request.prompt)
        attempt = self._progress.attempt
        cached_tokens = attempt.cached_tokens if attempt is not None else 0
        return inference_pb2.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._output.completion_tokens,
            # After a failover, cached_tokens may include output tokens of earlier attempts.
            cached_prompt_tokens=min(cached_tokens, prompt_tokens),
        )

    def _phases(self) -> inference_pb2.Phases:
        phases = self._progress.phases.report()
        attempt = self._progress.attempt
        if attempt is not None and attempt.kv is not None:
            phases.kv.CopyFrom(attempt.kv)
        else:
            phases.kv.outcome = inference_pb2.KV_OUTCOME_LOCAL
        phases.prefill_worker = self._progress.prefill_id
        phases.decode_worker = self._progress.decode_id
        phases.attempts = self._progress.attempts
        return phases
