"""Workers that join later get work, and pair up without a restart of anything."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import baton
from tests.e2e.conftest import RunningCluster, random_prompt


def test_a_second_prefill_and_decode_worker(cluster: RunningCluster) -> None:
    before = {worker["id"] for worker in cluster.workers()}
    done = cluster.cli("scale", "prefill=2", "decode=2")
    assert done.returncode == 0, done.stderr

    def workers() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"prefill": [], "decode": []}
        for worker in cluster.workers():
            if worker["state"] == "ready":
                found[worker["pool"]].append(worker["id"])
        return found

    cluster.wait(
        lambda: [len(ids) for ids in workers().values()] == [2, 2], "two workers of each", 240
    )
    now = workers()
    assert before <= {*now["prefill"], *now["decode"]}, "the first workers were restarted"

    pairs: dict[tuple[str, str], int] = {}

    def ask(seed: int) -> None:
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
        pairs[pair] = pairs.get(pair, 0) + phases.kv.bytes

    everyone = {(p, d) for p in now["prefill"] for d in now["decode"]}
    seeds = iter(range(10_000))

    def all_pairs_carried() -> bool:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, [next(seeds) for _ in range(4)]))
        return pairs.keys() == everyone

    cluster.wait(all_pairs_carried, f"all four pairs carry KV, so far {sorted(pairs)}", 120)
    assert all(carried > 0 for carried in pairs.values())

    assert cluster.cli("scale", "prefill=1", "decode=1").returncode == 0
    cluster.wait(
        lambda: [len(ids) for ids in workers().values()] == [1, 1], "one worker of each", 60
    )
