"""The nap of an engine core that only waits for KV."""

from __future__ import annotations

import threading
import time
from uuid import uuid4

import pytest

from kv_transfer.doorbell import Doorbell, DoorbellButton

LONG_S = 30.0  # a nap that nobody ends would fail the test by its own time limit


@pytest.fixture
def name() -> str:
    return uuid4().hex


@pytest.mark.timeout(10)
def test_a_ring_ends_the_nap(name: str) -> None:
    bell = Doorbell(name)
    thread = threading.Timer(0.02, DoorbellButton(name).ring)
    thread.start()
    bell.nap(LONG_S)
    thread.join()
    bell.close()


@pytest.mark.timeout(10)
def test_rings_before_the_nap_count_once(name: str) -> None:
    bell = Doorbell(name)
    button = DoorbellButton(name)
    for _ in range(5000):  # more than the socket holds: none of them blocks
        button.ring()
    bell.nap(LONG_S)
    began_s = time.monotonic()
    bell.nap(0.05)
    assert time.monotonic() - began_s >= 0.05
    bell.close()


def test_ringing_where_nobody_listens_is_harmless(name: str) -> None:
    button = DoorbellButton(name)
    button.ring()
    bell = Doorbell(name)
    bell.close()
    button.ring()
