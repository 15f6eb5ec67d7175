"""Whether a request runs, waits or is refused. Pure: ``router.gate`` is its live shell."""

from __future__ import annotations

import enum
from dataclasses import dataclass

MIN_RETRY_AFTER_S = 0.1


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """From the configuration (``router.max_concurrent`` and so on)."""

    max_concurrent: int
    max_queue: int
    queue_timeout_s: float


@dataclass(frozen=True, slots=True)
class AdmissionState:
    running: int  # requests that hold a slot
    waiting: int
    mean_hold_s: float  # how long requests held their slot lately; 0: not known


class Verdict(enum.StrEnum):
    ADMITTED = "admitted"
    QUEUED = "queued"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Admittance:
    verdict: Verdict
    reason: str
    wait_until_s: float | None = None  # queued: the wait ends then, by the same clock as now_s
    retry_after_s: float | None = None  # rejected


def decide(
    limits: AdmissionLimits, state: AdmissionState, deadline_s: float, now_s: float
) -> Admittance:
    """What happens to a request that must be done by ``deadline_s`` (same clock as ``now_s``).

    Those who wait get slots in the order of their deadlines; a newcomer never passes them
    while any waits.
    """
    if state.running < limits.max_concurrent and state.waiting == 0:
        return Admittance(Verdict.ADMITTED, "a slot is free")
    if state.waiting < limits.max_queue:
        wait_until_s = min(deadline_s, now_s + limits.queue_timeout_s)
        return Admittance(Verdict.QUEUED, "all slots are taken", wait_until_s=wait_until_s)
    return Admittance(
        Verdict.REJECTED,
        f"{state.running} requests run and {state.waiting} wait, which is the limit",
        retry_after_s=retry_after_s(limits, state),
    )


def retry_after_s(limits: AdmissionLimits, state: AdmissionState) -> float:
    """When the queue will likely have moved by one: its length over the rate of departures."""
    moved_s = (state.waiting + 1) * state.mean_hold_s / limits.max_concurrent
    return min(max(moved_s, MIN_RETRY_AFTER_S), limits.queue_timeout_s)
