"""Waits for a condition or for a time. No other test module calls ``sleep`` in real time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_LOOK_EVERY_S = 0.02


def wait_until(look: Callable[[], T], *, what: str, within_s: float = 10.0) -> T:
    """Call ``look`` until it returns a true value. Return this value.

    Raises:
        AssertionError: ``look`` returned no true value within ``within_s`` seconds. The message
            names ``what`` and the last value.
    """
    deadline_s = time.monotonic() + within_s
    while not (value := look()):
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what} (last: {value!r})"
        time.sleep(_LOOK_EVERY_S)
    return value


def let_pass(seconds: float) -> None:
    """Sleep while a fault lasts. Use ``wait_until`` to wait for a condition."""
    time.sleep(seconds)


async def until(look: Callable[[], T], *, what: str, within_s: float = 10.0) -> T:
    """Do what ``wait_until`` does, without blocking the event loop."""
    deadline_s = time.monotonic() + within_s
    while not (value := look()):
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what} (last: {value!r})"
        await asyncio.sleep(_LOOK_EVERY_S)
    return value


async def until_awaited(
    look: Callable[[], Awaitable[T]], *, what: str, within_s: float = 10.0
) -> T:
    """Do what ``until`` does, for a ``look`` that must be awaited."""
    deadline_s = time.monotonic() + within_s
    while not (value := await look()):
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what} (last: {value!r})"
        await asyncio.sleep(_LOOK_EVERY_S)
    return value
