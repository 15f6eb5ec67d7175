"""What a replica asks of Ray Serve. Kept apart so that the replicas' own modules need no Ray."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve._private import replica as serve_replica


def local_slot() -> int:
    """Counts this deployment's replicas on this machine from 0; a replacement takes the place
    of the one that it replaces."""
    slot: int = serve.get_replica_context().rank.local_rank
    return slot


def bind_internal_server(host: str) -> None:
    """Make Serve's own server of this replica listen on ``host`` only.

    Serve starts a gRPC server in each replica for calls between deployments, which takes
    pickles from anyone, on all interfaces, without an option to change that (2.60). It does
    so after the replica's constructor, from which this must be called.
    """
    original = serve_replica.add_port_to_grpc_server
    bracketed = f"[{host}]" if ":" in host else host

    def add_port(server: Any, address: str) -> int:
        port: int = original(server, address.replace("[::]:", f"{bracketed}:"))
        return port

    serve_replica.add_port_to_grpc_server = add_port
