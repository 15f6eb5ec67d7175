"""Keeps the stream's copies in order with an engine's kernels, on a CUDA stream of their own.

On CUDA a call returns when its kernel is queued. A thread that copies beside the engine must know
when the memory that it reads has been written, and when it has read it. Nothing here waits for the
whole device. On CPUs a call has finished when it returns, so all functions here do nothing.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch

from kv_transfer.errors import PairError

# Pause between two checks of an event. CUDA can wait for an event, but without a deadline.
_POLL_S = 1e-4


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Return an event for all work queued so far on the calling thread's current stream."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def wait_done(event: torch.cuda.Event | None, timeout_s: float) -> None:
    """Block this thread until the marked work is done. Raises PairError after ``timeout_s``."""
    if event is None:
        return
    deadline_s = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > deadline_s:
            raise PairError(f"no progress on the device for {timeout_s} s")
        time.sleep(_POLL_S)


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """Give the calling thread a new current stream of its own while entered."""
    if device.type != "cuda":
        return nullcontext()
    stream: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.Stream(device))
    return stream


def queue_after(event: torch.cuda.Event | None, device: torch.device) -> None:
    """Queue all later work of the current stream behind the marked work."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)
