"""The 2-rank process group that carries tensors between one prefill and one decode rank.

The group is made from the pair's own store, never through ``init_process_group``: that function
makes one world for all workers, and the failure of one worker would fail all others.
NCCL carries CUDA caches, gloo carries CPU caches. Rank 0 is decode, rank 1 is prefill.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store

from kv_transfer.errors import PairError
from kv_transfer.side_stream import mark, wait_done

logger = logging.getLogger(__name__)

DECODE_RANK = 0
PREFILL_RANK = 1
_TAG, _ABORT_TAG = 0, 1
_TOKEN_BYTES = 16  # too many values to guess one


def backend_for(device: torch.device) -> str:
    """Return "nccl" for CUDA caches and "gloo" for CPU caches."""
    return "nccl" if device.type == "cuda" else "gloo"


class Pair:
    """One process group. One thread uses it; any thread may call ``abort``.

    The constructor, ``send``, ``receive`` and ``PendingWork.wait`` raise PairError if the peer is
    gone or a timeout expires. The pair cannot be used after a PairError.

    Args:
        store: of this pair alone, see ``PairStore``.
        host: address on which gloo listens.
        timeout_s: bound on each wait while the group is made, apart from those at the store.
    """

    def __init__(
        self, store: Store, rank: int, device: torch.device, host: str, timeout_s: float
    ) -> None:
        self._peer = 1 - rank
        self._device = device
        self._lock = threading.Lock()
        self._aborting: threading.Thread | None = None
        self.backend = backend_for(device)
        timeout = timedelta(seconds=timeout_s)
        try:
            self._group = (
                _gloo(store, rank, host, timeout)
                if self.backend == "gloo"
                else _nccl(store, rank, device, timeout)
            )
        except RuntimeError as error:
            raise PairError(f"the pair could not be made: {_first_line(error)}") from error

    def send(self, tensor: torch.Tensor) -> PendingWork:
        """Start to send a contiguous tensor. Do not change it before the work's ``wait`` ends."""
        try:
            return PendingWork(self._group.send([tensor], self._peer, _TAG), self._device)
        except RuntimeError as error:
            raise PairError(_first_line(error)) from error

    def receive(self, buffer: torch.Tensor, elements: int) -> PendingWork:
        """Start to receive so many elements into the start of a contiguous buffer."""
        # gloo gets the whole buffer. It ends the process if a message is longer than what it got,
        # and a defective peer may announce too few elements.
        tensor = buffer if self.backend == "gloo" else buffer[:elements]
        try:
            return PendingWork(self._group.recv([tensor], self._peer, _TAG), self._device)
        except RuntimeError as error:
            raise PairError(_first_line(error)) from error

    def abort(self) -> None:
        """Start to abort the group. Its pending work fails. Any thread may call this."""
        with self._lock:
            if self._aborting is None:
                # NCCL's abort can hang, and the caller must not hang with it.
                self._aborting = threading.Thread(
                    target=self._group.abort, name="kv-abort", daemon=True
                )
                self._aborting.start()

    def wait_aborted(self, timeout_s: float) -> bool:
        """Abort the group and wait. Return False if the abort takes longer than ``timeout_s``."""
        self.abort()
        assert self._aborting is not None
        self._aborting.join(timeout_s)
        return not self._aborting.is_alive()


def close_pair(pair: Pair | None, timeout_s: float, on_stuck: Callable[[str], None]) -> None:
    """Abort a pair. Call ``on_stuck`` if the abort hangs.

    The pair's sender or receiver thread calls this as its last action.
    """
    if pair is not None and not pair.wait_aborted(timeout_s):
        reason = f"a process group could not be aborted within {timeout_s} s"
        logger.critical("%s; this worker must be replaced", reason)
        on_stuck(reason)


class PendingWork:
    """A send or receive that has started."""

    def __init__(self, work: Any, device: torch.device) -> None:
        self._work = work
        if device.type == "cuda":
            work.wait()  # returns immediately: NCCL only makes the current stream wait
        self._event = mark(device)

    def wait(self, timeout_s: float) -> None:
        """Block this thread until all bytes have moved. Raises PairError."""
        try:
            if self._event is None:
                self._work.wait(timedelta(seconds=timeout_s))
            else:
                wait_done(self._event, timeout_s)
        except RuntimeError as error:
            raise PairError(_first_line(error)) from error


class _GlooGroup:
    """A ProcessGroupGloo whose abort works."""

    def __init__(self, group: Any, peer: int) -> None:
        self.send, self.recv = group.send, group.recv
        self._peer = peer

    def abort(self) -> None:
        # gloo's own abort does nothing. A wait that times out closes the connections of the
        # group, and thereby fails every wait at both ends.
        with contextlib.suppress(RuntimeError):
            self.recv([torch.empty(1)], self._peer, _ABORT_TAG).wait(timedelta(milliseconds=1))


def _gloo(store: Store, rank: int, host: str, timeout: timedelta) -> Any:
    options: Any = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    # gloo waits for its first connection for five times the timeout that is set here. Waits for
    # messages do not use this timeout, because each has its own.
    options._timeout = timeout / 5
    options._threads = 1
    try:
        group = _GlooGroup(ProcessGroupGloo(store, rank, 2, options), 1 - rank)
        _check_peer(group, store, rank, timeout)
        return group
    finally:
        # After a failure, the traceback keeps this frame alive. Without this line, the frame keeps
        # the device, which still listens. If a connection then arrives late, the device hands it to
        # a group that no longer exists, and the process dies of SIGSEGV.
        del options


def _check_peer(group: _GlooGroup, store: Store, rank: int, timeout: timedelta) -> None:
    """Raises PairError unless the other end of the connection is the rank at the other store.

    gloo takes whoever connects first, so a stranger could get the KV.
    """
    peer = 1 - rank
    token = secrets.token_bytes(_TOKEN_BYTES)
    store.set(f"token/{rank}", token)
    received = torch.zeros(_TOKEN_BYTES, dtype=torch.uint8)
    sent = group.send([torch.tensor(list(token), dtype=torch.uint8)], peer, _TAG)
    group.recv([received], peer, _TAG).wait(timeout)
    sent.wait(timeout)
    if bytes(received.tolist()) != store.get(f"token/{peer}"):
        group.abort()
        raise PairError("the other end of the connection is not the pair's other rank")


def _nccl(store: Store, rank: int, device: torch.device, timeout: timedelta) -> Any:
    from torch.distributed import ProcessGroupNCCL  # absent from CPU builds

    # We abort a pair at our own deadlines. torch's watchdog would end the whole process instead.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Few channels: the buffers of a pair cost memory, and its kernels cost SMs that decoding needs.
    options.config.max_ctas = 4
    group = ProcessGroupNCCL(store, rank, 2, options)
    group.eager_connect_single_device(device)
    return group


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
