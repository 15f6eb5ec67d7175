"""The nap of an engine core that only waits for KV."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from uuid import uuid4

import pytest

from kv_transfer.doorbell import Doorbell, DoorbellButton

LONG_S = 30.0  # a nap that nobody ends would fail the test by its own time limit


@pytest.fixture
def name() -> str:
    return uuid4().hex


@pytest.mark.timeout(10)
def test_a_ring_ends_the_nap(name: str) -> None:
    with closing(Doorbell(name)) as bell, closing(DoorbellButton(name)) as button:
        thread = threading.Timer(0.02, button.ring)
        thread.start()
        bell.nap(LONG_S)
        thread.join()


@pytest.mark.timeout(10)
def test_rings_before_the_nap_count_once(name: str) -> None:
    with closing(Doorbell(name)) as bell, closing(DoorbellButton(name)) as button:
        for _ in range(5000):  # more than the socket holds: none of them blocks
            button.ring()
        bell.nap(LONG_S)
        began_s = time.monotonic()
        bell.nap(0.05)
        assert time.monotonic() - began_s >= 0.05


def test_ringing_where_nobody_listens_is_harmless(name: str) -> None:
    with closing(DoorbellButton(name)) as button:
        button.ring()
        Doorbell(name).close()
        button.ring()
