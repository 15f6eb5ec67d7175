"""Draining: the order of the steps, a step that fails, and a call that hangs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from cluster.local.draining import Drainer
from cluster.local.signals import NeverStop


@dataclass
class FakeRuntime:
    """Records the calls. ``drain_router`` raises ``error`` or waits for ``release``, if given."""

    alive: bool = True
    error: Exception | None = None
    release: threading.Event | None = None
    calls: list[str] = field(default_factory=list)

    def is_alive(self) -> bool:
        return self.alive

    def drain_router(self, grace_s: float) -> None:
        self.calls.append("drain_router")
        if self.error is not None:
            raise self.error
        if self.release is not None:
            self.release.wait(10)

    def delete(self, timeout_s: float) -> bool:
        self.calls.append("delete")
        return True


class Hurry:
    """A signal that came twice."""

    requested = True
    hurry = True


@pytest.mark.parametrize(
    ("alive", "calls"), [(True, ["drain_router", "delete"]), (False, ["drain_router"])]
)
def test_the_router_is_drained_before_the_workers(alive: bool, calls: list[str]) -> None:
    runtime = FakeRuntime(alive=alive)
    drainer = Drainer(lambda _line: None)
    drainer.drain(runtime, 5.0, NeverStop())
    assert runtime.calls == calls
    assert not drainer.has_abandoned_call


def test_a_step_that_fails_is_reported_and_the_next_one_runs() -> None:
    lines: list[str] = []
    runtime = FakeRuntime(error=RuntimeError("no controller"))
    Drainer(lines.append).drain(runtime, 5.0, NeverStop())
    assert runtime.calls == ["drain_router", "delete"]
    assert lines == [
        "draining",
        "draining failed: RuntimeError: no controller",
        "stopping the workers",
    ]


def test_a_call_that_hangs_is_abandoned_on_hurry() -> None:
    release = threading.Event()
    runtime = FakeRuntime(alive=False, release=release)
    drainer = Drainer(lambda _line: None)
    try:
        drainer.drain(runtime, 60.0, Hurry())
        assert drainer.has_abandoned_call
    finally:
        release.set()
