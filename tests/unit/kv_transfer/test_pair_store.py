"""Test the store of a pair, and the control messages that arrive while a pair is made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import zmq

from kv_transfer import wire
from kv_transfer.errors import PairClosedError, PairError
from kv_transfer.receive.control import ControlConnection
from kv_transfer.receive.records import Peer
from tests.support.kv_pair_stores import linked_stores


def test_each_rank_reads_what_the_other_has_set() -> None:
    decode, prefill = linked_stores(timeout_s=5)
    decode.set("0/0", b"at d")
    prefill.set("0/1", b"at p")
    for store in (decode, prefill):
        store.wait(["0/0", "0/1"], "a timeout of gloo's")
        assert (store.get("0/0"), store.get("0/1")) == (b"at d", b"at p")
        assert not store.check(["0/2"])


def test_a_wait_for_the_other_rank_has_an_end() -> None:
    decode, _ = linked_stores(timeout_s=0.05)
    with pytest.raises(PairError, match=r"has not joined within 0\.05 s"):
        decode.get("0/1")


@pytest.fixture
def control() -> Iterator[tuple[ControlConnection, Peer, zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with (
        context.socket(zmq.PAIR) as ours,
        context.socket(zmq.PAIR) as theirs,
        context.socket(zmq.PAIR) as monitor,
    ):
        ours.bind("inproc://control")
        theirs.connect("inproc://control")
        peer = Peer("address", "p1", last_used_s=0)
        with closing(peer.outbox):
            yield ControlConnection(peer, time.monotonic, ours, monitor), peer, theirs


def test_other_messages_wait_until_the_pair_is_made(
    control: tuple[ControlConnection, Peer, zmq.Socket[bytes]],
) -> None:
    connection, peer, theirs = control
    fail, value = wire.Fail("r#1", "because"), wire.Publish("0/1", b"at p")
    theirs.send(wire.encode(fail))
    theirs.send(wire.encode(value))
    assert connection.wait_published(5) == value
    assert connection.wait_published(0) is None
    assert connection.poll(0).message
    assert connection.receive() == fail
    assert not connection.poll(0).message
    theirs.send(wire.encode(wire.Refuse("pair", "because")))
    with pytest.raises(PairClosedError):
        connection.wait_published(5)
    peer.close()
    with pytest.raises(PairError, match="no longer needs"):
        connection.wait_published(5)
