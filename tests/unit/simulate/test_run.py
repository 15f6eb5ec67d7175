"""The command's body: table, JSON and report; and the fixed pools to compare with."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from autoscale.load import load_policy, parse_policy
from core.errors import ConfigError
from core.types import Pool
from simulate.baselines import Baseline, families
from simulate.cluster import run
from simulate.latency import PRESETS
from simulate.laws import Seen
from simulate.metrics import Slo, evaluate
from simulate.run import SimulateOptions, candidate, simulate, simulate_command, slo_of
from simulate.static import StaticSearch, first_workers
from simulate.trace import TraceOptions, bursty, prepared

POLICIES = Path(__file__).resolve().parents[3] / "deploy" / "policies"
MODEL = replace(PRESETS["8b-h100"], cold_start_s=15.0)
SLO = Slo(ttft_s=0.5, itl_s=0.02)
SMALL = bursty(duration_s=45, base_per_s=6, burst_per_s=50, calm_s=15, burst_s=8)
# Forecasts need more than a minute to see the load change.
LONGER = bursty(duration_s=90, base_per_s=6, burst_per_s=50, calm_s=40, burst_s=12)


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "t.csv"
    lines = [
        f"{each.arrival_s},{each.prompt_tokens},{each.output_tokens}" for each in SMALL.requests
    ]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines))
    return path


def test_the_command_prints_a_table_and_writes_both_files(trace_file: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = SimulateOptions(
        str(trace_file),
        replay=TraceOptions(duration_s=40),
        cold_start_s=15,
        ttft_ms=500,
        json_path=tmp_path / "out.json",
        html_path=tmp_path / "out.html",
    )
    names = ["chat", "bursty"]
    simulate_command([POLICIES / f"{name}.yaml" for name in names], options, lines.append)
    assert [line.split()[0] for line in lines[1:3]] == names
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["policy"] for row in results] == names
    for row in results:
        assert 0 <= row["attainment_ttft"] <= 1
        assert 0 <= row["attainment_itl"] <= 1
        assert row["replica_hours"] > 0
        assert row["static_replica_hours"] > 0
        assert row["changes"] >= row["cold_starts"] >= 0
        assert row["slo_ttft_ms"] == 500
    page = (tmp_path / "out.html").read_text()
    assert "bursty" in page
    assert page.count("<svg") == 1
    # Nothing is loaded: no script, no image, and only links to parts of the page.
    assert not re.search(r"<(?:script|img|link|iframe)|@import|url\((?!#)|src=", page)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', page))


def test_a_wrong_option_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        simulate_command([POLICIES / "chat.yaml"], SimulateOptions(str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match="TTFT is -5; write a number above 0"):
        SimulateOptions("synthetic", ttft_ms=-5)
    with pytest.raises(ConfigError, match="no latency model"):
        simulate_command([POLICIES / "chat.yaml"], SimulateOptions("synthetic", model="none"))


def test_files_that_cannot_be_written_are_an_error_before_anything_runs(tmp_path: Path) -> None:
    for path, complaint in (
        (tmp_path, "is a directory; write the name of a file"),
        (tmp_path / "none" / "out", "none is no directory; make it first"),
        (tmp_path / ("a" * 300) / "out", "out: cannot be written: File name too long"),
    ):
        missing = str(tmp_path / "missing")
        for options in (
            SimulateOptions(missing, json_path=path),
            SimulateOptions(missing, html_path=path),
        ):
            with pytest.raises(ConfigError, match=complaint):
                simulate_command([POLICIES / "chat.yaml"], options)


def test_a_file_that_fails_to_be_written_is_an_error(trace_file: Path, tmp_path: Path) -> None:
    options = SimulateOptions(
        str(trace_file), replay=TraceOptions(duration_s=1), json_path=tmp_path / ("a" * 300)
    )
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        simulate_command([POLICIES / "chat.yaml"], options, lambda _line: None)


def test_an_advisory_policy_is_simulated_as_if_it_were_active() -> None:
    active = load_policy(POLICIES / "chat.yaml")
    advisory = active.model_copy(
        update={"spec": active.spec.model_copy(update={"mode": "Advisory"})}
    )
    done = [
        run(LONGER, MODEL, dict.fromkeys(Pool, 1), candidate(each).scaler)
        for each in (active, advisory)
    ]
    assert sum(done[1].changes.values()) > 0
    assert done[0].decisions == done[1].decisions


def test_the_workers_at_the_start_are_within_the_budget() -> None:
    text = (POLICIES / "chat.yaml").read_text() + "  budget: {gpus: 3}\n"
    bounded = candidate(parse_policy(text, "chat.yaml"), SLO)
    fast = prepared(SMALL, TraceOptions(duration_s=16, speed=8))
    assert sum(first_workers(fast, MODEL, SLO).values()) > 3
    (row,) = simulate(fast, [bounded], MODEL)
    assert sum(row.run.samples[0].ordered) == 3
    assert min(row.run.samples[0].ordered) >= 1


def test_requests_that_are_refused_as_too_long_need_no_workers() -> None:
    long = replace(SMALL.requests[0], prompt_tokens=MODEL.kv.decode_tokens)
    mixed = replace(SMALL, requests=(*[long] * 1000, *SMALL.requests))
    assert first_workers(mixed, MODEL, SLO) == first_workers(SMALL, MODEL, SLO)
    only = replace(SMALL, requests=(long,))
    assert first_workers(only, MODEL, SLO) == {Pool.PREFILL: 1, Pool.DECODE: 1}
    assert StaticSearch(only, MODEL, SLO).find() is None


def test_the_slos_are_those_of_the_policy() -> None:
    slo = slo_of(load_policy(POLICIES / "chat.yaml"))
    assert (slo.ttft_s, slo.itl_s) == (1.0, 0.05)


def test_no_smaller_fixed_pools_attain_the_slos() -> None:
    search = StaticSearch(SMALL, MODEL, SLO)
    static = search.find()
    assert static is not None
    prefill, decode = static.workers[Pool.PREFILL], static.workers[Pool.DECODE]
    assert static.results.attainment >= 0.99
    assert static.results.replica_hours == pytest.approx(
        (prefill + decode) * SMALL.duration_s / 3600
    )
    for smaller in ((prefill - 1, decode), (prefill, decode - 1)):
        if min(smaller) > 0:
            assert search.results(*smaller).attainment < 0.99


def test_slos_that_no_pools_attain() -> None:
    assert StaticSearch(SMALL, MODEL, Slo(1e-3, 1e-3)).find() is None


def test_each_baseline_runs_and_scales() -> None:
    for family in families(MODEL, SLO.itl_s):
        label, scaler = next(iter(family.variants.items()))
        results = evaluate(run(LONGER, MODEL, dict.fromkeys(Pool, 1), scaler), SLO, label)
        assert results.changes > 0, family.name
        assert results.completed > 0, family.name
        assert results.requests == len(LONGER.requests)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A law that keeps a number of workers."""

    workers: int

    def decide(self, seen: Seen, memory: Any) -> tuple[int, Any]:
        return self.workers, None


def test_a_baseline_brings_the_pools_to_the_numbers_of_its_laws_and_rests() -> None:
    scaler = Baseline({Pool.PREFILL: Fixed(3), Pool.DECODE: Fixed(2)}, MODEL, itl_s=1.0)
    done = run(SMALL, MODEL, {Pool.PREFILL: 1, Pool.DECODE: 4}, scaler)
    assert done.samples[-1].ordered == (3, 2)
    assert sum(done.changes.values()) == 4
