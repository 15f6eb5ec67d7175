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
    pair_timeout_s: float  # longest time from HELLO to a usable process group
    reserve_timeout_s: float  # longest time that prefill holds KV that nobody reserves
    prefill_timeout_s: float  # longest time that a reservation waits for its prefill to begin
    transfer_timeout_s: float  # longest time without progress once KV flows
    peer_lease_s: float  # a peer that is silent for this long is gone
    pair_idle_s: float  # a pair without a transfer for this long is closed
    max_pairs: int
    max_pending: int  # most transfers known at once, on either side
    # Cores for the stream's threads. If empty, threads keep the cores that they inherit. The
    # threads of an engine that is bound to some cores would otherwise compete for these cores
    # with the engine.
    cores: frozenset[int] = frozenset()

    def bind_this_thread(self) -> None:
        """Bind the calling thread to ``cores``. Each thread of the stream calls this first."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)
