"""Policies on a live cluster with fake engines: pools grow, shrink and exchange workers.

Streams run through every change. Each must get exactly its tokens, and no request may be lost.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.fake import next_tokens
from simulate.latency import KvReservation, fake_engine
from simulate.latency_file import latency_model
from tests.support.fake_engine_cluster import PROMPT, START_S, FakeEngineCluster, start
from tests.support.live_policies import (
    apply,
    check_changes,
    explain,
    small_policy,
    wait_until_calm,
)
from tests.support.stream_load import Load, PlannedRequest, check_ended_well, check_tokens

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

SEED = int(os.environ.get("BATON_SCALE_SEED", "1"))

# Windows of seconds in place of minutes. The fake engine reads 5,000 prompt tokens a second, and
# writes a token of each stream every 3 ms.
FAST = {
    "scaleUp": {"policies": [{"type": "Pods", "value": 4, "periodSeconds": 1}]},
    "scaleDown": {
        "stabilizationWindowSeconds": 4,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 1}],
    },
}
SIGNALS = {
    "prefill": {"type": "QueueSeconds", "target": 1.0},
    "decode": {"type": "QueueRequests", "target": 20},
}


def policy(name: str, **spec: Any) -> dict[str, Any]:
    """Return a policy with one or two workers in each pool, in which ``spec`` replaces fields."""
    return small_policy(name, SIGNALS, FAST, **spec)


@pytest.fixture(scope="module")
def scaled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeEngineCluster]:
    """A cluster whose workers can change their roles. Each test applies a policy."""
    cluster = start(
        tmp_path_factory.mktemp("scaled"), model, "scaled", settings=", role_change: true"
    )
    try:
        cluster.wait(cluster.is_ready, START_S)
        yield cluster
    finally:
        cluster.kill()


def sizes(cluster: FakeEngineCluster) -> dict[str, int]:
    """Return the number of ready workers in each pool."""
    ready = [worker["pool"] for worker in cluster.workers() if worker["state"] == "ready"]
    return {pool: ready.count(pool) for pool in ("prefill", "decode")}


def wait_for_sizes(cluster: FakeEngineCluster, prefill: int, decode: int) -> None:
    wanted = {"prefill": prefill, "decode": decode}
    cluster.wait(lambda: sizes(cluster) == wanted, within_s=60)


def background(rng: random.Random) -> list[Iterator[PlannedRequest]]:
    """Plans of six clients that send chats of some hundred tokens for as long as they are asked."""

    def plan(seed: int) -> Iterator[PlannedRequest]:
        own = random.Random(seed)
        while True:
            prompt = tuple(own.randrange(3, 900) for _ in range(own.randrange(3, 200)))
            yield PlannedRequest(prompt, own.randrange(50, 500))

    return [plan(rng.randrange(10**9)) for _ in range(6)]


def repeated(clients: int, prompt_tokens: int, max_tokens: int) -> list[Iterator[PlannedRequest]]:
    """Plans of clients that send requests of one size."""
    return [
        (
            PlannedRequest((3 + client, 3 + number % 900) * (prompt_tokens // 2), max_tokens)
            for number in itertools.count()
        )
        for client in range(clients)
    ]


def check(load: Load) -> None:
    """Every request ended once, with exactly its tokens, and none was refused."""
    assert load.outcomes
    for outcome in load.outcomes:
        check_ended_well(outcome)
        assert not outcome.refusals
        request = outcome.request
        check_tokens(outcome, next_tokens(request.prompt, request.max_tokens))


def test_each_pool_follows_its_own_load(scaled: FakeEngineCluster, tmp_path: Path) -> None:
    apply(scaled, tmp_path, policy("split"))
    wait_for_sizes(scaled, 1, 1)
    address = scaled.state.address
    with Load(address, background(random.Random(SEED))) as chats:
        before = wait_until_calm(scaled)
        with Load(address, repeated(10, 4000, 1)) as prompts:
            wait_for_sizes(scaled, 2, 1)
            prompts.finish()
        check(prompts)
        wait_for_sizes(scaled, 1, 1)
        between = wait_until_calm(scaled)
        check_changes(scaled, before, "prefill")
        with Load(address, repeated(40, 4, 600)) as answers:
            wait_for_sizes(scaled, 1, 2)
            answers.finish()
        check(answers)
        wait_for_sizes(scaled, 1, 1)
        wait_until_calm(scaled)
        check_changes(scaled, between, "decode")
        chats.finish()
    check(chats)
    changes = [change["text"] for change in explain(scaled)["changes"]]
    assert any("QueueSeconds" in text for text in changes), changes
    assert any("QueueRequests" in text for text in changes), changes


def test_a_worker_changes_its_role_under_a_fixed_budget(
    scaled: FakeEngineCluster, tmp_path: Path
) -> None:
    budget = {"gpus": 3, "priority": "Neither"}
    apply(scaled, tmp_path, policy("flip", budget=budget, roleChange="WhenBudgetIsSpent"))
    address = scaled.state.address
    with Load(address, background(random.Random(SEED + 1))) as chats:
        with Load(address, repeated(10, 4000, 1)) as prompts:
            wait_for_sizes(scaled, 2, 1)
            prompts.finish()
        check(prompts)
        before = {worker["id"]: worker["pool"] for worker in scaled.workers()}
        with Load(address, repeated(40, 4, 600)) as answers:
            wait_for_sizes(scaled, 1, 2)
            answers.finish()
        check(answers)
        after = {worker["id"]: worker["pool"] for worker in scaled.workers()}
        assert after.keys() == before.keys(), "no worker was started or ended"
        chats.finish()
    check(chats)


def test_to_zero_and_back(scaled: FakeEngineCluster, tmp_path: Path) -> None:
    document = policy("zero")
    for pool in ("prefill", "decode"):
        document["spec"][pool]["minReplicas"] = 0
    apply(scaled, tmp_path, document)
    wait_for_sizes(scaled, 0, 0)
    status = scaled.cli("status")
    assert "ready (prefill is scaled to zero, decode is scaled to zero)" in status.stdout
    with scaled.client() as client:
        assert client.health()
        answer = client.complete(token_ids=PROMPT, max_tokens=20, temperature=0.0)
    assert answer.token_ids == next_tokens(PROMPT, 20)
    wait_for_sizes(scaled, 0, 0)


def test_a_policy_that_the_cluster_cannot_run_is_refused(
    scaled: FakeEngineCluster, tmp_path: Path
) -> None:
    apply(scaled, tmp_path, policy("good"))
    document = policy("bad")
    document["spec"]["decode"]["maxReplicas"] = 100
    file = tmp_path / "bad.yaml"
    file.write_text(json.dumps(document))
    done = scaled.cli("policy", "apply", str(file))
    assert done.returncode == 1
    assert "decode.maxReplicas: 100 is more than 8" in done.stderr
    assert explain(scaled)["policy"] == "good"


def test_a_policy_is_taken_without_a_restart(scaled: FakeEngineCluster, tmp_path: Path) -> None:
    apply(scaled, tmp_path, policy("first"))
    wait_for_sizes(scaled, 1, 1)
    before = scaled.replicas()
    apply(scaled, tmp_path, policy("second"))
    assert explain(scaled)["policy"] == "second"
    assert scaled.replicas() == before


def test_an_advisory_policy_changes_nothing(scaled: FakeEngineCluster, tmp_path: Path) -> None:
    apply(scaled, tmp_path, policy("good"))
    wait_for_sizes(scaled, 1, 1)
    apply(scaled, tmp_path, policy("advice", mode="Advisory"))
    with Load(scaled.state.address, repeated(10, 4000, 1)) as prompts:

        def is_advised() -> bool:
            targets = {each["pool"]: each["target"] for each in explain(scaled)["advice"]}
            return targets == {"prefill": 2, "decode": 1}

        scaled.wait(is_advised)
        assert sizes(scaled) == {"prefill": 1, "decode": 1}
        prompts.finish()
    check(prompts)


def test_a_killed_autoscaler_goes_on_without_a_jump(
    scaled: FakeEngineCluster, tmp_path: Path
) -> None:
    document = policy("steady")
    document["spec"]["prefill"]["minReplicas"] = 2
    apply(scaled, tmp_path, document)
    wait_for_sizes(scaled, 2, 1)
    before, changes = scaled.replicas(), explain(scaled)["changes"]
    pid = scaled.replica("Autoscaler")
    os.kill(pid, signal.SIGKILL)
    scaled.wait(lambda: "Autoscaler" in scaled.replicas().values() and pid not in scaled.replicas())

    def has_decided() -> bool:
        done = scaled.cli("policy", "explain", "--json")
        return done.returncode == 0 and json.loads(done.stdout)["demand_age_s"] is not None

    scaled.wait(has_decided)
    after = scaled.replicas()
    assert {p: n for p, n in before.items() if p != pid}.items() <= after.items()
    assert explain(scaled)["changes"] == changes, "its memory came back from the store"


def test_without_a_policy_the_numbers_stay(scaled: FakeEngineCluster, tmp_path: Path) -> None:
    document = policy("steady")
    document["spec"]["prefill"]["minReplicas"] = 2
    apply(scaled, tmp_path, document)
    wait_for_sizes(scaled, 2, 1)
    refused = scaled.cli("scale", "prefill=1")
    assert refused.returncode == 1
    assert "policy 'steady' decides" in refused.stderr
    done = scaled.cli("policy", "remove")
    assert done.returncode == 0, done.stderr
    assert scaled.cli("policy", "show").returncode == 1
    assert sizes(scaled) == {"prefill": 2, "decode": 1}
    assert scaled.cli("scale", "prefill=1").returncode == 0
    wait_for_sizes(scaled, 1, 1)


def test_calibrate_measures_what_simulate_reads(scaled: FakeEngineCluster, tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    done = scaled.cli("policy", "calibrate", str(file))
    assert done.returncode == 0, done.stderr
    assert "measurements" in done.stdout
    model = latency_model(str(file))
    fake = fake_engine()
    assert model.kv == replace(fake.kv, prefill_tokens=65_536, reservation=KvReservation.PROMPT)
    assert model.prefill.seconds(4096) >= fake.prefill.seconds(4096), "an engine cannot be faster"
    # The fake engine decodes while the prompt is prefilled, so its steps look shorter.
    assert model.decode.base_s > 0
