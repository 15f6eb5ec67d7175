"""The control connection of a decode rank to one prefill rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import zmq

from kv_transfer import wire
from kv_transfer.curve import protect_client
from kv_transfer.errors import IncompatibleError, PairError, ProtocolError
from kv_transfer.local_rank import LocalRank
from kv_transfer.receive.records import Peer


class Ready(NamedTuple):
    """What a poll has found."""

    message: bool
    lost: bool  # the connection is lost; earlier messages may still be unread


class ControlConnection:
    """Sends and receives control messages. Only the receiver thread of the peer uses it.

    Args:
        socket: the control socket.
        monitor: becomes readable when the connection is lost.
    """

    def __init__(self, peer: Peer, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        self._peer = peer
        self._socket = socket
        self._monitor = monitor
        self._wake_socket = peer.outbox.wake_socket
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
        ready = dict(self._poller.poll(timeout_ms))
        if self._wake_socket.fileno() in ready:
            self._peer.outbox.clear_wakes()
        return Ready(self._socket in ready, self._monitor in ready)

    def receive(self) -> wire.ToDecode:
        """Receive the next message. Raises ProtocolError if it is malformed."""
        return wire.decode_to_decode(self._socket.recv())

    def wait_welcome(self, pair_id: str, rank: LocalRank) -> wire.Welcome:
        """Wait for the answer to HELLO.

        Raises:
            IncompatibleError: the prefill worker refuses the pair.
            PairError: no answer came in time, or this worker no longer needs the pair.
            ProtocolError: the answer is malformed or is another message.
        """
        timeout_s = rank.options.pair_timeout_s
        deadline_s = rank.clock() + timeout_s
        # The monitor is not polled here: before WELCOME, a lost connection shows as a timeout.
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_socket, zmq.POLLIN)
        while True:
            remaining_s = deadline_s - rank.clock()
            ready = dict(poller.poll(int(max(0, remaining_s) * 1000) + 1))
            if self._wake_socket.fileno() in ready:
                self._peer.outbox.clear_wakes()
            if self._peer.closing:
                raise PairError("this worker no longer needs the pair")
            if self._socket not in ready:
                if remaining_s <= 0:
                    raise PairError(f"no answer to HELLO within {timeout_s} s")
                continue
            answer = self.receive()
            if isinstance(answer, wire.Refuse):
                raise IncompatibleError(answer.reason)
            if isinstance(answer, wire.Welcome) and answer.pair_id == pair_id:
                return answer
            raise ProtocolError(f"{type(answer).__name__} before WELCOME")


@contextlib.contextmanager
def control_connection(peer: Peer, secret: str) -> Iterator[ControlConnection]:
    """Connect to a peer; send BYE and disconnect at the exit."""
    with contextlib.ExitStack() as stack:
        yield ControlConnection(peer, *_connect(peer.address, secret, stack))


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
