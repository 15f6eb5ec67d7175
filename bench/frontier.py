"""Compares autoscaling policies in the simulator: attainment of the SLOs against worker-hours.

Each row is a policy on a trace with a cold start:

hours       replica-hours, from the order to start a worker until it is gone
of_static   hours / those of the smallest fixed pools that attain both SLOs for 99% of the requests
ttft, itl   share of the requests whose TTFT and mean ITL meet the SLO
setting     the best of a small grid of targets, which is the one with the fewest hours that
            attains 99%, or else the one that attains most

The goal: a policy of Baton attains 99% of both at 70% of static, with 20% fewer hours than the best
other one that attains 99%. ``saving`` says how many fewer.

All policies may use 64 workers of each pool, start with the same workers, and keep the SLOs of the
case. Ours is the ready policy for chat with the targets of its grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import simulate
from autoscale.load import load_policy
from autoscale.policy import (
    ITL,
    TTFT,
    KVUtilization,
    Policy,
    QueueSeconds,
    ScalingPolicy,
    Utilization,
)
from bench.report import Report
from core.types import Pool
from simulate.baselines import MOST, families
from simulate.cluster import Scaler, run
from simulate.latency import PRESETS, LatencyModel
from simulate.metrics import Results, Slo, evaluate
from simulate.run import candidate
from simulate.static import ATTAINMENT, StaticSearch, first_workers
from simulate.trace import Trace, TraceOptions, bursty, day, prepared
from simulate.trace_file import read_trace

ROOT = Path(__file__).resolve().parents[1]
TRACES = Path(simulate.__file__).parent / "traces"
CHAT = ROOT / "deploy" / "policies" / "chat.yaml"
OURS = "baton"


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of one policy of Baton's grid."""

    busy: float  # of the prefill workers' time
    kv: float  # of the decode workers' KV room
    queue: float  # seconds of work that wait or run, as a share of the TTFT objective
    window_s: int  # before a scale-down

    def __str__(self) -> str:
        return (
            f"busy {self.busy:.0%}, KV {self.kv:.0%}, queue {self.queue:.0%} of TTFT, "
            f"window {self.window_s} s"
        )


GRID = {
    str(each): each
    for each in (
        Targets(0.7, 0.8, 0.5, 300),
        Targets(0.8, 0.8, 0.5, 120),
        Targets(0.9, 0.9, 0.33, 60),
        Targets(1.0, 0.9, 0.33, 30),
        Targets(0.8, 0.9, 1.0, 300),
        Targets(0.8, 0.9, 1.0, 1200),  # longer than the time between two bursts
        Targets(0.8, 1.0, 1.0, 1200),
    )
}
STATIC = "static"

ONE_BY_ONE = {"type": "Pods", "value": 1, "periodSeconds": 15}


@dataclass(frozen=True, slots=True)
class Case:
    """A trace, the model that serves it, and its SLOs."""

    load: Callable[[], Trace]
    model: str
    slo: Slo
    copies: int = 1


CASES: Mapping[str, Case] = {
    "azure": Case(
        lambda: read_trace(TRACES / "AzureLLMInferenceTrace_conv.csv.gz"),
        "8b-a10",
        Slo(ttft_s=2.0, itl_s=0.06),
        copies=2,
    ),
    # Mooncake's own SLOs are a TTFT of 30 s and 0.1 to 0.3 s between tokens.
    "mooncake": Case(
        lambda: read_trace(TRACES / "mooncake_synthetic_trace.jsonl.gz"),
        "8b-h100",
        Slo(ttft_s=30.0, itl_s=0.1),
    ),
    # The longest hundredth of the prompts takes 2 s on an idle worker.
    "day": Case(day, "8b-a10", Slo(ttft_s=5.0, itl_s=0.06)),
    "bursty": Case(
        lambda: bursty(base_per_s=4, burst_per_s=16, calm_s=240, burst_s=60),
        "8b-a10",
        Slo(ttft_s=5.0, itl_s=0.06),
    ),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One simulation, or the search for the fixed pools. Small, to be sent to a process."""

    case: str
    cold_start_s: float
    duration_s: float
    family: str
    setting: str  # one of the family's grid

    def trace(self) -> Trace:
        case = CASES[self.case]
        return prepared(case.load(), TraceOptions(duration_s=self.duration_s, copies=case.copies))

    def model(self) -> LatencyModel:
        return replace(PRESETS[CASES[self.case].model], cold_start_s=self.cold_start_s)


def ours(setting: str, slo: Slo) -> Policy:
    """Return the ready policy for chat with the objectives of the case and targets of the grid."""
    grid = GRID[setting]
    policy = load_policy(CHAT)
    targets: dict[type, dict[str, float]] = {
        Utilization: {"target": grid.busy},
        KVUtilization: {"target": grid.kv},
        QueueSeconds: {"target": grid.queue * slo.ttft_s},
        TTFT: {"target_milliseconds": 1000 * slo.ttft_s},
        ITL: {"target_milliseconds": 1000 * slo.itl_s},
    }
    pools = {}
    for pool in Pool:
        own = policy.spec.pool(pool)
        down = own.behavior.scale_down.model_copy(
            update={
                "stabilization_window_seconds": grid.window_s,
                "max_utilization": max(grid.busy, 0.8),
                "policies": (ScalingPolicy.model_validate(ONE_BY_ONE),),
            }
        )
        pools[pool.value] = own.model_copy(
            update={
                "max_replicas": MOST,
                "signals": tuple(
                    each.model_copy(update=targets.get(type(each), {})) for each in own.signals
                ),
                "behavior": own.behavior.model_copy(update={"scale_down": down}),
            }
        )
    return policy.model_copy(update={"spec": policy.spec.model_copy(update=pools)})


def do(job: Job) -> tuple[Job, Results | None]:
    """Simulate. None: no fixed pools attain the SLOs."""
    trace, model, slo = job.trace(), job.model(), CASES[job.case].slo
    if job.family == STATIC:
        static = StaticSearch(trace, model, slo).find()
        return job, None if static is None else static.results
    first = first_workers(trace, model, slo)
    scaler: Scaler
    if job.family == OURS:
        scaler = candidate(ours(job.setting, slo)).scaler
    else:
        (family,) = (each for each in families(model, slo.itl_s) if each.name == job.family)
        scaler = family.variants[job.setting]
    return job, evaluate(run(trace, model, first, scaler), slo, job.setting)


def jobs_of(case: str, cold_start_s: float, duration_s: float) -> list[Job]:
    """Return the simulations of one case, but for the fixed pools, which start nothing."""
    model = replace(PRESETS[CASES[case].model], cold_start_s=cold_start_s)
    names = [(OURS, setting) for setting in GRID]
    names += [
        (family.name, setting)
        for family in families(model, CASES[case].slo.itl_s)
        for setting in family.variants
    ]
    return [Job(case, cold_start_s, duration_s, *name) for name in names]


def best(found: Sequence[Results]) -> Results:
    """Return the results with the fewest hours that attain 99%, or else the highest attainment."""
    attaining = [each for each in found if each.attainment >= ATTAINMENT]
    if attaining:
        return min(attaining, key=lambda each: each.replica_hours)
    return max(found, key=lambda each: each.attainment)


def add_rows(
    report: Report, static: Results | None, found: Sequence[tuple[Job, Results | None]]
) -> None:
    """Add the rows of one case with one cold start."""
    job = found[0][0]
    by_family: dict[str, list[Results]] = {} if static is None else {STATIC: [static]}
    for each, results in found:
        if results is not None:
            by_family.setdefault(each.family, []).append(results)
    rows = {family: best(results) for family, results in by_family.items()}
    others = [
        each.replica_hours
        for family, each in rows.items()
        if family not in (OURS, STATIC) and each.attainment >= ATTAINMENT
    ]
    for family, row in rows.items():
        attains = row.attainment >= ATTAINMENT and family == OURS
        saving = 1 - row.replica_hours / min(others) if attains and others else None
        of_static = None if static is None else row.replica_hours / static.replica_hours
        report.add(
            trace=job.case,
            cold_start_s=job.cold_start_s,
            policy=family,
            setting=row.policy,
            ttft=round(row.attainment_ttft, 4),
            itl=round(row.attainment_itl, 4),
            hours=round(row.replica_hours, 2),
            of_static=None if of_static is None else round(of_static, 3),
            saving=None if saving is None else round(saving, 3),
            changes=row.changes,
            cold_starts=row.cold_starts,
            refused=sum(row.refused.values()),
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.frontier", description=__doc__)
    parser.add_argument("--traces", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--cold-starts", nargs="+", type=float, default=[15, 60, 120], metavar="S")
    parser.add_argument(
        "--duration-s", type=float, default=1e9, help="of each trace; default: all of it"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="save the rows in this file")
    args = parser.parse_args()
    report = Report(args.json)
    with ProcessPoolExecutor(args.jobs) as pool:
        for case in args.traces:
            static = pool.submit(do, Job(case, args.cold_starts[0], args.duration_s, STATIC, ""))
            for cold_start_s in args.cold_starts:
                jobs = jobs_of(case, cold_start_s, args.duration_s)
                found = list(pool.map(do, jobs))
                add_rows(report, static.result()[1], found)
    report.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
