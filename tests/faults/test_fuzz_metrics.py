"""Hostile HTTP clients attack a worker's metrics server, which is then still read."""

from __future__ import annotations

import contextlib
import socket
import urllib.request
from collections.abc import Iterator

import pytest

from tests.support.hostile import OpenFiles, Strangers, another_protocol, dice, garbage
from tests.support.waiting import wait_until
from worker import metrics_server
from worker.metrics_server import MAX_CONNECTIONS, MetricsServer

HOST = "127.0.0.1"


@contextlib.contextmanager
def serving() -> Iterator[MetricsServer]:
    server = MetricsServer(HOST)
    try:
        yield server
    finally:
        server.stop()


def is_read(server: MetricsServer) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{server.port}/metrics", timeout=5) as page:
            return b"process_open_fds" in page.read()
    except OSError:
        return False


def test_bytes_on_the_metrics_server(capfd: pytest.CaptureFixture[str]) -> None:
    rng = dice("metrics")
    with serving() as server:
        assert is_read(server)
        files = OpenFiles()
        strangers = Strangers(HOST, server.port, rng)
        strangers.storm_here([garbage, another_protocol], 150)
        strangers.leave()
        wait_until(lambda: is_read(server), what="the metrics are read")
        files.wait_as_at_first()
    assert "Traceback" not in capfd.readouterr().err


def test_connections_to_the_metrics_server_have_a_limit() -> None:
    with serving() as server, contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(socket.create_connection((HOST, server.port)))
        extra = stack.enter_context(socket.create_connection((HOST, server.port)))
        extra.settimeout(metrics_server.REQUEST_S / 2)
        assert extra.recv(1) == b"", "it is closed at once"


def test_a_client_that_sends_its_request_slowly_is_sent_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_S", 0.3)
    with serving() as server, socket.create_connection((HOST, server.port), 5) as client:

        def is_sent_away() -> bool:
            try:
                client.sendall(b"x")
            except OSError:
                return True
            return False

        wait_until(is_sent_away, what="the connection is broken", within_s=10)
