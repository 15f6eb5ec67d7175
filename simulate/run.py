"""``baton policy simulate``: replays a trace under several policies and compares them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoscale.decide import decide
from autoscale.load import check_against, load_policy
from autoscale.policy import ITL, TTFT, Policy
from core.errors import ConfigError
from core.types import Pool
from simulate.cluster import ClusterSettings, Run, Scaler, default_settings, run, with_max_tokens
from simulate.latency import LatencyModel
from simulate.latency_file import as_values, latency_model
from simulate.metrics import Results, Slo, evaluate
from simulate.report import html_report
from simulate.static import Static, StaticSearch, first_workers
from simulate.trace import Trace, TraceOptions, bursty, prepared
from simulate.trace_file import read_trace

SYNTHETIC = "synthetic"  # in place of a trace file: ``trace.bursty``
DEFAULT_SLO = Slo(ttft_s=1.0, itl_s=0.05)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy to simulate.

    ``bounds`` are its least and most workers per pool, and ``gpus`` is its budget. Both bound the
    workers at the start.
    """

    name: str
    scaler: Scaler
    slo: Slo
    bounds: Mapping[Pool, tuple[int, int]] = field(default_factory=dict)
    gpus: float = math.inf


@dataclass(frozen=True, slots=True)
class Compared:
    """One policy's run, its results, and the smallest fixed pools that attain its SLOs."""

    name: str
    slo: Slo
    run: Run
    results: Results
    static: Static | None


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """The options of the command.

    Args:
        trace: a file, or SYNTHETIC.
        model: a preset of ``simulate.latency``, or a file of ``baton policy calibrate``.
        cold_start_s: in place of the model's.
        ttft_ms: the SLO of all policies. Default: the target of the policy's TTFT signal. Without
            a TTFT signal: 1 s.
        itl_ms: the same for ITL. Without an ITL signal: 50 ms.
        max_tokens: of each request. Default: exactly the length of its answer.
        json_path: where to write the results; ``html_path``: where to write the report.
    """

    trace: str
    model: str = "8b-h100"
    replay: TraceOptions = field(default_factory=TraceOptions)
    cold_start_s: float | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None
    max_tokens: int | None = None
    json_path: Path | None = None
    html_path: Path | None = None

    def __post_init__(self) -> None:
        values = {"cold start": self.cold_start_s, "TTFT": self.ttft_ms, "ITL": self.itl_ms}
        for name, value in (*values.items(), ("max_tokens", self.max_tokens)):
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} is {value:g}; write a number above 0")


def simulate(
    trace: Trace,
    candidates: Sequence[Candidate],
    model: LatencyModel,
    settings: ClusterSettings | None = None,
) -> tuple[Compared, ...]:
    """Replay a trace under each policy, and find the fixed pools to compare with."""
    settings = settings or default_settings()
    statics: dict[Slo, Static | None] = {}
    rows = []
    for each in candidates:
        if each.slo not in statics:
            statics[each.slo] = StaticSearch(trace, model, each.slo, settings).find()
        needed = first_workers(trace, model, each.slo, max_tokens=settings.front.max_tokens)
        first = _bounded(needed, each, model.gpus)
        done = run(trace, model, first, each.scaler, settings)
        results = evaluate(done, each.slo, each.name)
        rows.append(Compared(each.name, each.slo, done, results, statics[each.slo]))
    return tuple(rows)


def candidate(policy: Policy, slo: Slo | None = None) -> Candidate:
    """Return a policy of Baton, active even if its mode is Advisory.

    Args:
        slo: in place of its own targets.
    """
    policy = policy.model_copy(update={"spec": policy.spec.model_copy(update={"mode": "Active"})})
    scaler = functools.partial(decide, policy=policy)
    bounds = {
        pool: (policy.spec.pool(pool).min_replicas, policy.spec.pool(pool).max_replicas)
        for pool in Pool
    }
    gpus = math.inf if policy.spec.budget is None else policy.spec.budget.gpus
    return Candidate(policy.metadata.name, scaler, slo or slo_of(policy), bounds, gpus)


def slo_of(policy: Policy, default: Slo = DEFAULT_SLO) -> Slo:
    """Return the SLOs that a policy keeps: its smallest TTFT and ITL targets."""
    signals = [each for pool in Pool for each in policy.spec.pool(pool).signals]
    ttft_s = [each.target_milliseconds / 1000 for each in signals if isinstance(each, TTFT)]
    itl_s = [each.target_milliseconds / 1000 for each in signals if isinstance(each, ITL)]
    return Slo(min(ttft_s, default=default.ttft_s), min(itl_s, default=default.itl_s))


def simulate_command(
    policies: Sequence[Path],
    options: SimulateOptions,
    echo: Callable[[str], None] = print,
) -> tuple[Compared, ...]:
    """Do what ``baton policy simulate`` does: print a table, and write the files asked for.

    Raises:
        ConfigError: a policy, the trace, the latency model or an option is wrong, or a file cannot
            be written.
    """
    outputs = [path for path in (options.json_path, options.html_path) if path is not None]
    for path in outputs:
        _check_writable(path)
    loaded = [load_policy(path) for path in policies]
    model = latency_model(options.model)
    for policy in loaded:
        check_against(policy, dict.fromkeys(Pool, model.gpus), can_change_role=True)
    if options.cold_start_s is not None:
        model = replace(model, cold_start_s=options.cold_start_s)
    whole = bursty() if options.trace == SYNTHETIC else read_trace(Path(options.trace))
    trace = prepared(whole, options.replay)
    rows = simulate(
        trace,
        _named([candidate(policy, _slo(policy, options)) for policy in loaded], policies),
        model,
        with_max_tokens(default_settings(), options.max_tokens),
    )
    for line in table([as_row(each) for each in rows]):
        echo(line)
    echo(f"latency model: {model.name}. {model.source}")
    if options.json_path is not None:
        text = json.dumps(as_json(trace, model, rows), indent=2, allow_nan=False)
        _write(options.json_path, text + "\n")
    if options.html_path is not None:
        page = html_report(trace, model, rows, [as_row(r) for r in rows])
        _write(options.html_path, page)
    return rows


def as_json(trace: Trace, model: LatencyModel, rows: Sequence[Compared]) -> dict[str, Any]:
    """Return what ``--json`` writes."""
    return {
        "trace": {
            "name": trace.name,
            "requests": len(trace.requests),
            "duration_s": trace.duration_s,
        },
        "latency_model": as_values(model),
        "results": [as_row(each) for each in rows],
    }


def as_row(compared: Compared) -> dict[str, Any]:
    """Return one policy's results as plain values. None: there is no such number."""
    results, slo, static = compared.results, compared.slo, compared.static
    hours = {f"replica_hours_{pool}": results.replica_hours_by_pool[pool] for pool in Pool}
    static_hours = None if static is None else static.results.replica_hours
    row: dict[str, Any] = {
        "policy": compared.name,
        "attainment_ttft": results.attainment_ttft,
        "attainment_itl": results.attainment_itl,
        "replica_hours": results.replica_hours,
        "static_replica_hours": static_hours,
        "changes": results.changes,
        "cold_starts": results.cold_starts,
        "role_changes": results.role_changes,
        "slo_ttft_ms": slo.ttft_s * 1000,
        "slo_itl_ms": slo.itl_s * 1000,
        "attainment_itl_p95": results.attainment_itl_p95,
        "attainment_by_class": {
            name: {"ttft": ttft, "itl": itl}
            for name, (ttft, itl) in results.attainment_by_class.items()
        },
        **_in_ms("ttft", results.ttft_s),
        **_in_ms("itl", results.itl_s),
        "over_target_ttft": results.over_target_ttft,
        "over_target_itl": results.over_target_itl,
        **hours,
        "static_workers": None
        if static is None
        else {str(pool): count for pool, count in static.workers.items()},
        "requests": results.requests,
        "completed": results.completed,
        "moved": results.moved,
        "preemptions": results.preemptions,
        "refused": dict(results.refused),
    }
    return {key: _rounded(value) for key, value in row.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of the most important numbers."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "policy": lambda row: str(row["policy"]),
        "TTFT met": lambda row: f"{row['attainment_ttft']:.2%}",
        "ITL met": lambda row: f"{row['attainment_itl']:.2%}",
        "TTFT p95 ms": lambda row: _or_dash(row["ttft_ms_p95"], ".0f"),
        "ITL p95 ms": lambda row: _or_dash(row["itl_ms_p95"], ".1f"),
        "replica-hours": lambda row: f"{row['replica_hours']:.2f}",
        "static": lambda row: _or_dash(row["static_replica_hours"], ".2f"),
        "of static": lambda row: _share(row["replica_hours"], row["static_replica_hours"]),
        "changes": lambda row: str(row["changes"]),
        "cold starts": lambda row: str(row["cold_starts"]),
        "refused": lambda row: str(sum(row["refused"].values())),
    }
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _bounded(
    workers: Mapping[Pool, int], candidate: Candidate, gpus_per_worker: float
) -> dict[Pool, int]:
    """Return the workers at the start, within the bounds. The budget takes from the larger pool."""
    bounds = {pool: candidate.bounds.get(pool, (0, count)) for pool, count in workers.items()}
    least = {pool: max(1, low) for pool, (low, _) in bounds.items()}
    first = {pool: max(low, min(most, workers[pool])) for pool, (low, most) in bounds.items()}
    while sum(first.values()) * gpus_per_worker > candidate.gpus:
        spare = [pool for pool in first if first[pool] > least[pool]]
        if not spare:
            break
        first[max(spare, key=lambda pool: first[pool])] -= 1
    return first


def _check_writable(path: Path) -> None:
    try:
        is_directory, has_parent = path.is_dir(), path.parent.is_dir()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    if is_directory:
        raise ConfigError(f"{path}: is a directory; write the name of a file")
    if not has_parent:
        raise ConfigError(f"{path}: {path.parent} is no directory; make it first")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _slo(policy: Policy, options: SimulateOptions) -> Slo:
    own = slo_of(policy)
    return Slo(
        own.ttft_s if options.ttft_ms is None else options.ttft_ms / 1000,
        own.itl_s if options.itl_ms is None else options.itl_ms / 1000,
    )


def _named(candidates: Sequence[Candidate], paths: Sequence[Path]) -> list[Candidate]:
    """Let policies of the same name differ by their files."""
    names = [each.name for each in candidates]
    return [
        each if names.count(each.name) == 1 else replace(each, name=f"{each.name} ({path})")
        for each, path in zip(candidates, paths, strict=True)
    ]


def _in_ms(name: str, values_s: tuple[float, float, float]) -> dict[str, float]:
    return {
        f"{name}_ms_{label}": value * 1000
        for label, value in zip(("p50", "p95", "p99"), values_s, strict=True)
    }


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return None if value != value else round(value, 6)  # NaN: no request has completed


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(hours: float, static_hours: float | None) -> str:
    return f"{hours / static_hours:.0%}" if static_hours else "-"
