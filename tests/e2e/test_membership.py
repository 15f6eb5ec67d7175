"""Workers that join later get requests. No running process has to restart for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import baton
from tests.e2e.conftest import RunningCluster
from tests.support.prompts import random_prompt


def test_a_second_prefill_and_decode_worker(cluster: RunningCluster) -> None:
    before = {worker["id"] for worker in cluster.workers()}
    done = cluster.cli("scale", "prefill=2", "decode=2")
    assert done.returncode == 0, done.stderr

    def ready_ids() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"prefill": [], "decode": []}
        for worker in cluster.workers():
            if worker["state"] == "ready":
                found[worker["pool"]].append(worker["id"])
        return found

    cluster.wait(
        lambda: [len(ids) for ids in ready_ids().values()] == [2, 2],
        "two workers of each pool",
        240,
    )
    now = ready_ids()
    assert before <= {*now["prefill"], *now["decode"]}, "the first workers were restarted"

    bytes_by_pair: dict[tuple[str, str], int] = {}

    def complete(seed: int) -> None:
        with cluster.client() as client:
            answer = client.complete(
                token_ids=random_prompt(150, 2000 + seed),
                temperature=0,
                max_tokens=8,
                ignore_eos=True,
            )
        phases = answer.phases
        assert phases.kv is not None
        assert phases.kv.outcome is baton.KvOutcome.TRANSFERRED
        pair = (phases.prefill_worker, phases.decode_worker)
        bytes_by_pair[pair] = bytes_by_pair.get(pair, 0) + phases.kv.bytes

    all_pairs = {(p, d) for p in now["prefill"] for d in now["decode"]}
    seeds = iter(range(10_000))

    def all_pairs_carried() -> bool:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(complete, [next(seeds) for _ in range(4)]))
        return bytes_by_pair.keys() == all_pairs

    cluster.wait(all_pairs_carried, "all four pairs have carried KV", 120)
    assert all(carried > 0 for carried in bytes_by_pair.values())

    assert cluster.cli("scale", "prefill=1", "decode=1").returncode == 0
    cluster.wait_restored()
