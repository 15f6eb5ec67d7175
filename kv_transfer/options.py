"""Bounds of the KV stream on one worker; the values come from the cluster's configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransferOptions:
    host: str  # address to bind and to advertise
    incarnation: str  # of this worker, new at each process start
    token: str  # shared secret of the cluster; every HELLO must carry it
    message_bytes: int  # largest tensor on a pair
    staging_buffers: int  # messages in flight per pair
    pair_timeout_s: float  # HELLO to a usable process group
    reserve_timeout_s: float  # prefill holds KV that nobody reserves at most so long
    prefill_timeout_s: float  # a reservation waits at most so long for its prefill to begin
    transfer_timeout_s: float  # without progress, once KV flows
    peer_lease_s: float  # a peer that is silent for so long is gone
    pair_idle_s: float  # a pair without a transfer is closed after so long
    max_pairs: int
    max_pending: int  # transfers known at once, on either side
    # Cores for the stream's threads; empty: as inherited. An engine that is bound to some cores
    # would otherwise take turns on them with the threads that it started.
    cores: frozenset[int] = frozenset()

    def bind_this_thread(self) -> None:
        """Called first in each thread of the stream."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)
