"""Protects ZeroMQ sockets with the cluster's secret: encryption and proof on both sides (CurveZMQ).

All keys follow from the secret, which no such connection carries. In CurveZMQ a client must know
the server's public key, and a server must own the matching secret key. So whoever lacks the secret
can neither connect to a server nor pose as one, and reads nothing on the wire. libzmq drops such a
peer before any of its messages reaches us.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from typing import NamedTuple

import zmq
from zmq.utils import z85


class _Keys(NamedTuple):
    """A key pair of Curve25519, in Z85."""

    public: bytes
    secret: bytes


@functools.cache
def _keys(secret: str, role: str) -> _Keys:
    seed = hmac.digest(secret.encode(), f"baton kv {role}".encode(), hashlib.sha256)
    own = z85.encode(seed)
    return _Keys(zmq.curve_public(own), own)


def protect_server(socket: zmq.Socket[bytes], secret: str) -> None:
    """Accept only clients with the cluster's secret. Call before ``bind``."""
    keys = _keys(secret, "server")
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)


def protect_client(socket: zmq.Socket[bytes], secret: str) -> None:
    """Talk only to a server with the cluster's secret. Call before ``connect``."""
    keys = _keys(secret, "client")
    socket.setsockopt(zmq.CURVE_SERVERKEY, _keys(secret, "server").public)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
