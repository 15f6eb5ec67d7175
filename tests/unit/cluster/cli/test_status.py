"""``baton status`` says "ready" only if each pool has a ready worker."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest

from autoscale.snapshot import Phase, PoolDecision, WorkerView
from cluster.autoscale.view import AutoscaleView
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


def view_of(pools: Iterable[PoolDecision]) -> AutoscaleView:
    return AutoscaleView(
        policy="p",
        policy_digest="1",
        refused_digest="",
        refused_why="",
        advisory=False,
        demand_age_s=0.0,
        pools=tuple(pools),
        advice=(),
        workers=(),
        changes=(),
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
    assert as_table(STATE, workers, None).startswith(f"c: {phase}{reason}, m, gRPC at")
    assert json.loads(as_json(STATE, workers, None))["phase"] == phase


def test_a_cluster_that_starts_is_not_degraded() -> None:
    assert as_table(replace(STATE, phase="starting"), (), None).startswith(
        "c: starting, m, gRPC at"
    )


def test_a_pool_that_the_policy_has_scaled_to_zero_is_no_fault() -> None:
    targets = {Pool.PREFILL: 1, Pool.DECODE: 0}
    view = view_of(PoolDecision(pool, 0, target, ()) for pool, target in targets.items())
    assert as_table(STATE, (PREFILL,), view).startswith("c: ready (decode is scaled to zero), m")
    assert as_table(STATE, (), view).startswith("c: degraded (no ready prefill worker), m")
    assert json.loads(as_json(STATE, (PREFILL,), view))["targets"] == {"prefill": 1, "decode": 0}


def test_a_worker_without_a_place_is_named_with_rays_words() -> None:
    waiting = WorkerView("baton-decode-1-aaaaaa", Pool.DECODE, Phase.PENDING, 0.0, problem="no GPU")
    view = replace(view_of(()), workers=(waiting,))
    table = as_table(STATE, (PREFILL, DECODE), view)
    assert table.splitlines()[-1] == "baton-decode-1-aaaaaa has not started: no GPU"


def test_a_worker_that_drains_to_change_its_pool_is_not_one_that_leaves() -> None:
    changing = replace(DECODE, state=WorkerState.DRAINING, changes_to=Pool.PREFILL)
    leaving = replace(PREFILL, state=WorkerState.DRAINING)
    _, _, *rows = as_table(STATE, (changing, leaving), None).splitlines()
    assert "draining, changes to prefill  127.0.0.1:1" in rows[0]
    assert "changes to" not in rows[1]
    shown = json.loads(as_json(STATE, (changing, leaving), None))["workers"]
    assert [(each["state"], each["changes_to"]) for each in shown] == [
        ("draining", "prefill"),
        ("draining", ""),
    ]
