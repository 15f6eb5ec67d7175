"""Faults in a cluster with real engines, under streams whose every token is known.

One cluster serves all tests, and each waits until it is whole again; the last one ends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest

from cluster.local import reaper
from core.types import Pool
from tests.e2e.conftest import random_prompt
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
from tests.support.stream_load import (
    REFUSALS,
    ROUTER_GONE,
    Ask,
    Load,
    Outcome,
    check_ended_well,
    check_sequence,
    check_tokens,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# float32: batching alone changes the last bits of bfloat16, and with them now and then a token.
# Without a prefix cache the prefill worker has as much to do with a prompt each time. Engines that
# have all cores delay a write to the journal, and what is not in there cannot be resumed.
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
WHOLE_S = 120.0

STREAMS = [Ask(tuple(random_prompt(40 + 30 * n, 200 + n)), 150) for n in range(4)]
SHORT = [Ask(tuple(random_prompt(30, 400 + n)), 8) for n in range(2)]
LONG_PROMPTS = [Ask(tuple(random_prompt(1200, 300 + n)), 10) for n in range(2)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    cluster = live_cluster.start(tmp_path_factory.mktemp("real"), "real", CONFIG, SIZES)
    try:
        yield cluster
    finally:
        live_cluster.stop(cluster)


@dataclass(frozen=True, slots=True)
class Reference:
    """The undisturbed cluster."""

    answers: Mapping[Ask, Sequence[int]]
    files: Counter[str]  # open when it is idle again


@pytest.fixture(scope="module")
def reference(cluster: LiveCluster) -> Reference:
    outcomes = run(cluster, STREAMS) + run(cluster, LONG_PROMPTS) + run(cluster, SHORT)
    for outcome in outcomes:
        check_ended_well(outcome)
    cluster.wait_whole(WHOLE_S)
    answers = {outcome.ask: outcome.token_ids for outcome in outcomes}
    return Reference(answers, cluster.files())


def run(cluster: LiveCluster, asks: Sequence[Ask]) -> list[Outcome]:
    """All of them at a time."""
    with Load(cluster.state.address, [[ask] for ask in asks]) as load:
        pass
    return load.outcomes


def check(outcomes: Sequence[Outcome], reference: Reference) -> None:
    for outcome in outcomes:
        check_sequence(outcome)
        check_tokens(outcome, reference.answers[outcome.ask])
        check_ended_well(outcome)


def check_whole_again(cluster: LiveCluster, reference: Reference) -> None:
    """As before: each worker there and idle, no process and no file more, and requests are
    served."""
    cluster.wait_whole(WHOLE_S)
    outcomes = run(cluster, SHORT)
    check(outcomes, reference)
    assert {outcome.attempts for outcome in outcomes} == {1}
    cluster.wait_files(reference.files)


def attempts(outcomes: Sequence[Outcome], asks: Sequence[Ask]) -> list[int]:
    return sorted(outcome.attempts for outcome in outcomes if outcome.ask in asks)


@pytest.mark.parametrize(
    "faults",
    [
        # First the controller: the new one has all workers to replace that die later.
        (KillController(), KillStore(), StopStore()),
        (StallWorker(Pool.DECODE),),
        (JumpClock(), SilenceWorker(Pool.DECODE, 1.0), SilenceWorker(Pool.PREFILL, 1.0)),
    ],
    ids=lambda faults: " ".join(map(title, faults)),
)
def test_streams_do_not_notice(
    cluster: LiveCluster, reference: Reference, faults: Sequence[Fault]
) -> None:
    with Load(cluster.state.address, [[ask] for ask in STREAMS]) as load:
        for number, fault in enumerate(faults, 1):
            load.wait_for_tokens(20 * number)
            fault.strike(cluster)
    check(load.outcomes, reference)
    assert attempts(load.outcomes, STREAMS) == [1, 1, 1, 1]
    check_whole_again(cluster, reference)


@pytest.mark.parametrize(
    ("decode_fault", "prefill_fault"),
    [
        (KillWorker(Pool.DECODE), KillEngine(Pool.PREFILL)),
        (StopEngine(Pool.DECODE), KillWorker(Pool.PREFILL)),
        (StopWorker(Pool.DECODE), FullLogDisk(Pool.PREFILL)),
        (FullLogDisk(Pool.DECODE), StopWorker(Pool.PREFILL)),
        (DrainWorker(Pool.DECODE), None),
        (CutWorker(Pool.DECODE), CutWorker(Pool.PREFILL)),
        (
            SilenceWorker(Pool.DECODE, 2 * SILENCE_S),
            SilenceWorker(Pool.PREFILL, 2 * SILENCE_S),
        ),
    ],
    ids=lambda fault: title(fault) if fault else "nothing more",
)
def test_streams_go_on_elsewhere_and_prompts_wait(
    cluster: LiveCluster, reference: Reference, decode_fault: Fault, prefill_fault: Fault | None
) -> None:
    """The prefill worker is hit while the decode worker is still being replaced."""
    with Load(cluster.state.address, [[ask] for ask in STREAMS]) as load:
        load.wait_for_tokens(20)
        decode_fault.strike(cluster)
    check(load.outcomes, reference)
    moved = attempts(load.outcomes, STREAMS)
    assert set(moved) <= {1, 2}
    assert moved[-1] == 2
    if prefill_fault is not None:
        hit_prefill(cluster, reference, prefill_fault)
    check_whole_again(cluster, reference)


def hit_prefill(cluster: LiveCluster, reference: Reference, fault: Fault) -> None:
    """There is one prefill worker: prompts that it has begun wait for the next one."""
    with Load(cluster.state.address, [[ask] for ask in STREAMS[:2]]) as streams:
        streams.wait_for_tokens(5)
        with Load(cluster.state.address, [[ask] for ask in LONG_PROMPTS]) as prompts:
            cluster.wait(
                lambda: any(each.load.running for each in cluster.workers(Pool.PREFILL)),
                "the prefill worker is at work",
            )
            fault.strike(cluster)
    check(streams.outcomes + prompts.outcomes, reference)
    assert attempts(streams.outcomes, STREAMS) == [1, 1]
    assert attempts(prompts.outcomes, LONG_PROMPTS)[-1] > 1


def test_a_hung_prefill_engine_is_found_and_replaced(
    cluster: LiveCluster, reference: Reference
) -> None:
    """Meanwhile a decode worker that waits for its KV gives up and reads the prompt itself."""
    (hung,) = cluster.workers(Pool.PREFILL)
    StopEngine(Pool.PREFILL).strike(cluster)
    check(run(cluster, STREAMS), reference)
    cluster.wait(
        lambda: hung.id not in {each.id for each in cluster.workers()},
        "the worker with the hung engine has gone",
    )
    check_whole_again(cluster, reference)


def test_clients_go_on_with_the_next_router(cluster: LiveCluster, reference: Reference) -> None:
    with Load(cluster.state.address, [[ask] for ask in STREAMS], REFUSALS | ROUTER_GONE) as load:
        load.wait_for_tokens(20)
        KillRouter().strike(cluster)
    check(load.outcomes, reference)
    check_whole_again(cluster, reference)


def test_streams_end_before_the_cluster_that_lost_ray(
    cluster: LiveCluster, reference: Reference
) -> None:
    cluster_id = cluster.state.cluster_id
    with Load(cluster.state.address, [[ask] for ask in STREAMS]) as load:
        load.wait_for_tokens(20)
        KillGcs().strike(cluster)
    check(load.outcomes, reference)
    assert attempts(load.outcomes, STREAMS) == [1, 1, 1, 1]
    assert cluster.process.wait(live_cluster.STOP_S) == 1
    assert "Ray ended unexpectedly" in cluster.output()
    cluster.wait(lambda: not reaper.find(cluster_id), "no process is left", 15)
    assert not cluster.run_dir.exists()
