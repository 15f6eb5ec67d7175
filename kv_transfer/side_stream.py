"""Keeps the stream's copies in order with an engine's kernels, on a CUDA stream of their own.

On CUDA a kernel is only queued when its call returns. A thread that copies beside the engine
needs to know when what it reads was written, and when it has read it; nothing here waits for
the whole device. On CPUs a call that has returned is done, and all of this does nothing.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch

from kv_transfer.errors import PairError

_POLL_S = 1e-4  # between two looks at an event; CUDA can wait for one, but without a deadline


def mark(device: torch.device) -> torch.cuda.Event | None:
    """The work that the calling thread's current stream has been given up to now."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def wait_done(event: torch.cuda.Event | None, timeout_s: float) -> None:
    """Block this thread until marked work is done. Raises PairError after ``timeout_s``."""
    if event is None:
        return
    deadline_s = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > deadline_s:
            raise PairError(f"no progress on the device for {timeout_s} s")
        time.sleep(_POLL_S)


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """While entered, the calling thread's current stream is a new one of its own."""
    if device.type != "cuda":
        return nullcontext()
    stream: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.Stream(device))
    return stream


def after(event: torch.cuda.Event | None, device: torch.device) -> None:
    """Queue what the current stream is given from now on behind marked work."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)
