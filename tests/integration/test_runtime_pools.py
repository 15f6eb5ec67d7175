"""The worker pools of a cluster with fake engines: workers are scaled, drained and replaced."""

from __future__ import annotations

import os
import signal

import pytest

from engine.fake import next_tokens
from tests.support.fake_engine_cluster import PROMPT, FakeEngineCluster

TOKENS = 4000  # of a stream that lasts for at least 12 s

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


@pytest.mark.usefixtures("one_of_each")
def test_scale_up_keeps_the_running_workers(cluster: FakeEngineCluster) -> None:
    ids, replicas = {w["id"] for w in cluster.workers()}, cluster.replicas()
    done = cluster.cli("scale", "prefill=2", "decode=2")
    assert done.returncode == 0, done.stderr
    assert {pool: len(cluster.ids(pool)) for pool in ("prefill", "decode")} == {
        "prefill": 2,
        "decode": 2,
    }
    assert ids < {worker["id"] for worker in cluster.workers()}
    assert replicas.items() < cluster.replicas().items()

    served: set[tuple[str, str]] = set()

    def all_pairs_served() -> bool:
        answer = cluster.complete(PROMPT, 3)
        served.add((answer.phases.prefill_worker, answer.phases.decode_worker))
        return len(served) == 4

    cluster.wait(all_pairs_served)


@pytest.mark.parametrize("target", ["prefill=0", "decode=9"])
def test_scale_refuses_numbers_out_of_bounds(cluster: FakeEngineCluster, target: str) -> None:
    done = cluster.cli("scale", target)
    assert done.returncode == 1
    assert "is not between 1 and 8" in done.stderr


@pytest.mark.usefixtures("two_of_each")
def test_a_killed_worker_is_replaced(cluster: FakeEngineCluster) -> None:
    before = cluster.ids("decode")
    os.kill(cluster.replica("DecodeWorker"), signal.SIGKILL)

    def is_replaced() -> bool:
        now = cluster.ids("decode")
        return len(now & before) == 1 and len(now - before) == 1

    cluster.wait(is_replaced)
    assert cluster.complete(PROMPT, 5).token_ids == next_tokens(PROMPT, 5)


@pytest.mark.usefixtures("two_of_each")
def test_drain_moves_streams_and_replaces_the_worker(
    cluster: FakeEngineCluster,
) -> None:
    before = cluster.ids("decode")
    with cluster.client() as client:
        streams = [
            client.generate(token_ids=[*PROMPT, seed], max_tokens=TOKENS, temperature=0.0)
            for seed in range(4)
        ]
        for stream in streams:
            next(stream)
        (leaving, *_) = sorted(before)
        # The streams last much longer than the command's start and ``shutdown_grace_s``.
        done = cluster.cli("drain", leaving)
        assert done.returncode == 0, done.stderr
        assert f"{leaving} has left" in done.stdout
        moved = 0
        for seed, stream in enumerate(streams):
            responses = list(stream)
            tokens = [token for response in responses for token in response.token_ids]
            assert tuple(tokens) == next_tokens([*PROMPT, seed], TOKENS)[1:]
            assert responses[-1].phases is not None
            moved += responses[-1].phases.attempts == 2
        assert moved == 2, "two of the four streams were on the drained worker"
    cluster.wait(lambda: len(cluster.ids("decode")) == 2 and leaving not in cluster.ids("decode"))


def test_drain_of_an_unknown_worker_names_the_known_ones(cluster: FakeEngineCluster) -> None:
    done = cluster.cli("drain", "decode-0")
    assert done.returncode == 1
    assert all(worker["id"] in done.stderr for worker in cluster.workers())


@pytest.mark.usefixtures("two_of_each")
def test_scale_down_drains_the_worker_that_leaves(cluster: FakeEngineCluster) -> None:
    with cluster.client() as client:
        streams = [
            client.generate(token_ids=[*PROMPT, seed], max_tokens=600, temperature=0.0)
            for seed in range(8)
        ]
        for stream in streams:
            next(stream)
        scale = cluster.spawn("scale", "decode=1", "prefill=1")
        for seed, stream in enumerate(streams):
            tokens = [token for response in stream for token in response.token_ids]
            assert tuple(tokens) == next_tokens([*PROMPT, seed], 600)[-len(tokens) :]
    scale.communicate(timeout=60)
    assert scale.returncode == 0
    cluster.wait(lambda: len(cluster.workers()) == 2)  # scale does not wait for workers that leave
