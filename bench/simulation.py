"""Compares ``baton policy simulate`` with a real run: the same trace, policy and latency model.

The real run is a cluster with fake engines, whose latencies are known exactly, so the bench shows
what the simulation leaves out: processes, network, leases and polls. The trace is replayed at ten
times its speed, thinned so that one machine with two cores can carry the tokens.

attainment   share of the requests that meet the objectives, real and simulated
ttft_p95_ms  of the completed requests
hours        replica-hours of both pools, until the last request arrives

``ttft_off`` and ``attainment_off`` are the differences: relative, and in percentage points.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import baton
from autoscale.load import parse_policy
from autoscale.policy import Policy
from autoscale.snapshot import Phase
from bench.report import Report, quantile
from cluster.autoscale.view import AutoscaleView
from cluster.cli.policy import apply, explained, wait_for_view
from cluster.cli.progress import Progress
from cluster.cli.scale import scale
from cluster.local.launch import Cluster
from cluster.local.run_dir import ClusterState, read_state
from core.config.schema import Config, load_config
from core.types import Pool
from simulate.cluster import default_settings, run
from simulate.latency import LatencyModel, fake_engine
from simulate.metrics import Results, Slo, evaluate
from simulate.run import candidate
from simulate.trace import Trace, TraceRequest, bursty
from simulate.trace_file import read_trace

SPEED = 10.0
TRACES = Path(__file__).parents[1] / "simulate" / "traces"
# The longest prompts take 0.8 to 1.1 s on an idle cluster, and a decode step takes 3 ms.
SLO = Slo(ttft_s=1.2, itl_s=0.006)
REAL_S = 200.0  # seconds of real time for each trace
MAX_MODEL_LEN = 65_536
# The policy below takes a minute to shrink two pools of four workers to one each.
SHRINK_TIMEOUT_S = 180.0

# HPA's windows of minutes, ten times as fast.
BEHAVIOR = {
    "scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 2}]},
    "scaleDown": {
        "stabilizationWindowSeconds": 15,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 5}],
    },
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One real request. Infinite: it failed."""

    ttft_s: float = float("inf")
    itl_s: float = float("inf")


def policy_text() -> str:
    """Return the policy of both runs."""
    pool = {"minReplicas": 1, "maxReplicas": 4, "behavior": BEHAVIOR}
    prefill = [{"type": "Utilization", "target": 0.6}, {"type": "QueueSeconds", "target": 0.5}]
    return json.dumps(
        {
            "apiVersion": "baton/v1",
            "kind": "AutoscalingPolicy",
            "metadata": {"name": "bench"},
            "spec": {
                "warmupSeconds": 2,
                "prefill": {**pool, "signals": prefill},
                "decode": {**pool, "signals": [{"type": "QueueRequests", "target": 8}]},
            },
        }
    )


def traces() -> dict[str, Trace]:
    """Return the three traces, thinned and at ten times their speed."""
    azure = read_trace(TRACES / "AzureLLMInferenceTrace_conv.csv.gz")
    mooncake = read_trace(TRACES / "mooncake_synthetic_trace.jsonl.gz")
    return {
        "azure-conv": _prepared(azure, every=16, shorter=1),
        "mooncake": _prepared(mooncake, every=16, shorter=12),
        "bursty": _prepared(bursty(), every=40, shorter=1),
    }


def _prepared(trace: Trace, *, every: int, shorter: int) -> Trace:
    """Take each ``every``-th request, with lengths divided by ``shorter``, at ten times the speed.

    Blocks of the prefix cache are dropped: the fake engine has no such cache.
    """
    requests = [
        replace(
            each,
            arrival_s=each.arrival_s / SPEED,
            prompt_tokens=max(each.prompt_tokens // shorter, 1),
            output_tokens=max(each.output_tokens, 1),
            block_ids=(),
        )
        for each in trace.requests[::every]
    ]
    return Trace(trace.name, tuple(each for each in requests if each.arrival_s < REAL_S))


async def replay(address: str, trace: Trace) -> list[Outcome]:
    """Send each request at its time, whatever became of the earlier ones."""
    rng = random.Random(1)
    began_s = time.monotonic()

    async def send(client: baton.AsyncClient, request: TraceRequest) -> Outcome:
        prompt = [rng.randrange(3, 1000) for _ in range(request.prompt_tokens)]
        tokens = request.output_tokens
        # Latency counts from the time of the trace, so a client that is late hides nothing.
        due_s, first_s, last_s = began_s + request.arrival_s, 0.0, 0.0
        await asyncio.sleep(due_s - time.monotonic())
        try:
            stream = client.generate(
                token_ids=prompt, temperature=0.0, max_tokens=tokens, ignore_eos=True
            )
            async for _ in stream:
                last_s = time.monotonic()
                first_s = first_s or last_s
        except baton.BatonError:
            return Outcome()
        return Outcome(first_s - due_s, (last_s - first_s) / max(tokens - 1, 1))

    async with baton.AsyncClient(address, timeout_s=600) as client:
        tasks = [send(client, each) for each in trace.requests]
        return await asyncio.gather(*tasks)


async def replica_seconds(count: Callable[[], Awaitable[int]], duration_s: float) -> float:
    """Add up the workers, once a second, for so long.

    Args:
        count: returns the number of workers in all phases.
    """
    clock = asyncio.get_running_loop().time
    total, before_s = 0.0, clock()
    end_s = before_s + duration_s
    while before_s < end_s:
        await asyncio.sleep(min(1.0, end_s - before_s))
        workers = await count()
        now_s = min(clock(), end_s)
        total += workers * (now_s - before_s)
        before_s = now_s
    return total


async def real_run(cluster: Cluster, trace: Trace) -> tuple[list[Outcome], float]:
    """Replay a trace; return the outcomes and the replica-hours until the last arrival."""
    state = _state(cluster.config)

    async def count() -> int:
        return await asyncio.to_thread(workers_of, state)

    counting = asyncio.create_task(replica_seconds(count, trace.duration_s))
    outcomes = await replay(cluster.address, trace)
    return outcomes, await counting / 3600


def workers_of(state: ClusterState) -> int:
    """Return the number of workers in all phases."""
    return len(explained(state).workers)


def simulated_run(trace: Trace, policy: Policy, model: LatencyModel, config: Config) -> Results:
    """Simulate the same trace."""
    workers, scaler = dict.fromkeys(Pool, 1), candidate(policy).scaler
    return evaluate(run(trace, model, workers, scaler, default_settings(config)), SLO, "bench")


def measured_model(cluster: Cluster) -> LatencyModel:
    """Return the fake engine's model with what only the real cluster tells."""
    model = fake_engine()
    idle = asyncio.run(replay(cluster.address, _idle_trace()))
    expected_s = model.prefill.seconds(200)
    steps = sorted(each.itl_s for each in idle)
    overhead_s = sorted(each.ttft_s for each in idle)[len(idle) // 2] - expected_s
    return replace(
        model,
        # asyncio's timers are late by a part of a millisecond, which a step of 3 ms shows.
        decode=replace(model.decode, base_s=steps[len(steps) // 2]),
        request_s=max(overhead_s, 0.0),
        cold_start_s=measured_start_s(_state(cluster.config)),
    )


def measured_start_s(state: ClusterState) -> float:
    """Start two more prefill workers, as the policy does, and return the seconds of the later one.

    They count from the order until the worker is ready.
    """
    scale(state, {Pool.PREFILL: 3}, progress=lambda _: None)

    def knows_them(view: AutoscaleView) -> bool:
        ready = sum(w.pool is Pool.PREFILL and w.phase is Phase.READY for w in view.workers)
        return ready == 3

    start_s = wait_for_view(state, knows_them).start_s
    assert start_s is not None, "the autoscaler has ordered them"
    return start_s


def _idle_trace() -> Trace:
    requests = [TraceRequest(1.0 + number, 200, 50) for number in range(10)]
    return Trace("idle", tuple(requests))


def _state(config: Config) -> ClusterState:
    state = read_state(config.cluster.run_path, config.cluster.name)
    assert state is not None, "the cluster runs"
    return state


def cluster_config() -> Config:
    """Return the configuration of the real cluster."""
    pool = {"engine_kind": "fake"}
    return load_config(
        None,
        {
            "cluster.name": "bench-simulation",
            "router.port": 0,
            "router.journal": False,
            "model.max_model_len": MAX_MODEL_LEN,
            **{f"{name}.{key}": value for name in Pool for key, value in pool.items()},
        },
    )


def wait_for_one_of_each(
    count: Callable[[], int],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the policy has shrunk both pools to one worker.

    Args:
        count: returns the number of workers in all phases.

    Raises:
        TimeoutError: it has not done so within ``SHRINK_TIMEOUT_S``.
    """
    until_s = clock() + SHRINK_TIMEOUT_S
    while (workers := count()) > len(Pool):
        if clock() >= until_s:
            raise TimeoutError(
                f"there are still {workers} workers after {SHRINK_TIMEOUT_S:g} s; the policy "
                "should have shrunk both pools to one worker"
            )
        sleep(1.0)


def measure(name: str, trace: Trace, cluster: Cluster, model: LatencyModel, report: Report) -> None:
    """Run one trace for real and simulated, and report both."""
    policy = parse_policy(policy_text(), "bench")
    state = _state(cluster.config)
    wait_for_one_of_each(lambda: workers_of(state))
    outcomes, hours = asyncio.run(real_run(cluster, trace))
    simulated = simulated_run(trace, policy, model, cluster.config)
    real = _shares(outcomes)
    ttft_p95_s = quantile([each.ttft_s for each in outcomes if each.ttft_s < 1e9], 0.95)
    report.add(
        trace=name,
        requests=len(outcomes),
        failed=sum(each.ttft_s > 1e9 for each in outcomes),
        attainment_ttft_real=round(real[0], 4),
        attainment_ttft_simulated=round(simulated.attainment_ttft, 4),
        attainment_itl_real=round(real[1], 4),
        attainment_itl_simulated=round(simulated.attainment_itl, 4),
        ttft_p95_ms_real=round(ttft_p95_s * 1000, 1),
        ttft_p95_ms_simulated=round(simulated.ttft_s[1] * 1000, 1),
        hours_real=round(hours, 4),
        hours_simulated=round(simulated.replica_hours, 4),
        attainment_off=round(
            100
            * max(
                abs(real[0] - simulated.attainment_ttft), abs(real[1] - simulated.attainment_itl)
            ),
            2,
        ),
        ttft_off=round(simulated.ttft_s[1] / ttft_p95_s - 1, 3),
        cold_start_s=round(model.cold_start_s, 1),
        request_ms=round(model.request_s * 1000, 1),
    )


def _shares(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    count = len(outcomes)
    return (
        sum(each.ttft_s <= SLO.ttft_s for each in outcomes) / count,
        sum(each.itl_s <= SLO.itl_s for each in outcomes) / count,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.simulation", description=__doc__)
    parser.add_argument("--trace", choices=[*traces()], help="one trace (default: all three)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the rows in this file")
    options = parser.parse_args()
    report = Report(options.json)
    with Progress(sys.stdout) as progress, Cluster(cluster_config(), progress.step) as cluster:
        progress.done()
        model = measured_model(cluster)
        apply(_state(cluster.config), policy_text())
        for name, trace in traces().items():
            if options.trace in (None, name):
                measure(name, trace, cluster, model, report)
    report.save()


if __name__ == "__main__":
    main()
