"""This module orders KV copies after the engine's kernels, with CUDA streams and events.

A CUDA call returns when its kernel is queued, not when the kernel is done. A thread that copies KV
while the engine runs therefore needs to know two times: when the engine has written the KV, and
when the thread's own copy is done. No function here waits for the whole device. On CPUs a call
returns when its work is done, so all functions here do nothing.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch

from kv_transfer.errors import PairError

# Pause between two checks of an event. CUDA's own wait for an event has no deadline.
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
    """During the ``with`` block, the calling thread's current stream is a new CUDA stream."""
    if device.type != "cuda":
        return nullcontext()
    stream: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.Stream(device))
    return stream


def queue_after(event: torch.cuda.Event | None, device: torch.device) -> None:
    """Make all later work of the calling thread's current stream run after the marked work."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)
