"""Requests get UNAVAILABLE with a retry hint until Serve has replaced the killed prefill worker."""

from __future__ import annotations

import os
import signal

import baton
from core.types import Pool
from tests.e2e.conftest import AFTER_REPLACEMENT, MAX_TOKENS, RunningCluster
from tests.support.prompts import random_prompt


def test_no_prefill_worker_alive(cluster: RunningCluster, reference: dict[str, list[int]]) -> None:
    before = {worker["id"] for worker in cluster.workers()}
    (prefill,) = cluster.worker_processes(Pool.PREFILL)
    os.kill(prefill.pid, signal.SIGKILL)

    refusals: list[baton.UnavailableError] = []

    def is_refused() -> bool:
        with cluster.client() as client:
            try:
                client.complete(token_ids=random_prompt(1, 12), max_tokens=4, timeout_s=20)
            except baton.UnavailableError as error:
                refusals.append(error)
        return bool(refusals)

    cluster.wait(is_refused, "the router has noticed the loss", 15)
    assert refusals[0].retry_after_s
    assert "prefill" in str(refusals[0])

    def is_replaced() -> bool:
        ids = {worker["id"] for worker in cluster.workers() if worker["pool"] == "prefill"}
        return len(ids) == 1 and not ids <= before

    cluster.wait(is_replaced, "Serve has replaced the prefill worker", 120)

    def answers() -> bool:
        with cluster.client() as client:
            try:
                answer = client.complete(
                    token_ids=AFTER_REPLACEMENT.prompt,
                    temperature=0,
                    max_tokens=MAX_TOKENS,
                    ignore_eos=True,
                )
            except baton.UnavailableError:
                return False
        assert list(answer.token_ids) == reference[AFTER_REPLACEMENT.name]
        assert answer.phases.kv is not None
        assert answer.phases.kv.outcome is baton.KvOutcome.TRANSFERRED
        return True

    cluster.wait(answers, "requests are served again", 60)
    decode = {worker["id"] for worker in cluster.workers() if worker["pool"] == "decode"}
    assert decode <= before, "the decode worker was restarted"
    cluster.wait_restored()
