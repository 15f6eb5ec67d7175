"""The control connection of a decode rank to one prefill rank."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import zmq

from kv_transfer import wire
from kv_transfer.curve import protect_client
from kv_transfer.errors import IncompatibleError, PairClosedError, PairError, ProtocolError
from kv_transfer.local_rank import LocalRank
from kv_transfer.receive.records import Peer


class Ready(NamedTuple):
    """What a poll has found."""

    message: bool
    lost: bool  # the connection is lost; earlier messages may still be unread


class ControlConnection:
    """Sends and receives control messages. Only the receiver thread of the peer uses it.

    Args:
        clock: monotonic time, seconds.
        socket: the control socket.
        monitor: becomes readable when the connection is lost.
    """

    def __init__(
        self,
        peer: Peer,
        clock: Callable[[], float],
        socket: zmq.Socket[bytes],
        monitor: zmq.Socket[bytes],
    ) -> None:
        self._peer = peer
        self._clock = clock
        self._socket = socket
        self._monitor = monitor
        self._wake_socket = peer.outbox.wake_socket
        self._unread: deque[wire.ToDecode] = deque()  # arrived while the pair was being made
        self._welcomed = False
        self._poller = zmq.Poller()
        for source in (socket, monitor, self._wake_socket):
            self._poller.register(source, zmq.POLLIN)

    def send(self, message: wire.ToPrefill) -> None:
        self._socket.send(wire.encode(message))

    def flush(self) -> None:
        """Send all posted messages."""
        while self._peer.outbox:
            self.send(self._peer.outbox.take())

    def poll(self, timeout_ms: int) -> Ready:
        """Wait for a message, a lost connection or a post to the outbox."""
        ready = dict(self._poller.poll(0 if self._unread else timeout_ms))
        if self._wake_socket.fileno() in ready:
            self._peer.outbox.clear_wakes()
        return Ready(bool(self._unread) or self._socket in ready, self._monitor in ready)

    def receive(self) -> wire.ToDecode:
        """Receive the next message. Raises ProtocolError if it is malformed."""
        if self._unread:
            return self._unread.popleft()
        return wire.decode_to_decode(self._socket.recv())

    def wait_welcome(self, pair_id: str, timeout_s: float) -> wire.Welcome:
        """Wait for the answer to HELLO.

        Raises:
            IncompatibleError: the prefill worker refuses the pair.
            PairError: no answer came in time, or this worker no longer needs the pair.
            ProtocolError: the answer is malformed or is another message.
        """
        answer = self._wait_answer(timeout_s)
        if answer is None:
            raise PairError(f"no answer to HELLO within {timeout_s} s")
        if isinstance(answer, wire.Refuse):
            raise IncompatibleError(answer.reason)
        if isinstance(answer, wire.Welcome) and answer.pair_id == pair_id:
            self._welcomed = True
            return answer
        raise ProtocolError(f"{type(answer).__name__} before WELCOME")

    def wait_published(self, timeout_s: float) -> wire.Publish | None:
        """Return the peer's next value for the pair's store, or None if none comes in time.

        Other messages are kept for ``receive``.

        Raises:
            PairClosedError: the prefill worker closed the pair.
            PairError: this worker no longer needs the pair.
            ProtocolError: a message is malformed.
        """
        deadline_s = self._clock() + timeout_s
        while (answer := self._wait_answer(deadline_s - self._clock())) is not None:
            if isinstance(answer, wire.Publish):
                return answer
            if isinstance(answer, wire.Refuse):
                raise PairClosedError(f"the prefill worker closed the pair: {answer.reason}")
            self._unread.append(answer)
        return None

    def _wait_answer(self, timeout_s: float) -> wire.ToDecode | None:
        """Return the next message, or None if none comes in time.

        Raises PairError if this worker no longer needs the pair.
        """
        deadline_s = self._clock() + timeout_s
        # The monitor is not polled here. If the connection is lost while a pair is made, ZeroMQ
        # connects again, and the peer refuses the unknown connection, or nothing comes in time.
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_socket, zmq.POLLIN)
        while True:
            remaining_s = deadline_s - self._clock()
            ready = dict(poller.poll(int(max(0, remaining_s) * 1000) + 1))
            if self._wake_socket.fileno() in ready:
                self._peer.outbox.clear_wakes()
            if self._peer.closing:
                raise PairError("this worker no longer needs the pair")
            if self._welcomed:  # otherwise the peer might drop the KV of what was posted meanwhile
                self.flush()
            if self._socket in ready:
                return wire.decode_to_decode(self._socket.recv())
            if remaining_s <= 0:
                return None


@contextlib.contextmanager
def control_connection(peer: Peer, rank: LocalRank) -> Iterator[ControlConnection]:
    """Connect to a peer; send BYE and disconnect at the exit."""
    with contextlib.ExitStack() as stack:
        sockets = _connect(peer.address, rank.options.secret, stack)
        yield ControlConnection(peer, rank.clock, *sockets)


def _connect(
    address: str, secret: str, stack: contextlib.ExitStack
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Return the control socket and its monitor."""
    control: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    stack.callback(control.close)
    stack.callback(send_bye, control)
    control.setsockopt(zmq.LINGER, 200)  # ms: let BYE leave
    control.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
    control.setsockopt(zmq.IPV6, "[" in address)
    protect_client(control, secret)
    monitor = control.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    stack.callback(monitor.close)
    stack.callback(control.disable_monitor)
    control.connect(address)
    return control, monitor


def send_bye(control: zmq.Socket[bytes]) -> None:
    """Tell the peer that the pair closes, also after an error.

    Without BYE, the peer may keep the pair until it has heard nothing for ``peer_lease_s``.
    """
    with contextlib.suppress(zmq.ZMQError):
        control.send(wire.encode(wire.Bye()), zmq.NOBLOCK)
