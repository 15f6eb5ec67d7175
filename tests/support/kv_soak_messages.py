"""The orders of a soak test to its worker processes (``kv_soak``), and the workers' reports."""

from __future__ import annotations

import msgspec

MAX_PACKET_BYTES = 32 * 1024


class Spec(msgspec.Struct, frozen=True):
    """The worker to start."""

    role: str  # "prefill" or "decode"
    incarnation: str
    tp_size: int
    block_tokens: int
    layout: str  # see ``kv_shapes.geometry_of``
    blocks: int
    router_port: int  # where the worker asks for a link; see ``kv_soak_links``
    seed: int


class Compute(msgspec.Struct, tag=True, frozen=True):
    """To prefill: compute a prompt whose first ``cached`` tokens are a prefix hit."""

    transfer_id: str
    tokens: int
    cached: int
    chunk: int  # tokens per step


class Abort(msgspec.Struct, tag=True, frozen=True):
    """To prefill: the engine drops the request."""

    transfer_id: str


class Preempt(msgspec.Struct, tag=True, frozen=True):
    """To prefill: the engine preempts a random prompt, and computes this prompt again later."""


class Release(msgspec.Struct, tag=True, frozen=True):
    """To prefill: its front end says that nobody will fetch this KV."""

    transfer_id: str


class Reserve(msgspec.Struct, tag=True, frozen=True):
    """To decode: fetch the KV of all tokens after the first ``cached`` ones."""

    transfer_id: str
    addresses: tuple[str, ...]
    incarnation: str
    tokens: int
    cached: int


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """To decode: the engine drops the request."""

    transfer_id: str
    addresses: tuple[str, ...]
    incarnation: str


class Count(msgspec.Struct, tag=True, frozen=True):
    """To both: report how many blocks are free."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """From both: the worker has started."""

    pid: int
    addresses: tuple[str, ...]  # control addresses by rank; empty for a decode worker


class Computed(msgspec.Struct, tag=True, frozen=True):
    """From prefill: the engine has finished or aborted the request."""

    transfer_id: str


class Released(msgspec.Struct, tag=True, frozen=True):
    """From prefill: the request's blocks are free."""

    transfer_id: str


class Result(msgspec.Struct, tag=True, frozen=True):
    """From decode: the transfer has ended on all ranks."""

    transfer_id: str
    complete: bool
    retries: int


class Free(msgspec.Struct, tag=True, frozen=True):
    """From both: the answer to ``Count``."""

    blocks: int


class Wrong(msgspec.Struct, tag=True, frozen=True):
    """From both: a check has failed in the worker, or an error has occurred there."""

    what: str


Order = Compute | Abort | Preempt | Release | Reserve | Cancel | Count
Report = Ready | Computed | Released | Result | Free | Wrong

_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def packet(message: Order | Report | Spec) -> bytes:
    return msgspec.msgpack.encode(message)


def order_in(data: bytes) -> Order:
    return _orders.decode(data)


def report_in(data: bytes) -> Report:
    return _reports.decode(data)
