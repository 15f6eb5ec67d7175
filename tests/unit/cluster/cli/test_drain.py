"""``baton drain`` asks until the worker drains, and returns when it has left."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from cluster.cli.drain import drain
from cluster.local.run_dir import ClusterState
from core.errors import ConfigError
from core.state.registry import MemoryRegistry
from core.types import WorkerState
from tests.support.registry_rules import DECODE
from tests.unit.cluster.cli.test_status import STATE


class Store(MemoryRegistry):
    """Takes the place of ``Store``, and of the registry that it opens. There is one worker.

    Args:
        answers: the worker's state after each request to drain; None: it has left.
    """

    def __init__(self, *answers: WorkerState | None) -> None:
        super().__init__(lease_s=3600)
        self._answers = iter(answers)
        self.asked = 0
        asyncio.run(self.put(DECODE))

    @property
    def cluster(self) -> ClusterState:
        store: Any = self
        return replace(STATE, store=store, start_timeout_s=10)

    def registry(self) -> MemoryRegistry:
        return self

    async def ask_to_drain(self, worker_id: str) -> None:
        assert worker_id == DECODE.id
        self.asked += 1
        state = next(self._answers)
        if state is None:
            await self.remove(worker_id)
        else:
            await self.put(replace(DECODE, state=state))


def test_a_request_that_is_lost_is_made_again() -> None:
    store = Store(WorkerState.READY, None)
    drain(store.cluster, DECODE.id, lambda _line: None)
    assert store.asked == 2


def test_a_worker_that_drains_is_not_asked_again() -> None:
    store = Store(WorkerState.DRAINING)
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            asyncio.run(store.remove(DECODE.id))

    drain(store.cluster, DECODE.id, progress)
    assert lines == 2 * [f"{DECODE.id} is draining, 0 requests still run"]
    assert store.asked == 1


def test_an_unknown_worker_is_named_with_those_that_there_are() -> None:
    store = Store()
    with pytest.raises(ConfigError, match=r"no worker 'x' in .*; its workers: decode-1"):
        drain(store.cluster, "x", lambda _line: None)
    assert store.asked == 0
