"""The prefill side as the engine's thread sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from kv_transfer.geometry import KvGeometry
from kv_transfer.kv_caches import KvCaches
from kv_transfer.local_rank import LocalRank
from kv_transfer.options import TransferOptions
from kv_transfer.send.control import ControlServer
from kv_transfer.send.records import StepChunk, Transfer
from kv_transfer.send.transfers import SendTransfers
from kv_transfer.side_stream import mark


class PrefillServer:
    """Holds the KV of running and finished prefills and streams it to the ranks that reserved it.

    The engine's thread calls all methods. Only ``stop`` waits for the network.
    The caches must stay valid until ``stop`` returns. See ``LocalRank`` for ``on_stuck``.
    """

    def __init__(
        self,
        caches: KvCaches,
        geometry: KvGeometry,
        options: TransferOptions,
        clock: Callable[[], float] = time.monotonic,
        on_stuck: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._rank = LocalRank(caches, geometry, options, clock, on_stuck)
        self.transfers = SendTransfers(self._rank)
        self._step: list[Transfer] = []  # transfers of the current engine step
        self._control = ControlServer(self._rank, self.transfers)
        self.address = self._control.address
        self._control.thread.start()

    def begin_step(self, chunks: Iterable[StepChunk]) -> None:
        """The engine starts to compute these chunks.

        All tokens of a new request before its first chunk are prefix hits.
        """
        with self.transfers.lock:
            self._step = self.transfers.begin_chunks(chunks)

    def layer_done(self, layers_done: int) -> None:
        """The first ``layers_done`` layers of the current step's chunks are in the caches.

        On CUDA, it is enough if the kernels that write these layers are queued on the calling
        thread's current stream.
        """
        if self._step:
            computed = mark(self._rank.caches.device)
            with self.transfers.lock:
                self.transfers.layers_written(self._step, layers_done, computed)

    def end_step(self) -> None:
        """The step's forward pass is over: all layers are in the caches."""
        if self._step:
            self.layer_done(self._rank.geometry.num_layers)
            self._step = []

    def request_finished(
        self, transfer_id: str, first_token_id: int | None, *, computed: bool
    ) -> None:
        """The engine has finished the request.

        Args:
            first_token_id: the token to forward; None if the decode worker samples it itself.
            computed: True if the engine sampled the first token, False if the request was aborted.
        """
        with self.transfers.lock:
            self.transfers.request_finished(transfer_id, first_token_id, computed=computed)

    def preempt(self, transfer_ids: Iterable[str]) -> None:
        """The engine takes the blocks of these requests away, so their transfers fail.

        Return when no sender reads the blocks. The decode side recomputes the prompts.
        """
        with self.transfers.lock:
            self.transfers.preempt(transfer_ids)

    def take_released(self) -> set[str]:
        """Return the engine's request ids whose blocks may be freed, each once."""
        with self.transfers.lock:
            return self.transfers.take_released()

    def paired_with(self) -> set[str]:
        """Return the incarnations of decode workers whose pairs with this rank all exist."""
        with self.transfers.lock:
            return self.transfers.paired_with()

    def stop(self) -> None:
        """Fail the transfers that have not ended, and end all threads. Idempotent."""
        with self.transfers.lock:
            if self.transfers.stopping:
                return
            self.transfers.stop()
        self.transfers.outbox.wake()
        for thread in (self._control.thread, *self._control.sender_threads):
            thread.join(timeout=self._rank.options.pair_timeout_s)
