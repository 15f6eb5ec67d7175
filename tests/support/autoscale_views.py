"""Short ways to write policies and snapshots for the tests of ``autoscale``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from autoscale.load import parse_policy
from autoscale.policy import Policy
from autoscale.snapshot import Phase, PoolDemand, Snapshot, WorkerView
from autoscale.state import State
from core.types import Pool

NOW_S = 1_800_000_000.0
AT_ONCE = {
    "scaleUp": {
        "tolerance": 0,
        "policies": [{"type": "Pods", "value": 1000, "periodSeconds": 1}],
    },
    "scaleDown": {
        "stabilizationWindowSeconds": 0,
        "tolerance": 0,
        "policies": [{"type": "Percent", "value": 100, "periodSeconds": 1}],
    },
}


def policy(
    prefill: Mapping[str, Any] | None = None, decode: Mapping[str, Any] | None = None, **spec: Any
) -> Policy:
    """A policy with one request per worker as target, and no bounds on the speed of changes."""
    pool = {
        "minReplicas": 1,
        "maxReplicas": 10,
        "signals": [{"type": "QueueRequests", "target": 1}],
        "behavior": AT_ONCE,
    }
    document = {
        "apiVersion": "baton/v1",
        "kind": "AutoscalingPolicy",
        "metadata": {"name": "test"},
        "spec": {
            "warmupSeconds": 0,
            **spec,
            "prefill": {**pool, **(prefill or {})},
            "decode": {**pool, **(decode or {})},
        },
    }
    return parse_policy(yaml.safe_dump(document, sort_keys=False), "test.yaml")


def stored(state: State) -> State:
    """Return the state as a restart finds it in the store."""
    return msgspec.json.decode(msgspec.json.encode(state), type=State)


def worker(name: str, phase: Phase = Phase.READY, **changes: Any) -> WorkerView:
    """A worker whose name starts with p or d, for its pool."""
    pool = Pool.PREFILL if name.startswith("p") else Pool.DECODE
    values: dict[str, Any] = {
        "phase_since_s": NOW_S - 1000,
        "gpus": 1.0,
        "kv_tokens_total": 1000,
        "tokens_per_s": 100.0,
    }
    return WorkerView(name, pool, phase, **{**values, **changes})


def workers(prefill: int, decode: int, **changes: Any) -> tuple[WorkerView, ...]:
    names = [*(f"p{i}" for i in range(prefill)), *(f"d{i}" for i in range(decode))]
    return tuple(worker(name, **changes) for name in names)


def demand(requests: int, **changes: Any) -> PoolDemand:
    """A pool's demand. ``requests`` of them wait."""
    values: dict[str, Any] = {
        "waiting_requests": requests,
        "waiting_tokens": 100 * requests,
        "latency_window_s": 0.0,
    }
    return PoolDemand(**{**values, **changes})


def snapshot(
    views: tuple[WorkerView, ...],
    prefill: PoolDemand | int,
    decode: PoolDemand | int,
    measured_s: float = NOW_S,
) -> Snapshot:
    pools = {
        pool: demand(each) if isinstance(each, int) else each
        for pool, each in ((Pool.PREFILL, prefill), (Pool.DECODE, decode))
    }
    return Snapshot(views, pools, measured_s, dict.fromkeys(Pool, 1.0))
