"""What a replica asks of Ray Serve. Kept apart so that the replicas' own modules need no Ray."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import serve
from ray.serve._private import replica as serve_replica

from core.config.schema import Config
from core.net import bracketed, is_loopback


def local_slot() -> int:
    """Counts this deployment's replicas on this machine from 0; a replacement takes the place
    of the one that it replaces."""
    slot: int = serve.get_replica_context().rank.local_rank
    return slot


def on_this_node(config: Config) -> Config:
    """``config`` for a replica that Ray may have put on another machine than the head.

    ``cluster.host`` is the head's address; others must bind, and tell others, their own. On
    loopback there is one machine only.
    """
    if is_loopback(config.cluster.host):
        return config
    host = ray.util.get_node_ip_address()
    cluster = config.cluster.model_copy(update={"host": host})
    return config.model_copy(update={"cluster": cluster})


def prepare_process(host: str) -> None:
    """What the process of a replica needs before anything else, from the replica's constructor."""
    _bind_internal_server(host)
    _drop_lines_that_cannot_be_logged()


def _bind_internal_server(host: str) -> None:
    """Make Serve's own server of this replica listen on ``host`` only.

    Serve starts a gRPC server in each replica for calls between deployments, which takes
    pickles from anyone, on all interfaces, without an option to change that (2.60). It does
    so after the replica's constructor, from which this must be called.
    """
    original = serve_replica.add_port_to_grpc_server

    def add_port(server: Any, address: str) -> int:
        port: int = original(server, address.replace("[::]:", f"{bracketed(host)}:"))
        return port

    serve_replica.add_port_to_grpc_server = add_port


def _drop_lines_that_cannot_be_logged() -> None:
    """Else a full disk ends requests: Python says on stderr that a line could not be written,
    stderr is Serve's log, to which nothing can be written, and so on until RecursionError."""
    logging.raiseExceptions = False
