"""Faults strike a cluster with real engines during streams whose tokens are known.

The tests share one cluster. Each test waits at its end until the cluster has recovered, except for
the test marked ``ends_cluster``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest

from cluster.local import reaper
from core.types import Pool
from tests.support import live_cluster
from tests.support.live_cluster import SILENCE_S, LiveCluster
from tests.support.process_faults import (
    CutWorker,
    DrainWorker,
    Fault,
    FullLogDisk,
    JumpClock,
    KillController,
    KillEngine,
    KillGcs,
    KillRouter,
    KillStore,
    KillWorker,
    SilenceWorker,
    StallWorker,
    StopEngine,
    StopStore,
    StopWorker,
    title,
)
from tests.support.prompts import random_prompt
from tests.support.stream_load import (
    REFUSALS,
    ROUTER_GONE,
    Load,
    Outcome,
    PlannedRequest,
    check_ended_well,
    check_sequence,
    check_tokens,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# dtype: in bfloat16, batching alone changes the last bits and sometimes a token.
# enable_prefix_caching: off, because the prefill worker must compute a repeated prompt in full.
# journal_patience_s: on a machine with two cores, the engines delay writes to the journal. A stream
# can be resumed only if its tokens were written.
CONFIG = """\
model: {dtype: float32, max_model_len: 2048}
router: {port: 0, journal_patience_s: 1}
prefill:
  cpu_binding: ["0"]
  progress_timeout_s: 5
  engine: {max_num_batched_tokens: 256, enable_prefix_caching: false}
decode:
  cpu_binding: ["1"]
  progress_timeout_s: 5
  shutdown_grace_s: 1
  engine: {max_num_batched_tokens: 256}
"""
SIZES = {Pool.PREFILL: 1, Pool.DECODE: 2}
RESTORED_S = 120.0  # longest time until all workers are replaced and idle

STREAMS = [PlannedRequest(tuple(random_prompt(40 + 30 * n, 200 + n)), 150) for n in range(4)]
MOVED = [replace(request, max_tokens=80) for request in STREAMS]  # enough for one fault
SHORT = [PlannedRequest(tuple(random_prompt(30, 400 + n)), 8) for n in range(2)]
LONG_PROMPTS = [PlannedRequest(tuple(random_prompt(1200, 300 + n)), 10) for n in range(5)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    cluster = live_cluster.start(tmp_path_factory.mktemp("real"), "real", CONFIG, SIZES)
    try:
        yield cluster
    finally:
        live_cluster.stop(cluster)


@dataclass(frozen=True, slots=True)
class Reference:
    """The answers and the open files of the undisturbed cluster."""

    answers: Mapping[PlannedRequest, Sequence[int]]  # token ids
    # By kind of process: the most files that a process of the idle cluster has open.
    files: Counter[str]


@pytest.fixture(scope="module")
def reference(cluster: LiveCluster) -> Reference:
    outcomes = run(cluster, STREAMS) + run(cluster, LONG_PROMPTS) + run(cluster, SHORT)
    for outcome in outcomes:
        check_ended_well(outcome)
    cluster.wait_restored(RESTORED_S)
    answers = {outcome.request: outcome.token_ids for outcome in outcomes}
    for long, short in zip(STREAMS, MOVED, strict=True):
        answers[short] = answers[long][: short.max_tokens]
    return Reference(answers, cluster.open_files())


def run(cluster: LiveCluster, requests: Sequence[PlannedRequest]) -> list[Outcome]:
    """Send all requests at the same time and wait for their ends."""
    with Load(cluster.state.address, each_alone(requests)) as load:
        pass
    return load.outcomes


def each_alone(requests: Sequence[PlannedRequest]) -> list[list[PlannedRequest]]:
    """Return plans that give each request its own client."""
    return [[request] for request in requests]


def check(outcomes: Sequence[Outcome], reference: Reference) -> None:
    for outcome in outcomes:
        check_sequence(outcome)
        check_tokens(outcome, reference.answers[outcome.request])
        check_ended_well(outcome)


def check_restored(cluster: LiveCluster, reference: Reference) -> None:
    """Check that the cluster is idle, has as many processes as before and no new open files, and
    serves requests."""
    cluster.wait_restored(RESTORED_S)
    outcomes = run(cluster, SHORT)
    check(outcomes, reference)
    assert {outcome.attempts for outcome in outcomes} == {1}
    cluster.wait_files_closed(reference.files)


def sorted_attempts(outcomes: Sequence[Outcome]) -> list[int]:
    return sorted(outcome.attempts for outcome in outcomes)


@pytest.mark.parametrize(
    "faults",
    [
        # KillController is first, so the new controller replaces the workers that die in the
        # tests below.
        (KillController(), KillStore(), StopStore()),
        (StallWorker(Pool.DECODE),),
        (JumpClock(), SilenceWorker(Pool.DECODE, 1.0), SilenceWorker(Pool.PREFILL, 1.0)),
    ],
    ids=lambda faults: " ".join(map(title, faults)),
)
def test_streams_do_not_notice(
    cluster: LiveCluster, reference: Reference, faults: Sequence[Fault]
) -> None:
    with Load(cluster.state.address, each_alone(STREAMS)) as load:
        for number, fault in enumerate(faults, 1):
            load.wait_for_tokens(20 * number)
            fault.strike(cluster)
    check(load.outcomes, reference)
    assert sorted_attempts(load.outcomes) == [1, 1, 1, 1]
    check_restored(cluster, reference)


@pytest.mark.parametrize(
    ("decode_fault", "prefill_fault"),
    [
        (KillWorker(Pool.DECODE), KillEngine(Pool.PREFILL)),
        (StopEngine(Pool.DECODE), KillWorker(Pool.PREFILL)),
        (StopWorker(Pool.DECODE), FullLogDisk(Pool.PREFILL)),
        (FullLogDisk(Pool.DECODE), StopWorker(Pool.PREFILL)),
        (DrainWorker(Pool.DECODE), StopEngine(Pool.PREFILL)),
        (CutWorker(Pool.DECODE), CutWorker(Pool.PREFILL)),
        (
            SilenceWorker(Pool.DECODE, 2 * SILENCE_S),
            SilenceWorker(Pool.PREFILL, 2 * SILENCE_S),
        ),
    ],
    ids=title,
)
def test_streams_move_to_another_decode_worker_and_prompts_wait(
    cluster: LiveCluster, reference: Reference, decode_fault: Fault, prefill_fault: Fault
) -> None:
    """``prefill_fault`` strikes even if the decode worker has not been replaced yet."""
    with Load(cluster.state.address, each_alone(MOVED)) as load:
        load.wait_for_tokens(20)
        decode_fault.strike(cluster)
    check(load.outcomes, reference)
    moved = sorted_attempts(load.outcomes)
    assert set(moved) <= {1, 2}
    assert moved[-1] == 2
    if isinstance(prefill_fault, StopEngine):
        hang_prefill(cluster, reference, prefill_fault)
    else:
        hit_prefill(cluster, reference, prefill_fault)
    check_restored(cluster, reference)


def hit_prefill(cluster: LiveCluster, reference: Reference, fault: Fault) -> None:
    """Strike the only prefill worker while it computes prompts.

    Check that all requests end well, and that at least one prompt needs a retry. The streams that
    already run must not notice.
    """
    with Load(cluster.state.address, each_alone(MOVED[:2])) as streams:
        streams.wait_for_tokens(5)
        with Load(cluster.state.address, each_alone(LONG_PROMPTS)) as prompts:
            cluster.wait(
                lambda: any(each.load.running for each in cluster.workers(Pool.PREFILL)),
                "the prefill worker computes",
            )
            fault.strike(cluster)
    check(streams.outcomes + prompts.outcomes, reference)
    assert sorted_attempts(streams.outcomes) == [1, 1]
    assert sorted_attempts(prompts.outcomes)[-1] > 1


def hang_prefill(cluster: LiveCluster, reference: Reference, fault: StopEngine) -> None:
    """Let the only prefill engine hang. Check that its worker is found and removed.

    Meanwhile, a decode worker that waits for KV may give up and compute the prompt itself.
    """
    (hung,) = cluster.workers(Pool.PREFILL)
    fault.strike(cluster)
    check(run(cluster, MOVED), reference)
    cluster.wait(
        lambda: hung.id not in {each.id for each in cluster.workers()},
        "the worker with the hung engine has gone",
    )


def test_clients_resume_at_the_next_router(cluster: LiveCluster, reference: Reference) -> None:
    with Load(cluster.state.address, each_alone(STREAMS), REFUSALS | ROUTER_GONE) as load:
        load.wait_for_tokens(20)
        KillRouter().strike(cluster)
    check(load.outcomes, reference)
    check_restored(cluster, reference)


@pytest.mark.ends_cluster
def test_streams_end_before_the_cluster_that_lost_ray(
    cluster: LiveCluster, reference: Reference
) -> None:
    cluster_id = cluster.state.cluster_id
    with Load(cluster.state.address, each_alone(STREAMS)) as load:
        load.wait_for_tokens(20)
        KillGcs().strike(cluster)
    check(load.outcomes, reference)
    assert sorted_attempts(load.outcomes) == [1, 1, 1, 1]
    assert cluster.launcher.wait(live_cluster.STOP_S) == 1
    assert "Ray ended unexpectedly" in cluster.recent_log()
    cluster.wait(lambda: not reaper.find(cluster_id), "no process is left", 15)
    assert not cluster.run_dir.exists()
