"""Serves this process's Prometheus metrics over HTTP. Bounds what scrapers may hold."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

MAX_CONNECTIONS: Final = 16  # each has a thread; a Prometheus server needs one
REQUEST_S: Final = 10.0  # after which a connection is broken; a scrape takes milliseconds


class MetricsServer:
    """Serves in threads of its own, from now until ``stop``.

    Args:
        host: address to listen on. The port is any free one.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server_class = type("_Server", (_BoundedServer,), {"address_family": family})
        self._server: WSGIServer = make_server(host, 0, make_wsgi_app(), server_class, _Handler)
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Blocks for up to half a second."""
        self._server.shutdown()
        self._server.server_close()


class _BoundedServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the process may start no more threads
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        timer = threading.Timer(REQUEST_S, _break, (request,))
        try:
            timer.start()
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # otherwise the client broke the connection
            super().handle_error(request, client_address)


def _break(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has been closed meanwhile
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Log no requests."""
