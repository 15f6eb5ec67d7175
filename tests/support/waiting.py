"""Waiting for conditions. No other module of the tests polls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_LOOK_EVERY_S = 0.02


def wait_until(look: Callable[[], T], *, what: str, within_s: float = 10.0) -> T:
    """Call ``look`` until it returns a true value, and return that.

    Raises:
        AssertionError: not within ``within_s`` seconds. It names ``what`` and the last value.
    """
    deadline_s = time.monotonic() + within_s
    while not (value := look()):
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what} (last: {value!r})"
        time.sleep(_LOOK_EVERY_S)
    return value


def let_pass(seconds: float) -> None:
    """Sleep, for a fault that lasts this long. Use ``wait_until`` to wait for a condition."""
    time.sleep(seconds)


async def until(look: Callable[[], T], *, what: str, within_s: float = 10.0) -> T:
    """``wait_until`` for a test in an event loop."""
    deadline_s = time.monotonic() + within_s
    while not (value := look()):
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what} (last: {value!r})"
        await asyncio.sleep(_LOOK_EVERY_S)
    return value


async def until_awaited(
    look: Callable[[], Awaitable[T]], *, what: str, within_s: float = 10.0
) -> T:
    """``until`` for a condition that must be awaited."""
    deadline_s = time.monotonic() + within_s
    while not (value := await look()):
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what} (last: {value!r})"
        await asyncio.sleep(_LOOK_EVERY_S)
    return value
