"""Fixtures of the KV stream's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.kv_faults import kv_threads
from tests.support.waiting import wait_until


@pytest.fixture
def all_threads_end() -> Iterator[None]:
    """Check that no thread of the stream outlives the test."""
    before = kv_threads()
    yield
    wait_until(lambda: not kv_threads() - before, what="all threads of the stream have ended")
