"""Waiting for conditions, the one place in the tests that looks again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_LOOK_EVERY_S = 0.02


def wait_until(look: Callable[[], T], *, what: str, within_s: float = 10.0) -> T:
    """The first true value that ``look`` returns.

    Raises:
        AssertionError: there was none ``within_s`` seconds; it says ``what`` and the last value.
    """
    deadline_s = time.monotonic() + within_s
    while not (value := look()):
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what} (last: {value!r})"
        time.sleep(_LOOK_EVERY_S)
    return value


def let_pass(seconds: float) -> None:
    """For what lasts so long by itself, such as a fault; never for what might happen meanwhile."""
    time.sleep(seconds)


async def until(look: Callable[[], T], *, what: str, within_s: float = 10.0) -> T:
    """``wait_until`` for a test that shares its event loop with what it waits for."""
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
