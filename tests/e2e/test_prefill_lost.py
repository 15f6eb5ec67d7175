"""Without a prefill worker: UNAVAILABLE with a hint, until Serve has replaced it."""

from __future__ import annotations

import psutil

import baton
from tests.e2e.conftest import CASES, MAX_TOKENS, RunningCluster


def test_no_prefill_worker_alive(cluster: RunningCluster, reference: dict[str, list[int]]) -> None:
    before = {worker["id"] for worker in cluster.workers()}
    victims = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "PrefillWorker" in " ".join(process.info["cmdline"] or ())
    ]
    assert len(victims) == 1
    victims[0].kill()

    def refusal() -> baton.UnavailableError | None:
        with cluster.client() as client:
            try:
                client.complete(token_ids=CASES[0].prompt, max_tokens=4, timeout_s=20)
            except baton.UnavailableError as error:
                return error
        return None

    refused: list[baton.UnavailableError] = []

    def was_refused() -> bool:
        if (error := refusal()) is not None:
            refused.append(error)
        return bool(refused)

    cluster.wait(was_refused, "the router has noticed", 15)
    assert refused[0].retry_after_s
    assert "prefill" in str(refused[0])

    cluster.wait(
        lambda: (
            sum(worker["pool"] == "prefill" for worker in cluster.workers()) == 1
            and not before >= {w["id"] for w in cluster.workers() if w["pool"] == "prefill"}
        ),
        "Serve has replaced the prefill worker",
        120,
    )
    case = next(case for case in CASES if case.name == "many chunks")

    def answers() -> bool:
        with cluster.client() as client:
            try:
                answer = client.complete(
                    token_ids=case.prompt, temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True
                )
            except baton.UnavailableError:
                return False
        assert list(answer.token_ids) == reference[case.name]
        assert answer.phases.kv is not None
        assert answer.phases.kv.outcome is baton.KvOutcome.TRANSFERRED
        return True

    cluster.wait(answers, "requests are served again", 60)
    decode = {worker["id"] for worker in cluster.workers() if worker["pool"] == "decode"}
    assert decode <= before, "the decode worker must not have been restarted"
    cluster.wait_idle()
