"""The decode side as the engine's thread sees it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kv_transfer.geometry import KvGeometry
from kv_transfer.kv_caches import KvCaches
from kv_transfer.local_rank import LocalRank
from kv_transfer.options import TransferOptions
from kv_transfer.receive.receiver import Receivers
from kv_transfer.receive.records import Reservation, TransferResult
from kv_transfer.receive.transfers import ReceiveTransfers


class DecodeClient:
    """Reserves and receives KV.

    The engine's thread calls all methods. Only ``stop`` waits for the network. The caches must stay
    valid until ``stop`` returns. ``on_result`` is called whenever ``take_results`` has something
    new. The caller of ``on_result`` holds ``transfers.lock``. See ``LocalRank`` for ``on_stuck``.
    """

    def __init__(
        self,
        caches: KvCaches,
        geometry: KvGeometry,
        options: TransferOptions,
        clock: Callable[[], float] = time.monotonic,
        on_result: Callable[[], None] = lambda: None,
        on_stuck: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.options = options
        rank = LocalRank(caches, geometry, options, clock, on_stuck)
        self.receivers = Receivers(rank)
        self.transfers = ReceiveTransfers(rank, self.receivers.start, on_result)

    def reserve(self, reservation: Reservation) -> None:
        """Ask the prefill ranks for this KV. ``take_results`` later returns the outcome."""
        block_ids = torch.tensor(reservation.block_ids, dtype=torch.int64)
        with self.transfers.lock:
            self.transfers.reserve(reservation, block_ids)

    def cancel(self, transfer_id: str, addresses: tuple[str, ...], incarnation: str) -> None:
        """Cancel the transfer of a request that the engine has dropped.

        If its reservation has no result yet, ``take_results`` still returns one later.
        """
        with self.transfers.lock:
            self.transfers.cancel(transfer_id, addresses, incarnation)

    def prewarm(self, addresses: tuple[str, ...], incarnation: str) -> None:
        """Start to make the pairs with a prefill worker before the first request.

        Has no effect if the pairs might exceed ``max_pairs``.
        """
        with self.transfers.lock:
            if len(self.transfers.peers) + len(addresses) <= self.options.max_pairs:
                self.transfers.peers_for(addresses, incarnation)

    def paired_with(self) -> set[str]:
        """Return the incarnations of the prefill workers with which all started pairs are open."""
        with self.transfers.lock:
            return self.transfers.paired_with()

    def take_results(self) -> list[TransferResult]:
        """Return the results of the transfers that were reported since the last call."""
        with self.transfers.lock:
            return self.transfers.take_results()

    def stop(self) -> None:
        """Close all pairs and end all threads. Idempotent."""
        with self.transfers.lock:
            self.transfers.stop()
        self.receivers.join()
