"""The state of all transfers and pairs of one decode rank, and the events that change it.

The package docstring says which thread calls what.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from kv_transfer import wire
from kv_transfer.errors import IncompatibleError, ProtocolError
from kv_transfer.geometry import PairPlan, sources
from kv_transfer.local_rank import LocalRank
from kv_transfer.pair import backend_for
from kv_transfer.receive.records import Leg, Peer, Reservation, Transfer, TransferResult
from kv_transfer.session import ReceiveSession, ReceiveState

logger = logging.getLogger(__name__)


class ReceiveTransfers:
    """Call all methods with ``lock`` held. Both callbacks are called with ``lock`` held, too.

    Args:
        start_receiver: called with a new peer and this object; starts the peer's receiver thread.
        on_result: called whenever ``take_results`` has something new.
    """

    def __init__(
        self,
        rank: LocalRank,
        start_receiver: Callable[[Peer, ReceiveTransfers], None],
        on_result: Callable[[], None],
    ) -> None:
        self.lock = threading.Lock()
        self.by_id: dict[str, Transfer] = {}
        self.peers: dict[tuple[str, str], Peer] = {}  # by control address and incarnation
        self.stopping = False
        self._rank = rank
        self._start_receiver = start_receiver
        self._on_result = on_result
        self._results: list[TransferResult] = []

    # ---- engine thread -------------------------------------------------------------------

    def reserve(self, reservation: Reservation, block_ids: torch.Tensor) -> None:
        """See ``DecodeClient.reserve``; ``block_ids`` has the reservation's blocks as int64."""
        transfer_id, options = reservation.transfer_id, self._rank.options
        transfer = self.by_id[transfer_id] = Transfer(reservation, block_ids)
        peers = self.peers_for(reservation.addresses, reservation.incarnation)
        if peers is None:
            reason = "all pairs are busy (kv_transfer.max_pairs), or the workers cannot be paired"
            self.fail_transfer(transfer, reason)
            return
        if len(self.by_id) > options.max_pending:
            for peer in peers:
                peer.post(wire.Cancel(transfer_id))  # lets the peer drop the KV
            self.fail_transfer(transfer, "too many transfers (kv_transfer.max_pending)")
            return
        for peer in peers:
            session = ReceiveSession(transfer_id, reservation.token_start, reservation.token_end)
            leg = Leg(session, peer, self._rank.clock())
            transfer.legs[peer.address] = leg
            peer.reserve(leg)

    def cancel(self, transfer_id: str, addresses: tuple[str, ...], incarnation: str) -> None:
        """See ``DecodeClient.cancel``."""
        transfer = self.by_id.get(transfer_id)
        if transfer is not None:
            for leg in transfer.legs.values():
                leg.session.cancel()
            self.report_if_ended(transfer)
        for peer in self.peers_for(addresses, incarnation) or ():
            peer.post(wire.Cancel(transfer_id))

    def take_results(self) -> list[TransferResult]:
        results, self._results = self._results, []
        return results

    def paired_with(self) -> set[str]:
        """See ``DecodeClient.paired_with``."""
        begun = {peer.incarnation for peer in self.peers.values()}
        return begun - {peer.incarnation for peer in self.peers.values() if peer.plan is None}

    def stop(self) -> None:
        """Close all pairs and make all threads end."""
        self.stopping = True
        for peer in self.peers.values():
            peer.close()
            peer.abort()

    # ---- pairs ---------------------------------------------------------------------------

    def peers_for(self, addresses: tuple[str, ...], incarnation: str) -> list[Peer] | None:
        """Return the peers for the prefill ranks with which this rank pairs. Start missing pairs.

        Return None if there is no room for a new pair, this rank stops, or the two workers cannot
        be paired.
        """
        mine, total = self._rank.geometry, self._rank.geometry.total_kv_heads
        try:
            ranks = sources(mine.tp_rank, mine.tp_size, len(addresses), total)
        except IncompatibleError as error:
            logger.error("cannot pair with the prefill worker: %s", error)
            return None
        needed = [(addresses[rank], incarnation) for rank in ranks]
        for name in needed:
            if name in self.peers:
                continue
            if self.stopping or not self._make_room(set(needed)):
                return None
            peer = Peer(*name, last_used_s=self._rank.clock())
            self._start_receiver(peer, self)
            self.peers[name] = peer
        return [self.peers[name] for name in needed]

    def _make_room(self, keep: set[tuple[str, str]]) -> bool:
        """Make room for one more pair. Return whether there is room.

        If ``max_pairs`` pairs exist, close the pair that has been idle for longest. Busy pairs and
        those in ``keep`` are never closed.
        """
        if len(self.peers) < self._rank.options.max_pairs:
            return True
        idle = [p for name, p in self.peers.items() if name not in keep and not self.is_busy(p)]
        if idle:
            self.close_peer(min(idle, key=lambda peer: peer.last_used_s))
        return bool(idle)

    def is_busy(self, peer: Peer) -> bool:
        return any(
            leg.peer is peer for transfer in self.by_id.values() for leg in transfer.legs.values()
        )

    def pair_is_up(self, peer: Peer, plan: PairPlan) -> None:
        peer.plan = plan
        for transfer in self.by_id.values():
            leg = transfer.legs.get(peer.address)
            if leg is not None and leg.peer is peer:
                leg.session.set_plan(plan)

    def close_peer(self, peer: Peer) -> None:
        """Close an idle pair; the next reservation makes a new one."""
        self._remove(peer)
        peer.close()

    def _remove(self, peer: Peer) -> None:
        name = peer.address, peer.incarnation
        if self.peers.get(name) is peer:  # a newer peer may have this name
            del self.peers[name]

    def pair_closed(self, peer: Peer, reason: str, *, retry: bool) -> None:
        """A pair has closed; its transfers fail, except those that are retried.

        Args:
            retry: the peer closed the pair with REFUSE. If nothing of a leg has arrived, the leg is
                then reserved once more over a new pair, because the peer may not have seen the
                first reservation.
        """
        self._remove(peer)
        for transfer in list(self.by_id.values()):
            leg = transfer.legs.get(peer.address)
            if leg is None or leg.peer is not peer or leg.session.ended:
                continue
            untouched = leg.session.state is ReceiveState.RESERVED and not leg.retries
            where = transfer.reservation
            if retry and untouched and self.peers_for(where.addresses, where.incarnation):
                leg.retries += 1
                leg.peer = self.peers[peer.address, peer.incarnation]
                leg.peer.reserve(leg)
            else:
                self.fail_transfer(transfer, reason)

    # ---- transfers -----------------------------------------------------------------------

    def open_leg(self, transfer_id: str, peer: Peer) -> tuple[Transfer, Leg] | None:
        """Return a transfer and its leg from this peer, if the leg has not ended."""
        transfer = self.by_id.get(transfer_id)
        leg = transfer.legs.get(peer.address) if transfer is not None else None
        if transfer is None or leg is None or leg.peer is not peer or leg.session.ended:
            return None
        return transfer, leg

    def begin_scatter(
        self, header: wire.Header, peer: Peer, began_s: float
    ) -> tuple[Transfer, Leg] | None:
        """Check a received message, and return its transfer and leg.

        The caller then writes the message into the blocks and calls ``end_scatter``. Return None if
        the leg has ended. If the message is wrong, fail the transfer and return None.
        """
        if (found := self.open_leg(header.transfer_id, peer)) is None:
            return None
        transfer, leg = found
        try:
            leg.session.accept_header(header.block_range, header.num_bytes)
        except ProtocolError as error:
            self.fail_transfer(transfer, str(error))
            return None
        leg.progress_at_s = self._rank.clock()
        if leg.first_header_at_s is None:
            leg.first_header_at_s = began_s
        leg.scattering = True
        return transfer, leg

    def end_scatter(self, header: wire.Header, transfer: Transfer, leg: Leg) -> None:
        """The copy into the blocks has ended. If it failed, the receiver closes the pair next."""
        leg.scattering = False
        if not leg.session.ended:
            leg.session.received(header.block_range, header.num_bytes)
        self.report_if_ended(transfer)

    def complete_leg(self, manifest: wire.End, peer: Peer) -> None:
        """The peer has sent its whole leg; the transfer fails if the manifest does not match."""
        if (found := self.open_leg(manifest.transfer_id, peer)) is not None:
            transfer, leg = found
            try:
                leg.session.complete(manifest)
            except ProtocolError as error:
                self.fail_transfer(transfer, str(error))
            self.report_if_ended(transfer)

    def fail_by_peer(self, message: wire.Fail, peer: Peer) -> None:
        if (found := self.open_leg(message.transfer_id, peer)) is not None:
            self.fail_transfer(found[0], f"the prefill worker says: {message.reason}")

    def expire(self, peer: Peer, now_s: float) -> None:
        """Close the pair if it was idle for too long. Fail its transfers that make no progress."""
        options = self._rank.options
        if not self.is_busy(peer) and now_s - peer.last_used_s > options.pair_idle_s:
            self.close_peer(peer)
        for transfer in list(self.by_id.values()):
            leg = transfer.legs.get(peer.address)
            if leg is None or leg.peer is not peer or leg.first_header_at_s is None:
                continue  # before the first message, the prefill worker's own timeouts apply
            if leg.session.ended:
                continue
            if now_s - leg.progress_at_s > options.transfer_timeout_s:
                self.fail_transfer(transfer, "no progress (kv_transfer.transfer_timeout_s)")

    def fail_transfer(self, transfer: Transfer, reason: str) -> None:
        """Fail all legs of a transfer: if one is lost, the others are useless."""
        if transfer.legs and transfer.ended:
            return
        transfer_id = transfer.reservation.transfer_id
        logger.warning("KV transfer %s failed: %s", transfer_id, reason)
        for leg in transfer.legs.values():
            if not leg.session.ended:
                leg.session.fail()
                leg.peer.post(wire.Cancel(transfer_id))
        self.report_if_ended(transfer)

    def report_if_ended(self, transfer: Transfer) -> None:
        """Report a transfer if all of its legs have ended and no receiver writes to its blocks."""
        legs = list(transfer.legs.values())
        if not transfer.ended or any(leg.scattering for leg in legs):
            return
        if self.by_id.pop(transfer.reservation.transfer_id, None) is None:
            return
        now_s = self._rank.clock()
        for leg in legs:
            leg.peer.last_used_s = now_s
        self._results.append(self._result(transfer.reservation, legs, now_s))
        self._on_result()

    def _result(self, reservation: Reservation, legs: list[Leg], now_s: float) -> TransferResult:
        sessions = [leg.session for leg in legs]
        ends = [session.manifest for session in sessions if session.manifest is not None]
        began_s = [leg.first_header_at_s for leg in legs if leg.first_header_at_s is not None]
        complete = bool(legs) and all(s.state is ReceiveState.COMPLETE for s in sessions)
        return TransferResult(
            transfer_id=reservation.transfer_id,
            request_id=reservation.request_id,
            complete=complete,
            first_token_id=ends[0].first_token_id if ends else None,
            backend=backend_for(self._rank.caches.device),
            num_bytes=sum(session.num_bytes for session in sessions),
            messages=sum(session.messages for session in sessions),
            tokens=reservation.token_end - reservation.token_start,
            transfer_ms=(now_s - min(began_s)) * 1000 if began_s else 0.0,
            hidden_bytes=sum(end.hidden_bytes for end in ends),
            tail_ms=max((end.tail_ms for end in ends), default=0.0),
            stall_ms=max((end.stall_ms for end in ends), default=0.0),
            retries=sum(leg.retries for leg in legs),
        )
