"""The doorbell, which wakes an engine core that only waits for KV."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from uuid import uuid4

import pytest

from kv_transfer.doorbell import Doorbell, DoorbellButton

LONG_S = 30.0  # longer than the time limit of the tests that use it


@pytest.fixture
def name() -> str:
    return uuid4().hex


@pytest.mark.timeout(10)
def test_a_ring_ends_the_wait(name: str) -> None:
    with closing(Doorbell(name)) as bell, closing(DoorbellButton(name)) as button:
        thread = threading.Timer(0.02, button.ring)
        thread.start()
        bell.wait(LONG_S)
        thread.join()


@pytest.mark.timeout(10)
def test_rings_before_the_wait_count_once(name: str) -> None:
    with closing(Doorbell(name)) as bell, closing(DoorbellButton(name)) as button:
        for _ in range(5000):  # more rings than the socket holds; no ring may block
            button.ring()
        bell.wait(LONG_S)
        began_s = time.monotonic()
        bell.wait(0.05)
        assert time.monotonic() - began_s >= 0.05


def test_ringing_without_a_listener_is_harmless(name: str) -> None:
    with closing(DoorbellButton(name)) as button:
        button.ring()
        Doorbell(name).close()
        button.ring()
