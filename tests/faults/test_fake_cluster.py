"""Random faults strike a cluster of real processes with fake engines, one fault after the other.

test_schedules runs thousands of such series in virtual time. This module runs one series with
Ray, gRPC and Valkey. ``BATON_FAULT_SEED=n`` chooses another series.

The tests share one cluster. Each test restores the cluster, except for the test marked
``ends_cluster``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from cluster.local import reaper
from core.types import Pool, WorkerRecord, WorkerState
from engine.fake import next_tokens
from tests.support import hostile, live_cluster
from tests.support.live_cluster import SILENCE_S, LiveCluster
from tests.support.process_faults import (
    CutWorker,
    DrainWorker,
    Fault,
    FullLogDisk,
    JumpClock,
    KillController,
    KillGcs,
    KillRouter,
    KillStore,
    KillWorker,
    RestartRouter,
    SilenceWorker,
    StallWorker,
    StopStore,
    StopWorker,
    title,
)
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
from tests.support.word_model import write_word_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

# max_attempts: with a fault every few seconds, one request may lose more workers than the default
# allows. The router then ends the request with an error.
# journal_patience_s: while workers start, writes to the journal are slow. With the default, a
# client may get a token before it is written. No other router can then resume the stream.
CONFIG = """\
model: {{path: {model}}}
router: {{port: 0, max_attempts: 20, journal_patience_s: 1}}
prefill: {{engine_kind: fake, shutdown_grace_s: 1}}
decode: {{engine_kind: fake, shutdown_grace_s: 1}}
"""
SIZES = {Pool.PREFILL: 2, Pool.DECODE: 2}
SEED = int(os.environ.get("BATON_FAULT_SEED", "1"))
FAULTS = 40
CLIENTS = 6
RESTORED_S = 90.0  # longest time until all workers are replaced and idle


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    folder = tmp_path_factory.mktemp("fake")
    model = folder / "model"
    model.mkdir()
    write_word_model(model)
    cluster = live_cluster.start(folder, "fake", CONFIG.format(model=model), SIZES)
    try:
        yield cluster
    finally:
        live_cluster.stop(cluster)


def random_fault(rng: random.Random) -> Fault:
    pool = rng.choice((Pool.PREFILL, Pool.DECODE, Pool.DECODE))
    makes: tuple[tuple[int, Callable[[], Fault]], ...] = (
        (8, lambda: KillWorker(pool)),
        (4, lambda: StallWorker(pool)),
        (1, lambda: StopWorker(pool)),
        (4, lambda: DrainWorker(pool)),
        (3, KillStore),
        (2, StopStore),
        (3, KillController),
        (2, lambda: FullLogDisk(pool)),
        (3, lambda: CutWorker(pool)),
        (2, lambda: SilenceWorker(pool, SILENCE_S / 4)),
        (2, lambda: SilenceWorker(pool, SILENCE_S * 1.5)),
        (2, JumpClock),
    )
    (make,) = rng.choices([make for _, make in makes], [weight for weight, _ in makes])
    return make()


def random_requests(rng: random.Random) -> Iterator[PlannedRequest]:
    while True:
        prompt = tuple(rng.randrange(3, 1000) for _ in range(rng.randint(1, 200)))
        yield PlannedRequest(prompt, rng.choice((1, 2, 30, 300, 1500)))


def check(outcome: Outcome) -> None:
    check_sequence(outcome)
    check_tokens(outcome, next_tokens(outcome.request.prompt, outcome.request.max_tokens))
    check_ended_well(outcome)


def test_no_request_is_lost_in_a_series_of_faults(cluster: LiveCluster) -> None:
    check_served(cluster)
    files = cluster.open_files()
    rng = random.Random(SEED)
    print(f"BATON_FAULT_SEED={SEED}")
    plans = [random_requests(random.Random(rng.random())) for _ in range(CLIENTS)]
    with Load(cluster.state.address, plans) as load:
        load.wait_for_tokens(1)
        for number in range(FAULTS):
            fault = random_fault(rng)
            print(f"{number}: {title(fault)} after {len(load.outcomes)} requests")
            fault.strike(cluster)
            load.wait_for_requests(len(load.outcomes) + rng.choice((0, 3, 10)))
        load.finish()
    for outcome in load.outcomes:
        try:
            check(outcome)
        except AssertionError as error:
            if outcome.responses:  # a response carries the request's id
                error.add_note("\n".join(cluster.router_log_lines(outcome.responses[0].request_id)))
            raise
    attempts = [outcome.attempts for outcome in load.outcomes if not outcome.given_up]
    print(f"{len(attempts)} requests, {sum(attempts) - len(attempts)} failovers")
    assert max(attempts) > 1, "no fault hit a request"
    cluster.wait_restored(RESTORED_S)
    check_served(cluster)
    cluster.wait_files_closed(files)


def test_a_fault_strikes_only_what_is_up(cluster: LiveCluster) -> None:
    """If a fault's victim has just been killed or stopped, ``strike`` waits until it runs again."""
    for fault in (
        *(KillStore(), StopStore(), KillStore(), JumpClock()),
        *(KillController(), KillController()),
        *(KillWorker(Pool.DECODE), StallWorker(Pool.DECODE)),
    ):
        fault.strike(cluster)
    cluster.wait_restored(RESTORED_S)
    check_served(cluster)


def check_served(cluster: LiveCluster) -> None:
    """Check that each prefill worker serves a request with each decode worker."""
    served: set[tuple[str, str]] = set()

    def all_pairs_served() -> bool:
        with cluster.client() as client:
            answer = client.complete(token_ids=[5, 6, 7], max_tokens=3, temperature=0.0)
        assert answer.token_ids == next_tokens([5, 6, 7], 3)
        served.add((answer.phases.prefill_worker, answer.phases.decode_worker))
        return len(served) == SIZES[Pool.PREFILL] * SIZES[Pool.DECODE]

    cluster.wait(all_pairs_served, "each pair of workers has served")


def test_a_rolling_restart_under_load_loses_no_request(cluster: LiveCluster) -> None:
    """Each worker drains and is replaced, one after the other. Then the router restarts, and the
    new router is killed."""
    before = cluster.workers()
    plans = [random_requests(random.Random(number)) for number in range(CLIENTS)]
    with Load(cluster.state.address, plans, REFUSALS | ROUTER_GONE) as load:
        load.wait_for_tokens(1)
        for worker in before:
            done = cluster.cli("drain", worker.id)
            assert done.returncode == 0, done.stderr
            wait_replaced(cluster, worker)
        for fault in (RestartRouter(), KillRouter()):
            load.wait_for_streams(CLIENTS // 2)
            fault.strike(cluster)
            load.wait_for_requests(len(load.outcomes) + CLIENTS)
        load.finish()
    for outcome in load.outcomes:
        check(outcome)
    cluster.wait_restored(RESTORED_S)
    assert not {each.id for each in before} & {each.id for each in cluster.workers()}
    check_served(cluster)


def test_bytes_on_every_port_disturb_no_request(cluster: LiveCluster) -> None:
    """Strangers send garbage to all listeners, those of Ray and of the store included."""
    rng = hostile.dice("ports")
    kinds = [
        hostile.garbage,
        hostile.another_protocol,
        hostile.truncated_preface,
        hostile.random_frames,
        hostile.huge_length,
    ]
    before = cluster.workers()
    ports = cluster.listening_ports()
    assert len(ports) > 10, "the router, Valkey, Ray, and for each worker gRPC, metrics and Serve"
    plans = [random_requests(random.Random(number)) for number in range(CLIENTS)]
    with Load(cluster.state.address, plans) as load, ExitStack() as crowds:
        load.wait_for_tokens(1)
        for port in sorted(ports):
            strangers = hostile.Strangers("127.0.0.1", port, rng)
            crowds.callback(strangers.leave)
            strangers.storm_here(kinds, 20)
        load.wait_for_requests(len(load.outcomes) + CLIENTS)
        crowds.close()
        load.finish()
    for outcome in load.outcomes:
        check(outcome)
    assert {each.id for each in cluster.workers()} == {each.id for each in before}
    cluster.wait_restored(RESTORED_S)
    check_served(cluster)


def wait_replaced(cluster: LiveCluster, gone: WorkerRecord) -> None:
    def is_replaced() -> bool:
        ready = [each for each in cluster.workers(gone.pool) if each.state is WorkerState.READY]
        return len(ready) == SIZES[gone.pool] and gone.id not in {each.id for each in ready}

    cluster.wait(is_replaced, f"another worker has replaced {gone.id}", RESTORED_S)


@pytest.mark.ends_cluster
def test_streams_end_before_the_cluster_that_lost_ray(cluster: LiveCluster) -> None:
    cluster_id = cluster.state.cluster_id
    plans = [[PlannedRequest((5, 6, seed), 1000)] for seed in range(4)]
    with Load(cluster.state.address, plans) as load:
        load.wait_for_tokens(10)
        KillGcs().strike(cluster)
    for outcome in load.outcomes:
        check(outcome)
    assert {outcome.attempts for outcome in load.outcomes} == {1}
    assert cluster.launcher.wait(live_cluster.STOP_S) == 1
    assert "Ray ended unexpectedly" in cluster.recent_log()
    cluster.wait(lambda: not reaper.find(cluster_id), "no process is left", 15)
    assert not cluster.run_dir.exists()
