"""Which workers serve a request. Pure: ``router.book`` is the live shell.

Least loaded wins; equal loads take turns, so that in time each pair of workers serves. A worker's
load is what it reported with its lease plus what this router sent it since; but at least what this
router knows to be there, for a report may be older than the requests it misses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.errors import UnavailableError
from cluster.types import Pool, WorkerRecord, WorkerState

WorkerKey = tuple[str, str]  # id, incarnation: a restarted worker is another one
LocalPrefill = Literal["never", "fallback", "always"]

KV_SCARCE_FRACTION = 0.05  # with fewer free blocks, a decode worker is soon preempting
KV_STEPS = 10  # KV use is compared in tenths, so that small differences don't end turns
# A worker that starts now is ready after its model has loaded; a lease that was lost to a
# pause is back after one renewal. Trying again after a second serves the second case.
RETRY_AFTER_S = 1.0


def worker_key(record: WorkerRecord) -> WorkerKey:
    return record.id, record.incarnation


@dataclass(frozen=True, slots=True)
class OwnLoad:
    """What this router has on one worker: in all, and sent since the snapshot."""

    requests: int = 0
    tokens: int = 0  # prompt tokens
    recent_requests: int = 0
    recent_tokens: int = 0


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
    max_tokens: int
    local_prefill: LocalPrefill
    excluded: frozenset[WorkerKey] = frozenset()
    preferred_decode: WorkerKey | None = None  # it has the prompt's KV already


@dataclass(frozen=True, slots=True)
class Placement:
    """``decode`` is None when the first token is all; ``prefill`` is None for local prefill."""

    decode: WorkerRecord | None
    prefill: WorkerRecord | None
    reason: str
    state: PlacementState  # carries the turns on


def decide(
    snapshot: tuple[WorkerRecord, ...],
    facts: PlacementFacts,
    state: PlacementState,
    now_s: float,
) -> Placement:
    """Choose the workers for one attempt.

    Raises:
        UnavailableError: a pool that is needed has no worker (with a retry hint).
    """
    prefill = _choose(Pool.PREFILL, snapshot, facts, state, now_s)
    if facts.local_prefill == "always":
        prefill = None
    elif prefill is None and facts.local_prefill == "never":
        raise _unavailable(Pool.PREFILL, snapshot)
    after = replace(state, turn=state.turn + 1)
    if prefill is not None and facts.max_tokens == 1:
        return Placement(None, prefill, "the first token is all", after)
    decode = _choose(Pool.DECODE, snapshot, facts, state, now_s)
    if decode is None:
        raise _unavailable(Pool.DECODE, snapshot)
    reason = "least loaded" if prefill is not None else "local prefill"
    return Placement(decode, prefill, reason, after)


def _choose(
    pool: Pool,
    snapshot: tuple[WorkerRecord, ...],
    facts: PlacementFacts,
    state: PlacementState,
    now_s: float,
) -> WorkerRecord | None:
    usable = [
        record
        for record in snapshot
        if record.pool is pool
        and record.state is WorkerState.READY
        and record.model == facts.model
        and worker_key(record) not in facts.excluded
    ]
    # A suspect failed another request just now. It is the last resort, not excluded: the
    # failure may have been one connection's.
    trusted = [record for record in usable if state.suspects.get(worker_key(record), 0.0) <= now_s]
    candidates = trusted or usable
    if pool is Pool.DECODE and facts.preferred_decode is not None:
        for record in candidates:
            if worker_key(record) == facts.preferred_decode:
                return record
    if not candidates:
        return None
    score = _prefill_score if pool is Pool.PREFILL else _decode_score
    order = sorted(record.id for record in candidates)
    first = _turn(pool, snapshot, state.turn)
    return min(
        candidates,
        key=lambda record: (
            score(record, state.own.get(worker_key(record), OwnLoad())),
            (order.index(record.id) - first) % len(order),
        ),
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


def _prefill_score(record: WorkerRecord, own: OwnLoad) -> tuple[float, ...]:
    """Tokens to be computed, for they take the time; then requests."""
    load = record.load
    tokens = max(load.queued_tokens + own.recent_tokens, own.tokens)
    return tokens, max(load.queue_depth + load.running + own.recent_requests, own.requests)


def _decode_score(record: WorkerRecord, own: OwnLoad) -> tuple[float, ...]:
    """Streams, for they share each step; KV room where it is scarce, or as the tie-break."""
    load = record.load
    streams = max(load.running + load.queue_depth + own.recent_requests, own.requests)
    free_fraction = load.kv_blocks_free / max(load.kv_blocks_total, 1)
    used_steps = int((1 - free_fraction) * KV_STEPS)
    return free_fraction < KV_SCARCE_FRACTION, streams, used_steps


def _unavailable(pool: Pool, snapshot: tuple[WorkerRecord, ...]) -> UnavailableError:
    known = sum(record.pool is pool for record in snapshot)
    detail = f"{known} known, none usable" if known else "none is known"
    return UnavailableError(
        f"no {pool} worker can take the request ({detail})",
        reason=f"NO_{pool.upper()}_WORKER",
        retry_after_s=RETRY_AFTER_S,
    )
