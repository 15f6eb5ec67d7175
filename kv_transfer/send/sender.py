"""The thread of one pair. It makes the process group, then gathers and sends messages."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

import torch

from kv_transfer import wire
from kv_transfer.errors import KvTransferError
from kv_transfer.geometry import LayerBlockRange
from kv_transfer.kv_caches import UnitView
from kv_transfer.local_rank import LocalRank
from kv_transfer.pair import PREFILL_RANK, Pair, PendingWork, close_pair
from kv_transfer.pair_store import PairStore
from kv_transfer.send.records import Peer, Transfer
from kv_transfer.send.transfers import SendTransfers
from kv_transfer.side_stream import mark, queue_after, side_stream, wait_done

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _InFlight:
    transfer: Transfer
    block_range: LayerBlockRange
    work: PendingWork
    buffer: torch.Tensor


class Sender:
    """Sends to one peer until the pair is closed. The caller starts ``thread``."""

    def __init__(self, peer: Peer, transfers: SendTransfers, rank: LocalRank) -> None:
        self.peer = peer
        self.thread = threading.Thread(target=self._run, name="kv-send", daemon=True)
        self._transfers = transfers
        self._rank = rank
        self._announced = 0  # number of messages announced so far

    def _run(self) -> None:
        peer, transfers, rank = self.peer, self._transfers, self._rank
        try:
            rank.options.bind_this_thread()
            pair = self._make_pair() if peer.plan.heads else None
            with transfers.lock:
                transfers.pair_is_up(peer, pair)
            with side_stream(rank.caches.device):
                self._stream()
        except KvTransferError as error:
            with transfers.lock:
                transfers.close_peer(peer, f"the pair broke: {error}")
        except Exception:  # a defect of ours; it costs this pair and is logged with its traceback
            logger.exception("KV sender failed")
            with transfers.lock:
                transfers.close_peer(peer, "internal error of the sender")
        finally:
            close_pair(peer.pair, rank.options.pair_timeout_s, rank.on_stuck)

    def _make_pair(self) -> Pair:
        peer, options = self.peer, self._rank.options
        timeout_s, device = options.pair_timeout_s, self._rank.caches.device

        def publish(value: wire.Publish) -> None:
            self._transfers.post(peer, value)

        store = PairStore(publish, peer.wait_published, timeout_s)
        return Pair(store, PREFILL_RANK, device, options.host, timeout_s)

    def _stream(self) -> None:
        """Send ready messages until the pair is closed. Each message in flight has a buffer."""
        peer, transfers, options = self.peer, self._transfers, self._rank.options
        view = self._rank.caches.view(peer.plan, self._rank.geometry.heads)
        max_units = peer.plan.max_units(options.message_bytes)
        staging = view.staging(max_units, options.staging_buffers)
        in_flight: deque[_InFlight] = deque()
        while True:
            with transfers.lock:
                while True:
                    if peer.closed or transfers.stopping:
                        return
                    message = transfers.next_message(peer) if staging else None
                    if message is not None or in_flight:
                        break
                    peer.wake.wait()
                computed = transfers.computed
            if message is None:
                self._wait_sent(oldest := in_flight.popleft(), stalled=not staging)
                staging.append(oldest.buffer)
            else:
                in_flight.append(self._send(view, *message, computed, staging.pop()))

    def _send(
        self, view: UnitView, transfer: Transfer, block_range: LayerBlockRange,
        computed: torch.cuda.Event | None, buffer: torch.Tensor,
    ) -> _InFlight:  # fmt: skip
        transfers, peer = self._transfers, self.peer
        tensor = buffer[: block_range.num_units * view.unit_elements]
        # The HEADER leaves before the gather, so that the peer is ready to receive in time.
        header = wire.Header(
            self._announced, transfer.session.transfer_id, block_range, tensor.nbytes
        )
        transfers.post(peer, header)
        self._announced += 1
        try:
            queue_after(computed, view.device)
            view.gather(block_range, transfer.block_ids, tensor)
            wait_done(mark(view.device), self._rank.options.transfer_timeout_s)
        finally:
            with transfers.lock:
                transfers.gathered(transfer)
        assert peer.pair is not None, "a plan without heads has no messages"
        return _InFlight(transfer, block_range, peer.pair.send(tensor), buffer)

    def _wait_sent(self, sent: _InFlight, *, stalled: bool) -> None:
        began_s = self._rank.clock()
        sent.work.wait(self._rank.options.transfer_timeout_s)
        with self._transfers.lock:
            self._transfers.message_sent(
                self.peer,
                sent.transfer,
                sent.block_range,
                stalled_since_s=began_s if stalled else None,
            )
