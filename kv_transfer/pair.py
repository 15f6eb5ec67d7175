"""The 2-rank process group that carries tensors between one prefill and one decode rank.

Made straight from a TCPStore that the decode side hosts, never through ``init_process_group``:
one world for all would tie every worker's life to every other's. NCCL carries CUDA caches, gloo
carries CPU caches. Rank 0 is decode, rank 1 is prefill.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

from kv_transfer.errors import PairError
from kv_transfer.side_stream import mark, wait_done

logger = logging.getLogger(__name__)

DECODE_RANK = 0
PREFILL_RANK = 1
_TAG, _ABORT_TAG = 0, 1


def backend_for(device: torch.device) -> str:
    """ "nccl" for CUDA caches, "gloo" for CPU caches."""
    return "nccl" if device.type == "cuda" else "gloo"


def host_store(host: str, timeout_s: float) -> TCPStore:
    """A TCPStore server that listens on ``host`` only (its own bind would take all interfaces)."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        None,
        True,
        timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=True,
    )


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Raises PairError if the store cannot be reached in time."""
    try:
        return TCPStore(
            host,
            port,
            None,
            False,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            use_libuv=True,
        )
    except RuntimeError as error:  # DistError and its subclasses
        raise PairError(f"cannot reach the store at {host}:{port}: {error}") from error


class Pair:
    """One process group. Used by one thread; ``abort`` may be called from any.

    Raises PairError when the peer is gone or a wait passes its timeout; the pair is then broken
    for good.
    """

    def __init__(
        self, store: Store, pair_id: str, rank: int, device: torch.device, host: str,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self._peer = 1 - rank
        self._device = device
        self._lock = threading.Lock()
        self._aborting: threading.Thread | None = None
        self.backend = backend_for(device)
        prefixed = PrefixStore(pair_id, store)
        timeout = timedelta(seconds=timeout_s)
        try:
            self._group = (
                _gloo(prefixed, rank, host, timeout)
                if self.backend == "gloo"
                else _nccl(prefixed, rank, device, timeout)
            )
        except RuntimeError as error:
            raise PairError(f"pair {pair_id}: {_first_line(error)}") from error

    def send(self, tensor: torch.Tensor) -> PendingWork:
        """Start sending a contiguous tensor; it must stay untouched until ``wait`` returns."""
        try:
            return PendingWork(self._group.send([tensor], self._peer, _TAG), self._device)
        except RuntimeError as error:
            raise PairError(_first_line(error)) from error

    def receive(self, tensor: torch.Tensor) -> PendingWork:
        """Start receiving into a contiguous tensor."""
        try:
            return PendingWork(self._group.recv([tensor], self._peer, _TAG), self._device)
        except RuntimeError as error:
            raise PairError(_first_line(error)) from error

    def abort(self) -> None:
        """Begin to give the group up: pending work of other threads fails. From any thread."""
        with self._lock:
            if self._aborting is None:
                # NCCL's abort can hang; whoever calls this must not.
                self._aborting = threading.Thread(
                    target=self._group.abort, name="kv-abort", daemon=True
                )
                self._aborting.start()

    def aborted(self, timeout_s: float) -> bool:
        """Wait for the end of an ``abort``; False if it hangs."""
        self.abort()
        assert self._aborting is not None
        self._aborting.join(timeout_s)
        return not self._aborting.is_alive()


def close_pair(pair: Pair | None, timeout_s: float, on_stuck: Callable[[str], None]) -> None:
    """End a pair, at the end of the thread that used it; ``on_stuck`` if that does not work."""
    if pair is not None and not pair.aborted(timeout_s):
        reason = f"a process group could not be aborted within {timeout_s} s"
        logger.critical("%s; this worker must be replaced", reason)
        on_stuck(reason)


class PendingWork:
    """A send or receive under way."""

    def __init__(self, work: Any, device: torch.device) -> None:
        self._work = work
        if device.type == "cuda":
            work.wait()  # of NCCL: puts the current stream behind the transfer, and returns
        self._event = mark(device)

    def wait(self, timeout_s: float) -> None:
        """Block this thread until the bytes have moved. Raises PairError."""
        try:
            if self._event is None:
                self._work.wait(timedelta(seconds=timeout_s))
            else:
                wait_done(self._event, timeout_s)
        except RuntimeError as error:
            raise PairError(_first_line(error)) from error


class _GlooGroup:
    """A ProcessGroupGloo with an abort that works."""

    def __init__(self, group: Any, peer: int) -> None:
        self.send, self.recv = group.send, group.recv
        self._peer = peer

    def abort(self) -> None:
        # gloo's own does nothing. But a wait that times out closes the connections of the group,
        # and so fails whatever waits at either end.
        with contextlib.suppress(RuntimeError):
            self.recv([torch.empty(1)], self._peer, _ABORT_TAG).wait(timedelta(milliseconds=1))


def _gloo(store: Store, rank: int, host: str, timeout: timedelta) -> Any:
    # Both are here before either begins: gloo's own patience is shorter than ours.
    store.set(f"here/{rank}", "yes")
    store.wait([f"here/{1 - rank}"], timeout)
    options: Any = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    # It waits five times as long for a first connection; the waits for messages have their own.
    options._timeout = timeout / 5
    options._threads = 1
    try:
        return _GlooGroup(ProcessGroupGloo(store, rank, 2, options), 1 - rank)
    finally:
        # If it failed, then the traceback holds this frame, which would hold the device; and a
        # device that still listens leads a late call to connections that are no more: SIGSEGV.
        del options


def _nccl(store: Store, rank: int, device: torch.device, timeout: timedelta) -> Any:
    from torch.distributed import ProcessGroupNCCL  # absent from CPU builds

    # Our own deadlines give a pair up; torch's watchdog would end the whole process with it.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Few channels: a pair's buffers cost memory and its kernels cost SMs that decoding needs.
    options.config.max_ctas = 4
    group = ProcessGroupNCCL(store, rank, 2, options)
    group.eager_connect_single_device(device)
    return group


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
