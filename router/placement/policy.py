"""Which workers serve a request. Pure: ``ledger`` is the live shell.

Least loaded wins; equal loads take turns, so that in time each pair of workers serves. A worker's
load is what this router has on it, which is exact, and what the worker reported beyond that: other
routers' requests.

A new request waits (at the router, where deadlines decide) until two workers have room: a decode
worker for all the KV that the request will likely have in the end, before its prefill begins; and a
prefill worker whose backlog is short. One that runs already takes the least loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from core.types import Pool, WorkerKey, WorkerRecord, WorkerState

LocalPrefill = Literal["never", "fallback", "always"]

KV_SCARCE_FRACTION = 0.05  # with fewer free blocks, a decode worker is soon preempting
BUSY_REQUESTS = 2  # on a prefill worker: one computes, the next one is there when it has done
KV_STEPS = 10  # KV use is compared in tenths, so that small differences don't end turns
# A worker that starts now is ready after its model has loaded; a lease that was lost to a
# pause is back after one renewal. Trying again after a second serves the second case.
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class PlacementLimits:
    """From the configuration (``prefill.max_concurrent`` and so on)."""

    max_requests: Mapping[Pool, int]  # on one worker
    prefill_backlog_s: float


@dataclass(frozen=True, slots=True)
class OwnLoad:
    """What this router has on one worker now, and had at most when its report was made."""

    requests: int = 0
    tokens: int = 0  # to prefill; on decode workers, with KV in the end
    peak_requests: int = 0
    peak_tokens: int = 0
    tokens_per_s: float = 0.0  # that it prefills; 0: not known yet

    def requests_of_all(self, reported: int) -> int:
        """With other routers' requests: those of the report that can't be ours."""
        return self.requests + max(reported - self.peak_requests, 0)

    def tokens_of_all(self, reported: int) -> int:
        """Likewise."""
        return self.tokens + max(reported - self.peak_tokens, 0)


@dataclass(frozen=True, slots=True)
class PlacementState:
    own: Mapping[WorkerKey, OwnLoad] = field(default_factory=dict)
    suspects: Mapping[WorkerKey, float] = field(default_factory=dict)  # until then, by now_s
    turn: int = 0  # decisions so far


@dataclass(frozen=True, slots=True)
class PlacementFacts:
    """What placement must know of a request.

    ``local_prefill``: whether a decode worker may prefill: never, if no prefill worker is
    left, or always. ``excluded`` workers failed this request before.
    """

    model: str
    prompt_tokens: int  # with the tokens so far
    max_tokens: int
    growth_tokens: int  # of max_tokens, those that will likely come
    local_prefill: LocalPrefill
    may_wait: bool = False  # until there is room
    excluded: frozenset[WorkerKey] = frozenset()
    preferred_decode: WorkerKey | None = None  # it has the prompt's KV already


@dataclass(frozen=True, slots=True)
class Placement:
    """``decode`` is None when the first token is all; ``prefill`` is None for local prefill."""

    decode: WorkerRecord | None
    prefill: WorkerRecord | None
    reason: str
    state: PlacementState  # carries the turns on


@dataclass(frozen=True, slots=True)
class NoWorker:
    """A pool that the request needs has no usable worker."""

    pool: Pool
    known: int  # workers of that pool, usable or not


def decide_placement(
    snapshot: tuple[WorkerRecord, ...],
    facts: PlacementFacts,
    state: PlacementState,
    limits: PlacementLimits,
    now_s: float,
) -> Placement | NoWorker | None:
    """Choose the workers for one attempt; None if no worker has room and the request may wait."""
    prefills = _usable(Pool.PREFILL, snapshot, facts, state, now_s)
    decodes = _usable(Pool.DECODE, snapshot, facts, state, now_s)
    if facts.local_prefill == "always":
        prefills = []
    elif not prefills and facts.local_prefill == "never":
        return _no_worker(Pool.PREFILL, snapshot)
    first_is_all = bool(prefills) and facts.max_tokens == 1
    if not decodes and not first_is_all:
        return _no_worker(Pool.DECODE, snapshot)
    prefill = _choose(Pool.PREFILL, prefills, snapshot, facts, state, limits)
    decode = None
    if not first_is_all:
        decode = _choose(Pool.DECODE, decodes, snapshot, facts, state, limits)
    if (prefills and prefill is None) or (not first_is_all and decode is None):
        return None
    after = replace(state, turn=state.turn + 1)
    if first_is_all:
        return Placement(None, prefill, "the first token is all", after)
    reason = "least loaded" if prefill is not None else "local prefill"
    return Placement(decode, prefill, reason, after)


def tokens_on(record: WorkerRecord, facts: PlacementFacts) -> int:
    """What the request adds to ``OwnLoad.tokens`` of a worker."""
    if record.pool is Pool.PREFILL:
        return facts.prompt_tokens
    block_tokens = max(record.load.kv_block_tokens, 1)
    return -(-(facts.prompt_tokens + facts.growth_tokens) // block_tokens) * block_tokens


def _usable(
    pool: Pool,
    snapshot: tuple[WorkerRecord, ...],
    facts: PlacementFacts,
    state: PlacementState,
    now_s: float,
) -> list[WorkerRecord]:
    usable = [
        record
        for record in snapshot
        if record.pool is pool
        and record.state is WorkerState.READY
        and record.model == facts.model
        and record.key not in facts.excluded
    ]
    # A suspect failed another request just now. It is the last resort, not excluded: the
    # failure may have been one connection's.
    trusted = [record for record in usable if state.suspects.get(record.key, 0.0) <= now_s]
    return trusted or usable


def _choose(
    pool: Pool,
    usable: list[WorkerRecord],
    snapshot: tuple[WorkerRecord, ...],
    facts: PlacementFacts,
    state: PlacementState,
    limits: PlacementLimits,
) -> WorkerRecord | None:
    if pool is Pool.DECODE and facts.preferred_decode is not None:
        for record in usable:
            if record.key == facts.preferred_decode:
                return record

    def own(record: WorkerRecord) -> OwnLoad:
        return state.own.get(record.key, OwnLoad())

    roomy = [record for record in usable if _has_room(record, own(record), facts, limits)]
    candidates = roomy if roomy or facts.may_wait else usable
    score = _prefill_score if pool is Pool.PREFILL else _decode_score
    order = sorted(record.id for record in usable)
    first = _turn(pool, snapshot, state.turn)
    return min(
        candidates,
        key=lambda record: (
            score(record, own(record)),
            (order.index(record.id) - first) % len(order),
        ),
        default=None,
    )


def _turn(pool: Pool, snapshot: tuple[WorkerRecord, ...], turn: int) -> int:
    """Whose turn it is among equals.

    Both pools move on with each decision. Where their sizes have a common divisor they would
    meet in the same pairs for ever, so the decode pool moves one further after each round.
    """
    if pool is Pool.PREFILL:
        return turn
    sizes = [max(1, sum(record.pool is each for record in snapshot)) for each in Pool]
    return turn + turn // math.lcm(*sizes)


def _has_room(
    record: WorkerRecord, own: OwnLoad, facts: PlacementFacts, limits: PlacementLimits
) -> bool:
    load = record.load
    if own.requests >= limits.max_requests[record.pool]:
        return False
    if record.pool is Pool.PREFILL:
        if own.requests < BUSY_REQUESTS:
            return True
        tokens = own.tokens_of_all(load.queued_tokens)
        bound = limits.prefill_backlog_s * own.tokens_per_s
    else:
        used_blocks = load.kv_blocks_total - load.kv_blocks_free
        tokens = own.tokens_of_all(used_blocks * load.kv_block_tokens)
        if tokens == 0:
            return True  # any request fits on a worker that has nothing
        bound = load.kv_blocks_total * load.kv_block_tokens
    return tokens + tokens_on(record, facts) <= bound


def _prefill_score(record: WorkerRecord, own: OwnLoad) -> tuple[float, ...]:
    """Tokens to be computed, for they take the time; then requests."""
    load = record.load
    requests = own.requests_of_all(load.queue_depth + load.running)
    return own.tokens_of_all(load.queued_tokens), requests


def _decode_score(record: WorkerRecord, own: OwnLoad) -> tuple[float, ...]:
    """Streams, for they share each step; KV room where it is scarce, or as the tie-break."""
    load = record.load
    streams = own.requests_of_all(load.running + load.queue_depth)
    free_fraction = load.kv_blocks_free / max(load.kv_blocks_total, 1)
    used_steps = int((1 - free_fraction) * KV_STEPS)
    return free_fraction < KV_SCARCE_FRACTION, streams, used_steps


def _no_worker(pool: Pool, snapshot: tuple[WorkerRecord, ...]) -> NoWorker:
    return NoWorker(pool, known=sum(record.pool is pool for record in snapshot))
