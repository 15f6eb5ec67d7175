"""What ``bench.simulation`` counts of the real run, and that its waits end."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from bench import simulation
from simulate.trace import Trace, TraceRequest
from tests.support.virtual_time import elapse, run_virtually


def test_hours_count_until_the_last_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the simulation, although the last answers take longer."""
    view = SimpleNamespace(workers=("prefill", "decode", "decode"))

    async def replay(address: str, trace: Trace) -> list[simulation.Outcome]:
        await elapse(100.0)
        return []

    monkeypatch.setattr(simulation, "replay", replay)
    monkeypatch.setattr(simulation, "explained", lambda _state: view)
    monkeypatch.setattr(simulation, "_state", lambda _config: None)
    cluster: Any = SimpleNamespace(config=None, address="")
    trace = Trace("t", (TraceRequest(0.0, 1, 1), TraceRequest(7.5, 1, 1)))
    _, hours = run_virtually(simulation.real_run(cluster, trace), seed=1)
    assert hours == pytest.approx(3 * 7.5 / 3600)


def test_the_wait_for_small_pools_ends_with_an_error() -> None:
    times_s = itertools.count(0.0, 10.0)
    with pytest.raises(TimeoutError, match="there are still 5 workers after 180 s; the policy"):
        simulation.wait_for_one_of_each(
            lambda: 5, clock=lambda: next(times_s), sleep=lambda _seconds: None
        )


def test_the_wait_for_small_pools_ends_when_they_are_small() -> None:
    workers = iter((4, 3, 2))
    simulation.wait_for_one_of_each(
        lambda: next(workers), clock=lambda: 0.0, sleep=lambda _seconds: None
    )
    assert not list(workers)
