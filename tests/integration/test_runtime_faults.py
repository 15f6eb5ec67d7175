"""A cluster with fake engines survives the loss of its router or its store."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import baton
from cluster.local import reaper
from engine.fake import next_tokens
from tests.support.fake_engine_cluster import PROMPT, FakeEngineCluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


def test_a_stream_goes_on_when_its_router_is_killed(cluster: FakeEngineCluster) -> None:
    router = cluster.replica("Router")
    with cluster.client() as client:
        stream = client.generate(token_ids=PROMPT, max_tokens=1500, temperature=0.0, timeout_s=60)
        responses = [next(stream) for _ in range(20)]
        os.kill(router, signal.SIGKILL)
        responses += stream
    tokens = [token for response in responses for token in response.token_ids]
    assert tuple(tokens) == next_tokens(PROMPT, 1500)
    assert [response.sequence for response in responses] == list(range(len(responses)))


@pytest.mark.usefixtures("two_of_each")
@pytest.mark.parametrize("deployment", ["Router", "DecodeWorker", "PrefillWorker"])
def test_sigterm_drains_a_process(cluster: FakeEngineCluster, deployment: str) -> None:
    """The streams end without an interruption. Then the process ends and is replaced."""
    interruptions: list[baton.BatonError] = []
    with baton.Client(
        cluster.state.address,
        timeout_s=60,
        on_interruption=lambda error, _: interruptions.append(error),
    ) as client:
        streams = [
            client.generate(token_ids=[*PROMPT, seed], max_tokens=400, temperature=0.0)
            for seed in range(4)
        ]
        answers = [[next(stream)] for stream in streams]
        pid = cluster.replica(deployment)
        os.kill(pid, signal.SIGTERM)
        for seed, (stream, responses) in enumerate(zip(streams, answers, strict=True)):
            responses += stream
            tokens = [token for response in responses for token in response.token_ids]
            assert tuple(tokens) == next_tokens([*PROMPT, seed], 400)
            assert responses[-1].phases is not None
            assert responses[-1].phases.attempts == 1, "400 tokens end within the grace"
    assert not interruptions
    cluster.wait(lambda: pid not in cluster.replicas())

    def is_replaced() -> bool:
        try:
            answer = cluster.complete(PROMPT, 5)
        except baton.UnavailableError:
            return False
        return answer.token_ids == next_tokens(PROMPT, 5) and len(cluster.replicas()) == 6

    cluster.wait(is_replaced)


def test_a_killed_router_comes_back_to_its_port(cluster: FakeEngineCluster) -> None:
    os.kill(cluster.replica("Router"), signal.SIGKILL)

    def serves() -> bool:
        try:
            return cluster.complete(PROMPT, 5).token_ids == next_tokens(PROMPT, 5)
        except baton.UnavailableError:
            return False

    cluster.wait(serves)


def test_requests_go_on_while_valkey_is_replaced(cluster: FakeEngineCluster) -> None:
    workers = len(cluster.workers())
    valkey = next(
        pid
        for pid in reaper.find(cluster.state.cluster_id)
        if b"valkey-server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    with cluster.client() as client:
        stream = client.generate(token_ids=PROMPT, max_tokens=400, temperature=0.0)
        next(stream)
        os.kill(valkey, signal.SIGKILL)
        for _ in stream:
            pass
        assert cluster.complete(PROMPT, 5).token_ids == next_tokens(PROMPT, 5)
    cluster.wait(lambda: len(cluster.workers()) == workers)
