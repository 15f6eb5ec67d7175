"""Policies on a cluster with real engines: pools grow, shrink, exchange a worker, and are empty.

Streams whose tokens are known run through every change. None may lose a token or a request.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from core.types import Pool, WorkerState
from tests.support import live_cluster
from tests.support.live_cluster import LiveCluster
from tests.support.live_policies import apply, check_changes, small_policy, wait_until_calm
from tests.support.prompts import random_prompt
from tests.support.stream_load import Load, PlannedRequest, check_ended_well, check_tokens

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# dtype: in bfloat16, batching alone changes the last bits and sometimes a token.
# enable_prefix_caching: off, so that a repeated prompt is work. Workers change their role, so both
# pools have the same engine.
CONFIG = """\
model: {dtype: float32, max_model_len: 2048}
router: {port: 0, classes: {interactive: {queue_timeout_s: 300}}}
prefill:
  cpu_binding: ["0"]
  engine: {max_num_batched_tokens: 256, enable_prefix_caching: false}
decode:
  cpu_binding: ["1"]
  engine: {max_num_batched_tokens: 256, enable_prefix_caching: false}
"""
SIZES = {Pool.PREFILL: 1, Pool.DECODE: 1}
CHANGED_S = 240.0  # an engine starts on cores that others use

SIGNALS = {
    "prefill": {"type": "QueueTokens", "target": 2000},
    "decode": {"type": "QueueRequests", "target": 8},
}
STREAMS = [PlannedRequest(tuple(random_prompt(40 + 30 * n, 600 + n)), 40) for n in range(3)]
LONG_PROMPT = PlannedRequest(tuple(random_prompt(1200, 700)), 1)
LONG_ANSWER = PlannedRequest(tuple(random_prompt(20, 800)), 200)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    folder = tmp_path_factory.mktemp("scaled")
    settings = ", role_change: true"
    cluster = live_cluster.start(folder, "scaled", CONFIG, SIZES, settings=settings)
    try:
        yield cluster
    finally:
        live_cluster.stop(cluster)


@pytest.fixture(scope="module")
def answers(cluster: LiveCluster) -> Mapping[PlannedRequest, Sequence[int]]:
    """The tokens of each request in the undisturbed cluster."""
    requests = [*STREAMS, LONG_PROMPT, LONG_ANSWER]
    with Load(cluster.state.address, [requests]) as load:
        pass
    for outcome in load.outcomes:
        check_ended_well(outcome)
    return {outcome.request: outcome.token_ids for outcome in load.outcomes}


def policy(least: int = 1, window_s: int = 8, **spec: Any) -> dict[str, Any]:
    """Return a policy with ``least`` to two workers in each pool."""
    behavior = {"scaleDown": {"stabilizationWindowSeconds": window_s}}
    return small_policy("test", SIGNALS, behavior, least=least, **spec)


def wait_for_sizes(cluster: LiveCluster, prefill: int, decode: int) -> None:
    def sizes() -> tuple[int, ...]:
        workers = cluster.workers()
        assert cluster.launcher.poll() is None, cluster.recent_log()
        if any(each.state is not WorkerState.READY for each in workers):
            return ()
        return tuple(sum(each.pool is pool for each in workers) for pool in Pool)

    what = f"{prefill} prefill and {decode} decode workers"
    cluster.wait(lambda: sizes() == (prefill, decode), what, CHANGED_S)


def check(load: Load, answers: Mapping[PlannedRequest, Sequence[int]]) -> None:
    assert load.outcomes
    for outcome in load.outcomes:
        check_ended_well(outcome)
        assert not outcome.refusals
        check_tokens(outcome, answers[outcome.request])


def streams() -> list[Iterator[PlannedRequest]]:
    """Plans of clients that repeat their requests for as long as they are asked."""
    return [itertools.repeat(request) for request in STREAMS]


def many(request: PlannedRequest, clients: int) -> list[Iterator[PlannedRequest]]:
    return [itertools.repeat(request) for _ in range(clients)]


def test_each_pool_grows_alone_and_a_worker_changes_its_role(
    cluster: LiveCluster, answers: Mapping[PlannedRequest, Sequence[int]], tmp_path: Path
) -> None:
    apply(cluster, tmp_path, policy())
    address = cluster.state.address
    with Load(address, streams()) as running:
        last = wait_until_calm(cluster)
        with Load(address, many(LONG_ANSWER, 10)) as load:
            wait_for_sizes(cluster, 1, 2)
            load.finish()
        check(load, answers)
        wait_for_sizes(cluster, 1, 1)
        wait_until_calm(cluster)
        check_changes(cluster, last, "decode")

        budget = {"gpus": 3, "priority": "Neither"}
        # The window is longer than the time between the last prompt and the first long answer.
        spent = "WhenBudgetIsSpent"
        apply(cluster, tmp_path, policy(window_s=30, budget=budget, roleChange=spent))
        last = wait_until_calm(cluster)
        with Load(address, many(LONG_PROMPT, 5)) as load:
            wait_for_sizes(cluster, 2, 1)
            load.finish()
        check(load, answers)
        check_changes(cluster, last, "prefill")
        last = wait_until_calm(cluster)
        before = {worker.id for worker in cluster.workers()}
        with Load(address, many(LONG_ANSWER, 10)) as load:
            wait_for_sizes(cluster, 1, 2)
            load.finish()
        check(load, answers)
        check_changes(cluster, last, "decode")
        assert {worker.id for worker in cluster.workers()} == before, "no engine was loaded"
        wait_for_sizes(cluster, 1, 1)
        running.finish()
    check(running, answers)


def test_to_zero_and_back(
    cluster: LiveCluster, answers: Mapping[PlannedRequest, Sequence[int]], tmp_path: Path
) -> None:
    apply(cluster, tmp_path, policy(least=0))
    wait_for_sizes(cluster, 0, 0)
    with Load(cluster.state.address, [STREAMS[:1]]) as load:
        pass
    check(load, answers)
