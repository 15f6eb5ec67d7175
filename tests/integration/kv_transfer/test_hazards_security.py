"""Hazards of security: pickle, addresses, the secret. See ``kv_hazards``."""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import psutil
import pytest
import torch
from zmq.utils import z85

from kv_transfer import curve, wire
from kv_transfer.errors import PairError
from kv_transfer.pair import DECODE_RANK, PREFILL_RANK, Pair
from tests.support.kv_faults import (
    DecodeEnd,
    PrefillEnd,
    Stranger,
    running,
)
from tests.support.kv_hazards import (
    compute,
    delivers,
    ends,
)
from tests.support.kv_pair_stores import linked_stores
from tests.support.kv_soak_links import ForwardingStore
from tests.support.kv_stream import OPTIONS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("all_threads_end")


def test_no_pickle_is_read_or_written_during_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-47277: neither the stream nor its process groups use pickle."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle")

    with monkeypatch.context() as patch:
        for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
            patch.setattr(pickle, name, forbidden)
        with ends() as (prefill, decode):
            assert delivers(prefill, decode, "a#1")


def test_explicit_bind_address_is_the_only_one() -> None:
    """CVE-2025-47277: all sockets listen at the given address. No library chooses it by itself."""
    host = "127.0.0.2"
    before = listening()
    prefill, decode = PrefillEnd(host=host), DecodeEnd(host=host)
    with running(decode, prefill):
        assert delivers(prefill, decode, "a#1")
        own = listening() - before
        assert len(own) >= 3, "the control server, and gloo on both sides of the pair"
        assert {ip.removeprefix("::ffff:") for ip, _ in own} == {host}


def listening() -> set[tuple[str, int]]:
    return {
        tuple(each.laddr)
        for each in psutil.Process().net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


@pytest.mark.parametrize("secret", ["guess", None])
def test_without_the_secret_no_message_arrives(secret: str | None) -> None:
    """CVE-2025-47277. Both sides prove that they have the cluster's secret, without sending it."""
    with ends() as (prefill, decode), Stranger(prefill.server.address, secret) as stranger:
        decode.reserve(prefill, "a#1", [30], 0, 9)
        wait_until(lambda: prefill.server.transfers.waiting, what="the reservation has arrived")
        stranger.hello()
        stranger.send(wire.Release("a#1"))
        stranger.send(wire.Ping())
        assert stranger.hears_nothing(500), "a PING without HELLO gets a REFUSE"
        assert len(prefill.server.transfers.peers) == 1
        compute(prefill, "a#1", [0], 9)
        assert decode.result("a#1").complete


def test_no_key_is_ever_sent() -> None:
    """Whoever knew the server's public key could pass for a member, and so it is secret, too."""
    with ends(pair_timeout_s=2) as (prefill, _), Recorder(prefill.server.address) as recorder:
        with Stranger(recorder.address) as decode:
            decode.hello()
            assert isinstance(decode.receive(), wire.Welcome)
        heard = bytes(recorder.heard)
    assert b"CURVE" in heard
    assert b"READY" in heard, "the handshake is complete"
    assert b"stranger" not in heard, "messages are encrypted"
    keys = [curve._keys(OPTIONS.secret, role) for role in ("server", "client")]
    private = [keys[0].public, keys[0].secret, keys[1].secret]
    for known in (OPTIONS.secret.encode(), *private, *map(z85.decode, private)):
        assert known not in heard


class Recorder:
    """Passes the bytes of one connection on to a server, and keeps all of them."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.heard = bytearray()
        self._threads = [threading.Thread(target=self._relay)]

    def _relay(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        back = threading.Thread(target=self._copy, args=(far, near))
        back.start()
        self._copy(near, far)
        back.join()
        near.close()
        far.close()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.heard += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads[0].join()
        self._listener.close()


def test_messages_need_an_earlier_hello() -> None:
    with ends() as (prefill, decode), Stranger(prefill.server.address) as stranger:
        decode.reserve(prefill, "a#1", [30], 0, 9)
        wait_until(lambda: prefill.server.transfers.waiting, what="the reservation has arrived")
        for message in (
            wire.Reserve("a#1", 0, 9),
            wire.Cancel("a#1"),
            wire.Bye(),
            wire.Ping(),
        ):
            stranger.send(message)
            assert isinstance(stranger.receive(), wire.Refuse)
        assert len(prefill.server.transfers.peers) == 1
        compute(prefill, "a#1", [0], 9)
        assert decode.result("a#1").complete


class _StoreOfStranger(ForwardingStore):
    """Knows all addresses, but not the token that only the control connection carries."""

    def set(self, key: str, value: bytes) -> None:
        super().set(key, bytes(len(value)) if key.startswith("token") else value)


def test_a_stranger_who_connects_in_place_of_a_rank_gets_no_kv() -> None:
    """gloo takes whoever connects first."""
    stores, cpu = linked_stores(timeout_s=10), torch.device("cpu")
    stranger = _StoreOfStranger(stores[PREFILL_RANK])
    with ThreadPoolExecutor() as pool:
        posing = pool.submit(Pair, stranger, PREFILL_RANK, cpu, "127.0.0.1", 10)
        with pytest.raises(PairError, match="is not the pair's other rank"):
            Pair(stores[DECODE_RANK], DECODE_RANK, cpu, "127.0.0.1", 10)
    posing.result().abort()
