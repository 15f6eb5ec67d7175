"""Merges the prefill worker's token and the decode stream into one attempt's output.

The order of the output follows from positions, never from the order of arrival::

    position        0                1   2   3 ...
    prefill worker  t0, if asked for
    decode worker   t0, if computed  t1  t2  t3 ...

If the decode worker gets token 0 with the KV, the decode stream begins at position 1. Otherwise the
decode worker computes token 0, and the decode stream begins at position 0.

Pure. No token is lost, repeated or invented, whichever worker answers first.
"""

from __future__ import annotations

from dataclasses import replace

from router.request import UNFINISHED, TokenBatch


class ProtocolViolationError(Exception):
    """A worker's output breaks the protocol; the message says how."""


class FirstTokenDiffersError(Exception):
    """The decode worker recomputed a first token that differs from the forwarded one."""


class Assembler:
    """Orders both workers' tokens of one attempt by position.

    Args:
        forwards_first_token: whether the prefill worker's token is emitted, as position 0.
        limit_tokens: the most tokens that this attempt may produce.
    """

    def __init__(self, *, forwards_first_token: bool, limit_tokens: int) -> None:
        self._forwards_first_token = forwards_first_token
        self._limit_tokens = limit_tokens
        self._first_token_id: int | None = None  # None until it is emitted
        self._decode_next: int | None = None  # next position of the decode stream
        self._held: list[TokenBatch] = []  # positions from 1 on, until token 0 comes
        self._finished = False

    @property
    def started(self) -> bool:
        """Whether token 0 was emitted, or the output has ended without a token."""
        return self._first_token_id is not None or self._finished

    def prefill(self, batch: TokenBatch) -> tuple[TokenBatch, ...]:
        """Add the prefill worker's token and return the batches to emit now.

        The token is dropped if the decode worker has computed token 0 itself and was faster.

        Raises:
            ProtocolViolationError: the prefill worker was not asked for a first token, or the batch
                does not have exactly one token.
        """
        if not self._forwards_first_token or len(batch.token_ids) != 1:
            raise ProtocolViolationError("the prefill worker was not asked for a first token")
        if self._first_token_id is not None:
            return ()
        self._first_token_id = batch.token_ids[0]
        if batch.finish_reason != UNFINISHED:
            self._finished = True
            return (batch,)
        out = (batch, *self._held)
        self._held.clear()
        self._finished = out[-1].finish_reason != UNFINISHED
        return out

    def decode(self, first_index: int, batch: TokenBatch) -> tuple[TokenBatch, ...]:
        """Add tokens of the decode stream and return the batches to emit now.

        Raises:
            ProtocolViolationError: a wrong position, too many tokens, a wrong number of logprobs,
                or tokens after the finish reason.
            FirstTokenDiffersError: token 0 was recomputed and differs from the emitted one.
        """
        self._check(first_index, batch)
        if batch.token_ids:
            self._decode_next = first_index + len(batch.token_ids)
            if first_index == 0:
                if self._first_token_id is None:
                    self._first_token_id = batch.token_ids[0]
                else:
                    batch = self._without_first_token(batch)
        if not batch.token_ids and batch.finish_reason == UNFINISHED:
            return ()
        if self._first_token_id is None and self._forwards_first_token:
            self._held.append(batch)
            return ()
        self._finished = batch.finish_reason != UNFINISHED
        return (batch,)

    def _without_first_token(self, batch: TokenBatch) -> TokenBatch:
        if batch.token_ids[0] != self._first_token_id:
            raise FirstTokenDiffersError(
                f"token {batch.token_ids[0]} was recomputed, {self._first_token_id} was forwarded"
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
            allowed = (0, 1) if self._forwards_first_token else (0,)
        else:
            allowed = (self._decode_next,)
        if first_index not in allowed:
            raise ProtocolViolationError(f"position {first_index}, expected one of {allowed}")
        if first_index + len(batch.token_ids) > self._limit_tokens:
            raise ProtocolViolationError(f"more than {self._limit_tokens} tokens")
