"""Hazards of security: pickle, addresses, tokens. See ``kv_hazards``."""

from __future__ import annotations

import pickle
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


def test_token_is_needed_for_every_control_message() -> None:
    """CVE-2025-47277: HELLO and RELEASE need the token. Other messages need an earlier HELLO."""
    with ends() as (prefill, decode), Stranger(prefill.server.address) as stranger:
        decode.reserve(prefill, "a#1", [30], 0, 9)
        wait_until(lambda: prefill.server.transfers.waiting, what="the reservation has arrived")
        stranger.hello(token="guess")
        for message in (
            wire.Reserve("a#1", 0, 9),
            wire.Cancel("a#1"),
            wire.Bye(),
            wire.Ping(),
        ):
            stranger.send(message)
            assert isinstance(stranger.receive(), wire.Refuse)
        stranger.send(wire.Release("guess", "a#1"))
        stranger.send(wire.Ping())
        assert isinstance(stranger.receive(), wire.Refuse), "all earlier messages were handled"
        assert len(prefill.server.transfers.peers) == 1
        compute(prefill, "a#1", [0], 9)
        assert decode.result("a#1").complete
