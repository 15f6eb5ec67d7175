"""Turns a request's output tokens into text, and ends the text at a stop string."""

from __future__ import annotations

from dataclasses import dataclass

from baton.v1 import inference_pb2
from router.request import UNFINISHED, TokenBatch
from router.text.detokenizer import IncrementalDetokenizer, TokenDecoder
from router.text.stop import StopMatcher

STOP = inference_pb2.FINISH_REASON_STOP


@dataclass(frozen=True, slots=True)
class Piece:
    """What one batch of tokens adds to the output."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[inference_pb2.TokenLogprobs, ...]
    finish_reason: inference_pb2.FinishReason


class TextOutput:
    """The output text of one request, over all its attempts.

    Args:
        min_tokens: stop strings that begin within the first ``min_tokens`` tokens are ignored.
    """

    def __init__(self, decoder: TokenDecoder, stops: tuple[str, ...], min_tokens: int) -> None:
        self._detokenizer = IncrementalDetokenizer(decoder)
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self.completion_tokens = 0

    def push(self, batch: TokenBatch) -> Piece:
        """Add tokens and return what they add. A piece with a finish reason is the last one.

        Tokens after the one that completes a stop string are dropped.
        """
        # Workers report STOP only for an end-of-sequence token or a stop token. Neither adds text.
        end_tokens = 1 if batch.finish_reason == STOP and batch.token_ids else 0
        text_tokens = len(batch.token_ids) - end_tokens
        text = ""
        for index, token_id in enumerate(batch.token_ids[:text_tokens]):
            self.completion_tokens += 1
            text += self._match(self._detokenizer.push(token_id))
            if self._matcher.matched:
                return _cut(batch, index + 1, text)
        self.completion_tokens += end_tokens
        if batch.finish_reason == UNFINISHED:
            return Piece(text, batch.token_ids, batch.logprobs, UNFINISHED)
        text += self._match(self._detokenizer.flush())
        if self._matcher.matched:
            return _cut(batch, len(batch.token_ids), text)
        text += self._matcher.flush()
        return Piece(text, batch.token_ids, batch.logprobs, batch.finish_reason)

    def _match(self, text: str) -> str:
        if self.completion_tokens <= self._min_tokens:
            return text
        return self._matcher.push(text) if text else ""


def _cut(batch: TokenBatch, tokens: int, text: str) -> Piece:
    return Piece(text, batch.token_ids[:tokens], batch.logprobs[:tokens], STOP)
