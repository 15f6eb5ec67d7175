"""``baton status`` says "ready" only if each pool has a ready worker."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cluster.cli.status import as_json, as_table
from cluster.local.run_dir import ClusterState
from core.types import Pool, WorkerRecord, WorkerState
from tests.support.registry_rules import DECODE, PREFILL

STATE = ClusterState(
    name="c",
    cluster_id="id",
    pid=1,
    pid_started=1,
    phase="ready",
    address="127.0.0.1:1",
    model="m",
    store=None,
    start_timeout_s=1,
    stop_grace_s=1,
    max_replicas=dict.fromkeys(Pool, 8),
    folders=(),
)


@pytest.mark.parametrize(
    ("workers", "phase", "reason"),
    [
        ((PREFILL, DECODE), "ready", ""),
        ((DECODE,), "degraded", " (no ready prefill worker)"),
        (
            (PREFILL, replace(DECODE, state=WorkerState.DRAINING)),
            "degraded",
            " (no ready decode worker)",
        ),
        ((), "degraded", " (no ready prefill worker, no ready decode worker)"),
    ],
)
def test_the_phase_follows_from_the_workers(
    workers: tuple[WorkerRecord, ...], phase: str, reason: str
) -> None:
    assert as_table(STATE, workers).startswith(f"c: {phase}{reason}, m, gRPC at")
    assert json.loads(as_json(STATE, workers))["phase"] == phase


def test_a_cluster_that_starts_is_not_degraded() -> None:
    assert as_table(replace(STATE, phase="starting"), ()).startswith("c: starting, m, gRPC at")
