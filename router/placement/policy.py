"""Decides which workers serve a request. Pure; ``ledger`` applies the decisions.

The least loaded worker of each pool wins. Equally loaded workers take turns, so that over time
every prefill worker is paired with every decode worker. A worker's load has two parts. The first
part is what this router has put on the worker. This part is exact. The second part is the load from
other routers: what the worker reports beyond the first part.

A new request waits at the router until both pools have room. A decode worker has room if all the KV
that the request will likely need fits. A prefill worker has room if its backlog is short. A worker
that runs ``max_concurrent`` requests of this router has no room. A request that already runs does
not wait: if no worker has room, the least loaded workers serve it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from core.types import Pool, WorkerKey, WorkerRecord, WorkerState
from router.room import NoRoom

LocalPrefill = Literal["never", "fallback", "always"]

KV_SCARCE_FRACTION = 0.05  # a decode worker with fewer free blocks will soon preempt
BUSY_REQUESTS = 2  # keep a prefill worker busy: one prompt is computed, the next is already there
KV_STEPS = 10  # KV use is compared in tenths, so that workers take turns despite small differences

# Reasons of placements; the router counts and logs them.
LEAST_LOADED = "least_loaded"
LOCAL_PREFILL = "local_prefill"
ONE_TOKEN = "one_token"


@dataclass(frozen=True, slots=True)
class PlacementLimits:
    """From the configuration (``prefill.max_concurrent`` and so on)."""

    max_requests: Mapping[Pool, int]  # on one worker
    prefill_backlog_s: float


@dataclass(frozen=True, slots=True)
class OwnLoad:
    """This router's load on one worker: now, and the peak that the latest report can include."""

    requests: int = 0
    tokens: int = 0  # prefill: prompt tokens to compute; decode: tokens that need KV in the end
    peak_requests: int = 0
    peak_tokens: int = 0
    tokens_per_s: float = 0.0  # prefill rate; 0 if unknown

    def requests_of_all(self, reported: int) -> int:
        """Requests of all routers: ours, and the reported ones that cannot be ours."""
        return self.requests + max(reported - self.peak_requests, 0)

    def tokens_of_all(self, reported: int) -> int:
        """Tokens of all routers, counted the same way."""
        return self.tokens + max(reported - self.peak_tokens, 0)


@dataclass(frozen=True, slots=True)
class PlacementState:
    own: Mapping[WorkerKey, OwnLoad] = field(default_factory=dict)
    suspects: Mapping[WorkerKey, float] = field(default_factory=dict)  # avoid until this time
    turn: int = 0  # placements so far


@dataclass(frozen=True, slots=True)
class PlacementFacts:
    """What placement must know about a request.

    Args:
        prompt_tokens: including the output tokens of earlier attempts.
        growth_tokens: how many of ``max_tokens`` will likely be produced.
        local_prefill: whether the decode worker prefills: never, as a fallback when no prefill
            worker is usable, or always.
        may_wait: the request can wait until there is room.
        coming: pools that may get workers soon. A request that may wait waits for the first one.
        excluded: workers that failed this request before.
        preferred_decode: the decode worker that already holds the prompt's KV.
    """

    model: str
    prompt_tokens: int
    max_tokens: int
    growth_tokens: int
    local_prefill: LocalPrefill
    may_wait: bool = False
    coming: frozenset[Pool] = frozenset()
    excluded: frozenset[WorkerKey] = frozenset()
    preferred_decode: WorkerKey | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers of one attempt.

    ``decode`` is None if a prefill worker produces the request's only token. ``prefill`` is None if
    the decode worker prefills. ``reason`` is one of the constants above.
    """

    decode: WorkerRecord | None
    prefill: WorkerRecord | None
    reason: str
    state: PlacementState  # for the next decision


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
) -> Placement | NoRoom | NoWorker:
    """Choose the workers for one attempt.

    Returns NoRoom if a needed pool has no worker with room and the request may wait.
    """
    usable = {pool: _usable(pool, snapshot, facts, state, now_s) for pool in Pool}
    needed = _needed(facts, has_prefill=bool(usable[Pool.PREFILL]))
    empty = frozenset(pool for pool in needed if not usable[pool])
    for pool in needed:
        if pool in empty and not (facts.may_wait and pool in facts.coming):
            return NoWorker(pool, known=sum(record.pool is pool for record in snapshot))
    chosen = {pool: _choose(pool, usable[pool], snapshot, facts, state, limits) for pool in needed}
    full = frozenset(pool for pool, record in chosen.items() if record is None)
    if full:
        return NoRoom(full, empty)
    prefill, decode = chosen.get(Pool.PREFILL), chosen.get(Pool.DECODE)
    after = replace(state, turn=state.turn + 1)
    if decode is None:
        return Placement(None, prefill, ONE_TOKEN, after)
    reason = LEAST_LOADED if prefill is not None else LOCAL_PREFILL
    return Placement(decode, prefill, reason, after)


def _needed(facts: PlacementFacts, *, has_prefill: bool) -> tuple[Pool, ...]:
    """The pools that an attempt uses."""
    if facts.local_prefill == "always" or (facts.local_prefill == "fallback" and not has_prefill):
        return (Pool.DECODE,)
    if facts.max_tokens == 1:
        return (Pool.PREFILL,)
    return (Pool.PREFILL, Pool.DECODE)


def tokens_on(record: WorkerRecord, facts: PlacementFacts) -> int:
    """The tokens that the request adds to ``OwnLoad.tokens`` of a worker."""
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
    # A suspect recently failed some request. Suspects are used only if no other worker is usable.
    # They are not excluded, because perhaps only one connection failed.
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
    """The index of the worker that wins among equals.

    Each placement advances the index of both pools by one. If the pool sizes have a common divisor,
    this rule alone would always pair the same workers. So after each round of ``lcm(*sizes)``
    placements, the decode index advances by one more.
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
            return True  # an empty worker takes any request
        bound = load.kv_blocks_total * load.kv_block_tokens
    return tokens + tokens_on(record, facts) <= bound


def _prefill_score(record: WorkerRecord, own: OwnLoad) -> tuple[float, ...]:
    """First the tokens to compute, because they determine the waiting time; then requests."""
    load = record.load
    requests = own.requests_of_all(load.queue_depth + load.running)
    return own.tokens_of_all(load.queued_tokens), requests


def _decode_score(record: WorkerRecord, own: OwnLoad) -> tuple[float, ...]:
    """First whether KV room is scarce; then streams, because they share each step; then KV use."""
    load = record.load
    streams = own.requests_of_all(load.running + load.queue_depth)
    free_fraction = load.kv_blocks_free / max(load.kv_blocks_total, 1)
    used_steps = int((1 - free_fraction) * KV_STEPS)
    return free_fraction < KV_SCARCE_FRACTION, streams, used_steps
