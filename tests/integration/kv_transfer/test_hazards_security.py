"""Hazards of security: pickle, addresses, the secret. See ``kv_hazards``."""

from __future__ import annotations

import contextlib
import pickle
import socket
from typing import Any

import psutil
import pytest

from kv_transfer import wire
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
from tests.support.kv_stream import OPTIONS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("all_threads_end")


def test_no_pickle_is_read_or_written_during_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-47277: neither the stream nor its process groups and stores use pickle."""

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
        assert len(own) >= 3, "the control server, the store, gloo"
        assert {ip.removeprefix("::ffff:") for ip, _ in own} == {host}


def listening() -> set[tuple[str, int]]:
    return {
        tuple(each.laddr)
        for each in psutil.Process().net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


def test_without_the_secret_no_message_arrives() -> None:
    """CVE-2025-47277. Both sides prove that they have the cluster's secret, without sending it."""
    with ends() as (prefill, decode), Stranger(prefill.server.address, "guess") as stranger:
        decode.reserve(prefill, "a#1", [30], 0, 9)
        wait_until(lambda: prefill.server.transfers.waiting, what="the reservation has arrived")
        stranger.hello()
        stranger.send(wire.Release("a#1"))
        stranger.send(wire.Ping())
        assert stranger.hears_nothing(500), "a PING without HELLO gets a REFUSE"
        assert len(prefill.server.transfers.peers) == 1
        compute(prefill, "a#1", [0], 9)
        assert decode.result("a#1").complete


def test_the_secret_is_never_sent() -> None:
    """Whoever listens at a prefill worker's address learns nothing that helps."""
    heard = b""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with Stranger(address) as decode:
            decode.hello()
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(0.5)
                # A greeting of ZMTP 3 for CURVE, so that the client says what it can.
                greeting = (
                    b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\x01"
                )
                connection.sendall(greeting.ljust(64, b"\0"))
                with contextlib.suppress(TimeoutError):
                    while data := connection.recv(65536):
                        heard += data
    assert b"HELLO" in heard, "the client has begun the handshake"
    assert OPTIONS.secret.encode() not in heard
    assert b"stranger" not in heard, "no message is sent before the server's proof"


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
