"""Leads the connections of a soak test's workers through links: proxies that the test disturbs.

The test listens on a "router" port. There a worker asks for a link to an address, and then connects
to the link instead of the address. A worker does not ask for links for its control connections: the
control addresses that the test gives to the workers are those of links.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import Store

from kv_transfer import pair
from kv_transfer.errors import PairError

# Gloo connects from the side with the greater address to the other side. Here, decode connects.
PREFILL_HOST, LINK_HOST, DECODE_HOST = "127.0.0.1", "127.0.0.1", "127.0.0.2"


def linked(router_port: int, kind: str, host: str, port: int) -> int:
    """Ask for a link to an address, and return the link's port."""
    with socket.create_connection((LINK_HOST, router_port)) as router:
        router.sendall(f"{kind} {host} {port}\n".encode())
        return int(router.makefile().readline())


def lead_through_links(role: str, router_port: int) -> None:
    """Lead decode's gloo connections through links."""
    gloo: Callable[..., Any] = pair._gloo

    def routed_gloo(store: Store, *args: Any) -> Any:
        return gloo(_RoutedStore(store, router_port), *args)

    if role == "decode":
        pair._gloo = routed_gloo  # type: ignore[assignment]


class ForwardingStore(Store):
    """Forwards every call to another store."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self._store.wait(keys, *timeout)

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(key)
        return value


class _RoutedStore(ForwardingStore):
    """Shows a decode rank the address of a link instead of the address of prefill's gloo."""

    def __init__(self, store: Store, router_port: int) -> None:
        super().__init__(store)
        self._router_port = router_port

    def get(self, key: str) -> bytes:
        blob = super().get(key)
        if not (at := _port_at(blob)):
            return blob  # not prefill's address
        port = int.from_bytes(blob[at : at + 2], "big")
        link = linked(self._router_port, "data", PREFILL_HOST, port)
        return blob[:at] + link.to_bytes(2, "big") + blob[at + 2 :]


def _port_at(blob: bytes) -> int:
    """Return the index of the port in prefill's gloo address, which contains a sockaddr_in.

    Return 0 if ``blob`` is not prefill's address.
    """
    return max(0, blob.find(socket.inet_aton(PREFILL_HOST)) - 2)


class _StoreOfSilentPeer(Store):
    """A pair's store in which a peer has published its address, but the peer never connects."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}
        self.port = 0  # on which gloo listens in this process

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = bytes(value)

    def wait(self, keys: list[str], *timeout: Any) -> None:
        """Return immediately, because every key exists."""

    def get(self, key: str) -> bytes:
        ours = next(blob for blob in self._values.values() if _port_at(blob))
        at = _port_at(ours)
        self.port = int.from_bytes(ours[at : at + 2], "big")
        return ours.replace(socket.inet_aton(PREFILL_HOST), socket.inet_aton(DECODE_HOST))


def abort_and_accept_late_connection() -> None:
    """Let the making of a pair time out, then connect to the pair's port.

    If the connection reaches what is left of the pair, the process dies.
    """
    store = _StoreOfSilentPeer()
    try:
        pair.Pair(store, pair.PREFILL_RANK, torch.device("cpu"), PREFILL_HOST, 0.5)
    except PairError as error:
        with contextlib.suppress(OSError):  # refused or never answered
            late = socket.create_connection((PREFILL_HOST, store.port), timeout=1)
            late.sendall(bytes(8))  # gloo's number of the connection
            late.recv(1)
        print(error)
