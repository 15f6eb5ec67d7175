"""Injects faults into the prefill and decode ends of a KV stream, for tests.

An end is one rank: a prefill server or a decode client.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
import zmq

from kv_transfer import pair, wire
from kv_transfer.curve import protect_client, protect_server
from kv_transfer.kv_caches import KvCaches, UnitView
from kv_transfer.options import TransferOptions
from kv_transfer.receive.client import DecodeClient
from kv_transfer.send.server import PrefillServer
from tests.support.kv_stream import (
    BLOCK_TOKENS,
    BLOCKS,
    CONTENT,
    GEOMETRY,
    HEADS,
    LAYERS,
    OPTIONS,
    Decode,
    Prefill,
    random_caches,
)
from tests.support.waiting import wait_until

CPU = torch.device("cpu")
PATIENT_S = 15  # pair_timeout_s, for machines under load
CHILD_TOKENS = 30 * BLOCK_TOKENS  # "child#1" fills blocks 0 to 29: dozens of messages


class Clock:
    """A clock that can be set forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Gate:
    """Holds calls of one method until ``open``. Holds only calls for which ``when`` is true."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        owner: type,
        name: str,
        when: Callable[..., bool] = lambda *_: True,
    ) -> None:
        self.entered = threading.Event()
        self._opened = threading.Event()
        original = getattr(owner, name)

        def held(*args: Any) -> Any:
            if when(*args):
                self.entered.set()
                assert self._opened.wait(60), f"{name} was held for a minute"
            return original(*args)

        monkeypatch.setattr(owner, name, held)

    def open(self) -> None:
        self._opened.set()

    def wait_entered(self) -> None:
        assert self.entered.wait(10), "no call has reached the gate"

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()


class HangingAborts:
    """Makes the abort of a group hang until the exit, if ``on`` is true when the group is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = True
        self._released = threading.Event()
        make = pair._gloo
        monkeypatch.setattr(
            pair, "_gloo", lambda *args: _Hanging(make(*args), self._released, self.on)
        )

    def __enter__(self) -> HangingAborts:
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()


class _Hanging:
    def __init__(self, group: Any, released: threading.Event, hangs: bool) -> None:
        self.send, self.recv = group.send, group.recv
        self._group, self._released, self._hangs = group, released, hangs

    def abort(self) -> None:
        if self._hangs:
            self._released.wait()
        self._group.abort()


class SilentPrefill:
    """A prefill rank that sends WELCOME, but joins no process group."""

    def __init__(self) -> None:
        self._router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        protect_server(self._router, OPTIONS.secret)
        port: int = self._router.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"

    def welcome(self) -> None:
        """Wait for one HELLO and answer it with WELCOME."""
        assert self._router.poll(10_000), "no HELLO"
        routing_id, frame = self._router.recv_multipart()
        hello = wire.decode_to_prefill(frame)
        assert isinstance(hello, wire.Hello)
        welcome = wire.Welcome(hello.pair_id, GEOMETRY)
        self._router.send_multipart([routing_id, wire.encode(welcome)])

    def __enter__(self) -> SilentPrefill:
        return self

    def __exit__(self, *_: object) -> None:
        self._router.close()


class Stranger:
    """A peer that sends control messages to a prefill rank, but never joins a process group.

    Args:
        secret: if it is not the cluster's, no message of this peer reaches the prefill rank. None:
            this peer does not even try CurveZMQ.
    """

    def __init__(self, address: str, secret: str | None = OPTIONS.secret) -> None:
        self._dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._is_member = secret == OPTIONS.secret
        if secret is not None:
            protect_client(self._dealer, secret)
        self._dealer.connect(address)

    def send(self, message: wire.ToPrefill) -> None:
        try:
            self._dealer.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:  # the handshake has failed
            assert not self._is_member

    def hears_nothing(self, ms: int) -> bool:
        """Return whether no message arrives for so long."""
        return not self._dealer.poll(ms)

    def receive(self) -> wire.ToDecode:
        assert self._dealer.poll(10_000), "no answer"
        return wire.decode_to_decode(self._dealer.recv())

    def hello(self) -> None:
        self.send(
            wire.Hello(
                version=wire.PROTOCOL_VERSION,
                expected_incarnation="p1",
                incarnation="stranger",
                geometry=GEOMETRY,
                backend="gloo",
                pair_id="pair",
            )
        )

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(zmq.ZMQError):
            self._dealer.send(wire.encode(wire.Bye()), zmq.NOBLOCK)
        self._dealer.close(linger=500)


def _options(incarnation: str, options: dict[str, Any]) -> TransferOptions:
    return replace(OPTIONS, incarnation=incarnation, **({"pair_timeout_s": PATIENT_S} | options))


class PrefillEnd(Prefill):
    """A ``Prefill`` with a given rank, clock and ``on_stuck``."""

    def __init__(
        self,
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        clock: Callable[[], float] = time.monotonic,
        on_stuck: Callable[[str], None] = lambda _: None,
        incarnation: str = "p1",
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(10 + tp_rank)
        shape = (BLOCKS, HEADS // tp_size, BLOCK_TOKENS, CONTENT)
        self.caches = [torch.randn(shape, generator=generator) for _ in range(LAYERS)]
        self.server = PrefillServer(
            KvCaches(self.caches),
            replace(GEOMETRY, tp_size=tp_size, tp_rank=tp_rank),
            _options(incarnation, options),
            clock,
            on_stuck,
        )
        self.released = set()


class DecodeEnd(Decode):
    """A ``Decode`` with a given clock and ``on_stuck``."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_stuck: Callable[[str], None] = lambda _: None,
        incarnation: str = "d1",
        **options: Any,
    ) -> None:
        self.caches = random_caches(2)
        self.client = DecodeClient(
            KvCaches(self.caches),
            GEOMETRY,
            _options(incarnation, options),
            clock,
            on_stuck=on_stuck,
        )
        self.results = {}


@contextmanager
def running(*ends: Prefill | Decode) -> Iterator[None]:
    """Stop these ends at the exit, in this order."""
    try:
        yield
    finally:
        for end in ends:
            if isinstance(end, Decode):
                end.client.stop()
            else:
                end.server.stop()


def kv_threads(name: str = "kv-") -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(name)}


@contextmanager
def child(role: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Run a worker process that stops itself (SIGSTOP) in the middle of a stream; see ``main``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.kv_faults", role, *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def wait_stopped(process: subprocess.Popen[str]) -> None:
    wait_until(
        lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED,
        what="the child has stopped",
        within_s=30,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _stop_in(name: str, calls: int) -> None:
    """Stop this process in call number ``calls`` of a ``UnitView`` method, counted from 1."""
    original, count = getattr(UnitView, name), iter(range(1, sys.maxsize))

    def stopping(*args: Any) -> None:
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGSTOP)
        original(*args)

    setattr(UnitView, name, stopping)


def main(role: str, *args: str) -> None:
    blocks = list(range(CHILD_TOKENS // BLOCK_TOKENS))
    if role == "prefill":
        _stop_in("gather", 8)
        prefill = Prefill(random_caches(1))
        prefill.compute("child#1", blocks, CHILD_TOKENS)
        prefill.server.request_finished("child#1", 42, computed=True)
        print(prefill.server.address, flush=True)
    else:
        (address,) = args
        _stop_in("scatter", 8)
        decode = Decode(random_caches(2), "child", peer_lease_s=600)
        decode.reserve(address, "child#1", blocks, 0, CHILD_TOKENS)
        results = wait_until(decode.client.take_results, what="the transfer ends", within_s=60)
        print(results[0].complete, flush=True)
    os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
