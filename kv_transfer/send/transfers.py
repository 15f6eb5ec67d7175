"""The state of all transfers and pairs of one prefill rank, and the events that change it.

The package docstring says which thread calls what.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable

import msgspec
import torch

from kv_transfer import wire
from kv_transfer.errors import IncompatibleError, ProtocolError
from kv_transfer.geometry import LayerBlockRange, PairPlan
from kv_transfer.local_rank import LocalRank
from kv_transfer.outbox import Outbox
from kv_transfer.pair import Pair
from kv_transfer.send.records import Peer, StepChunk, Transfer, WaitingReservation
from kv_transfer.session import SendSession

logger = logging.getLogger(__name__)


class SendTransfers:
    """All methods except ``post`` must be called with ``lock`` held."""

    def __init__(self, rank: LocalRank) -> None:
        self.lock = threading.Lock()
        self.outbox: Outbox[tuple[bytes, wire.ToDecode]] = Outbox()  # routing id, message
        self.by_id: dict[str, Transfer] = {}
        self.waiting: dict[str, list[WaitingReservation]] = {}  # by transfer id
        self.ended_ids: OrderedDict[str, str] = OrderedDict()  # reasons by transfer id, newest last
        self.peers: dict[bytes, Peer] = {}  # by routing id
        self.closed_peers: dict[bytes, str] = {}  # incarnations by routing id, newest last
        self.computed: torch.cuda.Event | None = None  # recorded after the newest written layers
        self.stopping = False
        self._rank = rank
        self._released: set[str] = set()  # request ids
        self._gathered = threading.Condition(self.lock)  # notified when a gather has ended

    # ---- engine thread -------------------------------------------------------------------

    def begin_chunks(self, chunks: Iterable[StepChunk]) -> list[Transfer]:
        """Add an engine step's chunks; return the transfers that they extend."""
        return [t for chunk in chunks if (t := self._begin_chunk(chunk)) is not None]

    def _begin_chunk(self, chunk: StepChunk) -> Transfer | None:
        transfer, token_start = self.by_id.get(chunk.transfer_id), chunk.token_start
        if transfer is None:
            transfer = self._open(chunk)
            # Send prefix hits together with this step's layers, not earlier. vLLM may count a block
            # as a hit although another request computes this block in the same step.
            token_start = 0
        if transfer.session.ended:
            return None
        transfer.block_ids = torch.tensor(chunk.block_ids, dtype=torch.int64)
        try:
            transfer.session.add_chunk(token_start, chunk.token_end)
        except ProtocolError as error:  # a defect of ours; it costs this transfer, not the engine
            self.fail_transfer(transfer, str(error))
            return None
        return transfer

    def _open(self, chunk: StepChunk) -> Transfer:
        transfer_id = chunk.transfer_id
        session = SendSession(transfer_id, chunk.num_tokens, self._rank.geometry.num_layers)
        transfer = Transfer(session, chunk.request_id, torch.empty(0), self._rank.clock())
        self.by_id[transfer_id] = transfer
        if transfer_id in self.ended_ids:
            session.cancel()  # ended before it was opened; request_finished releases its blocks
        for waiting in self.waiting.pop(transfer_id, ()):
            if not waiting.peer.closed:
                self._reserve_leg(transfer, waiting.peer, waiting.token_start, waiting.token_end)
        return transfer

    def layers_written(
        self, transfers: Iterable[Transfer], layers_done: int, computed: torch.cuda.Event | None
    ) -> None:
        """The first ``layers_done`` layers of the current chunks of these transfers are written.

        Args:
            computed: event for the kernels that write these layers; None on CPUs.
        """
        self.computed = computed
        for transfer in transfers:
            transfer.session.advance(layers_done)
            if transfer.computed_at_s is None and transfer.session.all_computed:
                transfer.computed_at_s = self._rank.clock()
            for rank in transfer.session.ready_ranks():
                transfer.peers[rank].wake.notify()

    def request_finished(
        self, transfer_id: str, first_token_id: int | None, *, computed: bool
    ) -> None:
        """See ``PrefillServer.request_finished``."""
        transfer = self.by_id.get(transfer_id)
        if transfer is None:
            self._end_unopened(transfer_id, "the prefill was aborted")
        else:
            transfer.request_finished = True
            transfer.since_s = self._rank.clock()
            if computed:
                transfer.session.request_finished(first_token_id)
            else:
                self.fail_transfer(transfer, "the prefill was aborted")
            for peer in transfer.peers.values():
                peer.wake.notify()
        self._release_ended()

    def preempt(self, transfer_ids: Iterable[str]) -> None:
        """See ``PrefillServer.preempt``. Releases the lock while it waits for a gather."""
        for transfer_id in transfer_ids:
            transfer = self.by_id.get(transfer_id)
            if transfer is None:
                continue
            self.fail_transfer(transfer, "the prefill was preempted")
            while transfer.gathering:  # one gather: milliseconds
                self._gathered.wait()
            self._release_ended()

    def take_released(self) -> set[str]:
        """Return the request ids whose blocks may be freed, each once."""
        released, self._released = self._released, set()
        return released

    def paired_with(self) -> set[str]:
        """See ``PrefillServer.paired_with``."""
        up = Counter(peer.hello.incarnation for peer in self.peers.values() if peer.up)
        return {
            peer.hello.incarnation
            for peer in self.peers.values()
            if up[peer.hello.incarnation] == peer.plan.num_decode_ranks
        }

    def stop(self) -> None:
        """Fail all transfers and make all threads end."""
        for transfer in self.by_id.values():
            self.fail_transfer(transfer, "the prefill worker stops")
        self.stopping = True
        for peer in self.peers.values():
            peer.wake_sender()

    # ---- any thread ----------------------------------------------------------------------

    def post(self, peer: Peer, message: wire.ToDecode) -> None:
        """Queue a control message for the control thread to send. Does not need the lock."""
        self.outbox.post((peer.routing_id, message))

    def fail_transfer(self, transfer: Transfer, reason: str) -> None:
        """Fail all legs of a transfer. Does nothing if the transfer has ended."""
        if transfer.session.ended:
            return
        transfer.session.fail()
        self._post_fail(transfer, reason)
        logger.warning("KV transfer %s failed: %s", transfer.session.transfer_id, reason)

    def close_peer(self, peer: Peer, reason: str) -> None:
        """Close a pair and fail its transfers. Does nothing if the pair is closed."""
        if peer.closed:
            return
        peer.closed = True
        self.peers.pop(peer.routing_id, None)
        self.closed_peers[peer.routing_id] = peer.hello.incarnation
        while len(self.closed_peers) > self._rank.options.max_pairs:
            del self.closed_peers[next(iter(self.closed_peers))]
        for transfer_id in list(peer.transfer_ids):
            # If one leg is lost, the other legs are useless.
            self.fail_transfer(self.by_id[transfer_id], reason)
        for transfer_id, waiting in list(self.waiting.items()):
            self.waiting[transfer_id] = [w for w in waiting if w.peer is not peer]
            if not self.waiting[transfer_id]:
                del self.waiting[transfer_id]
        self.post(peer, wire.Refuse(peer.hello.pair_id, reason))
        peer.wake_sender()
        self._release_ended()

    def _post_fail(self, transfer: Transfer, reason: str, except_to: Peer | None = None) -> None:
        for peer in transfer.peers.values():
            if peer is not except_to:
                self.post(peer, wire.Fail(transfer.session.transfer_id, reason))

    def _end_unopened(self, transfer_id: str, reason: str) -> None:
        """End a transfer whose prefill has not begun. Later reservations of it fail immediately."""
        for waiting in self.waiting.pop(transfer_id, ()):
            self.post(waiting.peer, wire.Fail(transfer_id, reason))
        self._remember_ended(transfer_id, reason)

    def _remember_ended(self, transfer_id: str, reason: str) -> None:
        self.ended_ids[transfer_id] = reason
        while len(self.ended_ids) > self._rank.options.max_pending:
            self.ended_ids.popitem(last=False)

    def _release_ended(self) -> None:
        """Release ended transfers whose request is finished and whose blocks no sender reads."""
        done = [
            transfer_id
            for transfer_id, t in self.by_id.items()
            if t.session.ended and t.request_finished and not t.gathering
        ]
        for transfer_id in done:
            transfer = self.by_id.pop(transfer_id)
            self._released.add(transfer.request_id)
            self._remember_ended(transfer_id, transfer.session.state.value)
            for peer in transfer.peers.values():
                peer.transfer_ids.pop(transfer_id, None)
                peer.last_used_s = self._rank.clock()

    # ---- control thread ------------------------------------------------------------------

    def new_peer(self, routing_id: bytes, hello: wire.Hello, plan: PairPlan) -> Peer:
        """Make a peer. The caller adds it to ``peers`` and starts its sender."""
        now_s = self._rank.clock()
        return Peer(
            routing_id=routing_id,
            hello=hello,
            plan=plan,
            wake=threading.Condition(self.lock),
            last_heard_s=now_s,
            last_used_s=now_s,
        )

    def make_room_for_peer(self) -> None:
        """If there are ``max_pairs`` pairs, close the one that has been idle for longest.

        Raises:
            IncompatibleError: all pairs are busy.
        """
        if len(self.peers) >= self._rank.options.max_pairs:
            idle = [peer for peer in self.peers.values() if not self._is_busy(peer)]
            if not idle:
                raise IncompatibleError(
                    f"{len(self.peers)} pairs are busy already (kv_transfer.max_pairs)"
                )
            oldest = min(idle, key=lambda peer: peer.last_used_s)
            self.close_peer(oldest, "another pair needed the room (kv_transfer.max_pairs)")

    def _is_busy(self, peer: Peer) -> bool:
        waits = any(w.peer is peer for waiting in self.waiting.values() for w in waiting)
        return bool(peer.transfer_ids) or waits or not peer.up

    def reserve(self, peer: Peer, message: wire.Reserve) -> None:
        """A decode rank reserves its leg, perhaps before the prefill has begun.

        Raises:
            ProtocolError: the rank has reserved this leg before, and the prefill has not begun.
        """
        transfer_id = message.transfer_id
        peer.last_used_s = self._rank.clock()
        if transfer_id in self.ended_ids:
            reason = f"the transfer has ended: {self.ended_ids[transfer_id]}"
            self.post(peer, wire.Fail(transfer_id, reason))
        elif self._reserved_by_another(transfer_id, peer.hello.incarnation):
            self.post(peer, wire.Fail(transfer_id, "another decode worker has reserved it"))
        elif (transfer := self.by_id.get(transfer_id)) is not None:
            self._reserve_leg(transfer, peer, message.token_start, message.token_end)
        elif any(waiting.peer is peer for waiting in self.waiting.get(transfer_id, ())):
            raise ProtocolError("a second RESERVE")  # repeated reservations would pile up
        elif transfer_id not in self.waiting and (
            len(self.waiting) >= self._rank.options.max_pending
        ):
            reason = "too many reservations (kv_transfer.max_pending)"
            self.post(peer, wire.Fail(transfer_id, reason))
        else:
            self.waiting.setdefault(transfer_id, []).append(
                WaitingReservation(peer, message.token_start, message.token_end, self._rank.clock())
            )

    def _reserve_leg(self, transfer: Transfer, peer: Peer, start: int, end: int) -> None:
        session, message_bytes = transfer.session, self._rank.options.message_bytes
        try:
            session.reserve(peer.rank, peer.plan, message_bytes, start, end)
        except ProtocolError as error:
            logger.error("%s", error)
            self.post(peer, wire.Fail(session.transfer_id, str(error)))
            return
        transfer.peers[peer.rank] = peer
        peer.transfer_ids[session.transfer_id] = None
        peer.wake.notify()

    def _reserved_by_another(self, transfer_id: str, incarnation: str) -> bool:
        """Whether another decode worker has reserved this transfer.

        An attempt has one decode worker. A reservation or CANCEL by a second decode worker is a
        defect, and must not end the transfer of the first.
        """
        transfer = self.by_id.get(transfer_id)
        peers = [] if transfer is None else list(transfer.peers.values())
        peers += [waiting.peer for waiting in self.waiting.get(transfer_id, ())]
        return any(peer.hello.incarnation != incarnation for peer in peers)

    def cancel_by_decode(self, transfer_id: str, incarnation: str, by: Peer | None) -> None:
        """Cancel a transfer for the decode worker that reserved it.

        Raises:
            ProtocolError: another decode worker has reserved it.
        """
        if self._reserved_by_another(transfer_id, incarnation):
            raise ProtocolError("CANCEL of another decode worker's transfer")
        self.cancel(transfer_id, "cancelled by the decode worker", by)

    def cancel(self, transfer_id: str, reason: str, by: Peer | None) -> None:
        """Cancel a transfer, and tell its peers other than ``by``."""
        transfer = self.by_id.get(transfer_id)
        if transfer is None:
            self._end_unopened(transfer_id, reason)
        elif not transfer.session.ended:
            transfer.session.cancel()
            self._post_fail(transfer, reason, except_to=by)
        self._release_ended()

    def expire(self) -> None:
        """Apply the timeouts.

        * Fail transfers that were not reserved in time.
        * Fail reservations whose prefill did not begin in time.
        * Close the pairs of silent peers.
        """
        now_s, options = self._rank.clock(), self._rank.options
        for transfer in self.by_id.values():
            if (
                transfer.session.awaits_reservation
                and transfer.request_finished
                and now_s - transfer.since_s > options.reserve_timeout_s
            ):
                reason = "not reserved in time (kv_transfer.reserve_timeout_s)"
                self.fail_transfer(transfer, reason)
        for transfer_id, waiting in list(self.waiting.items()):
            if now_s - waiting[0].since_s > options.prefill_timeout_s:
                reason = "its prefill did not begin in time (kv_transfer.prefill_timeout_s)"
                self._end_unopened(transfer_id, reason)
        for peer in list(self.peers.values()):
            # A peer is silent while it makes its process group; pair_timeout_s bounds this time.
            if peer.up and now_s - peer.last_heard_s > options.peer_lease_s:
                self.close_peer(peer, "the decode worker went silent (kv_transfer.peer_lease_s)")
        self._release_ended()

    # ---- sender threads ------------------------------------------------------------------

    def pair_is_up(self, peer: Peer, pair: Pair | None) -> None:
        peer.last_heard_s = self._rank.clock()
        peer.pair, peer.up = pair, True

    def next_message(self, peer: Peer) -> tuple[Transfer, LayerBlockRange] | None:
        """Take the next message of a pair, oldest reservation first.

        The caller gathers the message, and then calls ``gathered``. This method also posts END for
        each leg that it finds complete.
        """
        complete = False
        try:
            for transfer_id in list(peer.transfer_ids):
                transfer = self.by_id[transfer_id]
                if (block_range := transfer.session.next_message(peer.rank)) is not None:
                    transfer.gathering += 1
                    return transfer, block_range
                if (manifest := transfer.session.take_manifest(peer.rank)) is not None:
                    self.post(peer, _with_times(manifest, transfer))
                    del peer.transfer_ids[transfer_id]  # this leg no longer keeps its pair open
                    complete = True
        finally:
            if complete:
                self._release_ended()
        return None

    def gathered(self, transfer: Transfer) -> None:
        """A sender has read the blocks of one message."""
        transfer.gathering -= 1
        if transfer.session.ended:
            self._gathered.notify_all()
            self._release_ended()

    def message_sent(
        self, peer: Peer, transfer: Transfer, block_range: LayerBlockRange, *,
        stalled_since_s: float | None,
    ) -> None:  # fmt: skip
        """A message has left, which also shows that the peer is alive.

        Args:
            stalled_since_s: when the sender began to wait for this message because it had no free
                buffer; None if it had a free buffer.
        """
        now_s = peer.last_heard_s = self._rank.clock()
        if stalled_since_s is not None:
            transfer.stall_s += now_s - stalled_since_s
        transfer.last_sent_s = now_s
        hidden = transfer.computed_at_s is None
        transfer.session.message_sent(peer.rank, block_range, hidden=hidden)


def _with_times(manifest: wire.End, transfer: Transfer) -> wire.End:
    computed_s = transfer.computed_at_s
    tail_s = 0.0 if computed_s is None else max(0.0, transfer.last_sent_s - computed_s)
    return msgspec.structs.replace(
        manifest, tail_ms=tail_s * 1000, stall_ms=transfer.stall_s * 1000
    )
