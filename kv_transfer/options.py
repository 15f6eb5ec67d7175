"""Settings of the KV stream on one worker. The bounds come from the cluster's configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransferOptions:
    host: str  # address to bind and to advertise
    incarnation: str  # of this worker, new at each process start
    secret: str  # of the cluster; protects the control connections, and is never sent
    message_bytes: int  # largest message on a pair, unless a single unit is larger
    staging_buffers: int  # largest number of messages in flight per pair, on each side
    pair_timeout_s: float  # longest time for each step of making a pair, and for an abort
    reserve_timeout_s: float  # longest time that prefill holds computed KV that nobody reserves
    prefill_timeout_s: float  # longest time that a reservation waits for its prefill to begin
    transfer_timeout_s: float  # longest time without progress once KV flows
    peer_lease_s: float  # a peer that is silent for this long counts as dead
    pair_idle_s: float  # a pair without a transfer for this long is closed
    max_pairs: int  # largest number of pairs of one rank
    # On decode: largest number of concurrent transfers. On prefill: largest number of transfers
    # whose reservation waits for the prefill, and of ended transfers whose id is remembered.
    max_pending: int
    # Cores for the stream's threads. If empty, the threads inherit the cores of the thread that
    # starts them. If that thread is bound to the engine's cores, the stream's threads then compete
    # with the engine.
    cores: frozenset[int] = frozenset()

    def bind_this_thread(self) -> None:
        """Bind the calling thread to ``cores``. Each thread of the stream calls this first."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)
