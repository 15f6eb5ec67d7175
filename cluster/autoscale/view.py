"""What the autoscaler shows of itself: its latest decision, the workers, and its last changes."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from autoscale.snapshot import PoolDecision, WorkerView
from core.types import Pool

KEPT_CHANGES = 50


@dataclass(frozen=True, slots=True)
class Change:
    """Something that the autoscaler did, or could not do."""

    number: int  # counts all changes of the cluster
    at_s: float  # since the epoch
    pool: Pool | None  # None: it concerns the whole cluster
    text: str  # a sentence with the reason

    @property
    def line(self) -> str:
        """The change as one line for the user."""
        return f"{self.pool}: {self.text}" if self.pool is not None else self.text


@dataclass(frozen=True, slots=True)
class AutoscaleView:
    """The autoscaler's state for ``status``, ``scale`` and ``policy explain``."""

    policy: str  # name of the policy; empty: the numbers of workers are fixed
    policy_digest: str  # of the policy's text; empty without a policy
    refused_digest: str  # of a policy that was not taken; empty if there is none
    refused_why: str
    advisory: bool  # the policy decides, but its decisions are not carried out
    demand_age_s: float | None  # since the newest measurement; None while there is none
    pools: tuple[PoolDecision, ...]  # by the numbers or the policy that is carried out
    advice: tuple[PoolDecision, ...]  # of a policy in advisory mode
    workers: tuple[WorkerView, ...]
    changes: tuple[Change, ...]  # the latest last
    # How long the latest worker took from its order until it was ready.
    start_s: float | None = None


def encode_view(view: AutoscaleView) -> bytes:
    """Return the view as JSON."""
    return msgspec.json.encode(view)


def decode_view(data: bytes | None) -> AutoscaleView | None:
    """Return the view, or None if there is none that this version can read."""
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=AutoscaleView)
    except msgspec.MsgspecError:
        return None
