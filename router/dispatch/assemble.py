"""One attempt's output, put together from the prefill worker's token and the decode stream.

Positions decide, never arrival order::

    position        0           1   2   3 ...
    prefill worker  first token
    decode worker   (again, if  t1  t2  t3 ...     first_index of its first response:
                    recomputed)                    1 when token 0 came with the KV, else 0

Pure: no token is lost, repeated or invented whichever side answers first.
"""

from __future__ import annotations

from dataclasses import replace

from router.request import UNFINISHED, TokenBatch


class ProtocolViolationError(Exception):
    """A worker's output cannot be placed; the message says why."""


class FirstTokenDiffersError(Exception):
    """The decode worker recomputed another first token than the application has."""


class Assembler:
    """Merges both workers' tokens of one attempt, in the order of their positions.

    Args:
        forwards: the prefill worker's token is position 0.
        limit_tokens: tokens that this attempt may produce.
    """

    def __init__(self, *, forwards: bool, limit_tokens: int) -> None:
        self._forwards = forwards
        self._limit_tokens = limit_tokens
        self._first: int | None = None  # token 0, once it was given out
        self._decode_next: int | None = None  # position the decode stream must continue at
        self._held: list[TokenBatch] = []  # from position 1 on, while token 0 is missing
        self._finished = False

    @property
    def started(self) -> bool:
        """Token 0 was given out, or the decode worker ended without one."""
        return self._first is not None or self._finished

    def prefill(self, batch: TokenBatch) -> tuple[TokenBatch, ...]:
        """The prefill worker's token; returns the batches that may go out now.

        If the decode worker recomputed and was faster, its token stands and this one is
        dropped.
        """
        if not self._forwards or len(batch.token_ids) != 1:
            raise ProtocolViolationError("no first token was asked of the prefill worker")
        if self._first is not None:
            return ()
        self._first = batch.token_ids[0]
        if batch.finish_reason != UNFINISHED:
            self._finished = True
            return (batch,)
        out = (batch, *self._held)
        self._held.clear()
        self._finished = out[-1].finish_reason != UNFINISHED
        return out

    def decode(self, first_index: int, batch: TokenBatch) -> tuple[TokenBatch, ...]:
        """Tokens of the decode stream; returns the batches that may go out now.

        Raises:
            ProtocolViolationError: a gap, a repetition or too many tokens.
            FirstTokenDiffersError: token 0 came again and is another one.
        """
        self._check(first_index, batch)
        if batch.token_ids:
            self._decode_next = first_index + len(batch.token_ids)
            if first_index == 0:
                if self._first is None:
                    self._first = batch.token_ids[0]
                else:
                    batch = self._without_copy(batch)
        if not batch.token_ids and batch.finish_reason == UNFINISHED:
            return ()
        if self._first is None and self._forwards:
            self._held.append(batch)
            return ()
        self._finished = batch.finish_reason != UNFINISHED
        return (batch,)

    def _without_copy(self, batch: TokenBatch) -> TokenBatch:
        if batch.token_ids[0] != self._first:
            raise FirstTokenDiffersError(
                f"token {batch.token_ids[0]} was recomputed, {self._first} was forwarded"
            )
        return replace(batch, token_ids=batch.token_ids[1:], logprobs=batch.logprobs[1:])

    def _check(self, first_index: int, batch: TokenBatch) -> None:
        if self._finished or (self._held and self._held[-1].finish_reason != UNFINISHED):
            raise ProtocolViolationError("tokens after the finish reason")
        if batch.logprobs and len(batch.logprobs) != len(batch.token_ids):
            raise ProtocolViolationError(
                f"{len(batch.logprobs)} logprobs for {len(batch.token_ids)} tokens"
            )
        if not batch.token_ids:
            return
        if self._decode_next is None:
            allowed = (0, 1) if self._forwards else (0,)
        else:
            allowed = (self._decode_next,)
        if first_index not in allowed:
            raise ProtocolViolationError(f"position {first_index}, expected one of {allowed}")
        if first_index + len(batch.token_ids) > self._limit_tokens:
            raise ProtocolViolationError(f"more than {self._limit_tokens} tokens")
