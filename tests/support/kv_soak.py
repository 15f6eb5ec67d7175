"""Prefill and decode workers as processes to torment: an engine's calls, and no engine.

One parent process imports everything once and forks a worker for each ``Spec`` that it is handed
(``main``). A worker does what it is told over a packet socket, and says there what it sees; it ends
when that socket does. It checks as it goes, and says ``Wrong``.

What a prompt's KV is depends on its key, layer, head and token and on nothing else. Blocks that
belong to nobody hold numbers that are never KV.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import random
import select
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch
import zmq
from torch.distributed import PrefixStore, Store, TCPStore

from kv_transfer import pair
from kv_transfer.errors import PairError
from kv_transfer.kv_caches import PageView
from kv_transfer.options import TransferOptions
from kv_transfer.rank_reports import Releaser
from kv_transfer.receive import client as receive
from kv_transfer.receive.client import DecodeClient, Reservation
from kv_transfer.send import server as send
from kv_transfer.send.server import PrefillServer, StepChunk
from tests.support.kv_shapes import RankCaches, geometry_of, kv_of, ranks_of
from tests.support.waiting import wait_until

HEADS, LAYERS, CONTENT = 2, 4, 8
# Gloo's side with the greater address calls the other: so decode calls prefill, in any case.
PREFILL_HOST, LINK_HOST, DECODE_HOST = "127.0.0.1", "127.0.0.1", "127.0.0.2"
OPTIONS = TransferOptions(
    host="",
    incarnation="",
    token="secret",
    message_bytes=3 * 16 * HEADS * CONTENT * 4,  # some layers of a short prompt, part of a long one
    staging_buffers=2,
    pair_timeout_s=2,
    reserve_timeout_s=2,
    prefill_timeout_s=2,
    transfer_timeout_s=2,
    peer_lease_s=1,
    pair_idle_s=6,  # longer than any of them: no pair may need to close for blocks to be free
    max_pairs=5,  # two more than there are, which dead ones take
    max_pending=64,
)
_PING_S, _SWEEP_S = 0.2, 0.1  # in proportion to that lease
MAX_PACKET_BYTES = 32 * 1024
_ENGINE_LOOKS_S = 0.01
_NEVER_KV = 1000  # all above


class Spec(msgspec.Struct, frozen=True):
    role: str  # "prefill" or "decode"
    incarnation: str
    tp_size: int
    block_tokens: int
    layout: str  # as ``geometry_of`` has it
    blocks: int
    router_port: int  # of whoever leads connections through links
    seed: int


class Compute(msgspec.Struct, tag=True, frozen=True):
    """▸ prefill: a prompt, of which the first ``cached`` tokens are a prefix hit."""

    key: str
    tokens: int
    cached: int
    chunk: int  # tokens a step


class Abort(msgspec.Struct, tag=True, frozen=True):
    """▸ prefill: the engine drops the request."""

    key: str


class Preempt(msgspec.Struct, tag=True, frozen=True):
    """▸ prefill: the engine takes some prompt's blocks away, and computes it once more, later."""


class Release(msgspec.Struct, tag=True, frozen=True):
    """▸ prefill: its front end says that nobody will fetch this."""

    key: str


class Reserve(msgspec.Struct, tag=True, frozen=True):
    """▸ decode: fetch what lacks after the first ``cached`` tokens."""

    key: str
    addresses: tuple[str, ...]
    incarnation: str
    tokens: int
    cached: int


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """▸ decode."""

    key: str
    addresses: tuple[str, ...]
    incarnation: str


class Count(msgspec.Struct, tag=True, frozen=True):
    """▸ either: say how many blocks are free."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    pid: int
    addresses: tuple[str, ...]  # of a prefill worker's ranks


class Computed(msgspec.Struct, tag=True, frozen=True):
    """prefill ▸: the engine has finished with it, one way or another."""

    key: str


class Released(msgspec.Struct, tag=True, frozen=True):
    """prefill ▸: its blocks are free."""

    key: str


class Result(msgspec.Struct, tag=True, frozen=True):
    """decode ▸: all ranks have reported this reservation."""

    key: str
    complete: bool
    retries: int


class Free(msgspec.Struct, tag=True, frozen=True):
    blocks: int


class Wrong(msgspec.Struct, tag=True, frozen=True):
    what: str


Order = Compute | Abort | Preempt | Release | Reserve | Cancel | Count
Report = Ready | Computed | Released | Result | Free | Wrong

_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def packet(message: Order | Report | Spec) -> bytes:
    return msgspec.msgpack.encode(message)


def report_in(data: bytes) -> Report:
    return _reports.decode(data)


class Worker:
    """What prefill and decode workers have in common."""

    def __init__(self, spec: Spec, link: socket.socket) -> None:
        self._link = link
        self._tokens = spec.block_tokens
        geometry = geometry_of(
            HEADS, spec.tp_size, spec.block_tokens, spec.layout, layers=LAYERS, content=CONTENT
        )
        self.ranks = [RankCaches(rank, spec.blocks) for rank in ranks_of(geometry)]
        self.free = deque(range(spec.blocks))
        self._fills = _NEVER_KV

    def say(self, report: Report) -> None:
        """From any thread: a packet is sent whole or not at all."""
        self._link.send(packet(report))

    def stuck(self, reason: str) -> None:
        self.say(Wrong(reason))

    def addresses(self) -> tuple[str, ...]:
        return ()

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._tokens)

    def give_back(self, blocks: list[int]) -> None:
        """For another request to take; until then they hold what nothing else does."""
        self._fills += 1
        self.fill(blocks, self._fills)
        self.free += blocks

    def fill(self, blocks: list[int], value: int) -> None:
        for layer in [layer for rank in self.ranks for layer in rank.layers]:
            layer[blocks] = value

    def orders(self, timeout_s: float, *others: int) -> list[Order] | None:
        """What there is to do, perhaps nothing within the time; None: it is over."""
        link = self._link.fileno()
        ready, _, _ = select.select([link, *others], [], [], timeout_s)
        orders: list[Order] = []
        while link in ready:
            try:
                data = self._link.recv(MAX_PACKET_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            if not data:
                return None
            orders.append(_orders.decode(data))
        return orders


@dataclass(slots=True, eq=False)
class _Prompt:
    order: Compute
    blocks: list[int] = field(default_factory=list)
    next_token: int = 0
    released_by: int = 0  # ranks


class PrefillWorker(Worker):
    """Steps of several prompts together, a layer at a time; blocks are kept until released."""

    def __init__(self, spec: Spec, link: socket.socket, options: TransferOptions) -> None:
        super().__init__(spec, link)
        self._rng = random.Random(spec.seed)
        self._servers = [
            PrefillServer(rank.pages, rank.geometry, options, on_stuck=self.stuck)
            for rank in self.ranks
        ]
        self._front_end = Releaser(self.addresses(), options.token)
        self._front_end.release("")  # its connections, too, are there from the start
        wait_until(
            lambda: all("" in server._ended_keys for server in self._servers), what="it is heard"
        )
        self._waiting: deque[_Prompt] = deque()
        self._running: list[_Prompt] = []
        self._kept: dict[str, _Prompt] = {}  # was in a step, and is not released

    def addresses(self) -> tuple[str, ...]:
        return tuple(server.address for server in self._servers)

    def run(self) -> None:
        while (orders := self.orders(0 if self._running else _ENGINE_LOOKS_S)) is not None:
            for order in orders:
                self._follow(order)
            self._step()
            self._collect()
        self._front_end.close()
        for server in self._servers:
            server.stop()

    def _follow(self, order: Order) -> None:
        match order:
            case Compute():
                self._waiting.append(_Prompt(order))
            case Abort(key):
                for prompt in [p for p in (*self._waiting, *self._running) if p.order.key == key]:
                    self._finish(prompt, None, computed=False)
            case Preempt():
                if begun := [p for p in self._running if p.order.key in self._kept]:
                    self._preempt(self._rng.choice(begun))
            case Release(key):
                self._front_end.release(key)
            case Count():
                self.say(Free(len(self.free)))

    def _step(self) -> None:
        while self._waiting and len(self.free) >= self.blocks_of(self._waiting[0].order.tokens):
            prompt = self._waiting.popleft()
            self._begin(prompt)
        batch = self._rng.sample(self._running, min(len(self._running), 3))
        if not batch:
            return
        self._kept |= {prompt.order.key: prompt for prompt in batch}
        chunks = [self._chunk(prompt) for prompt in batch]
        for server in self._servers:
            server.begin_step(chunks)
        for layer in range(LAYERS):
            for prompt, chunk in zip(batch, chunks, strict=True):
                self._write(prompt, layer, chunk.token_start, chunk.token_end)
            for server in self._servers:
                server.layer_done(layer + 1)
            select.select([self._link], [], [], self._rng.random() * 0.004)  # it computes
        for server in self._servers:
            server.end_step()
        for prompt, chunk in zip(batch, chunks, strict=True):
            prompt.next_token = chunk.token_end
            if chunk.token_end == prompt.order.tokens:
                self._finish(prompt, 42, computed=True)

    def _begin(self, prompt: _Prompt) -> None:
        # Oldest first, so that what is free keeps its marks for long.
        prompt.blocks = [self.free.popleft() for _ in range(self.blocks_of(prompt.order.tokens))]
        prompt.next_token = prompt.order.cached
        self.fill(prompt.blocks, 0)
        for layer in range(LAYERS):
            self._write(prompt, layer, 0, prompt.order.cached)
        self._running.append(prompt)

    def _chunk(self, prompt: _Prompt) -> StepChunk:
        order, start = prompt.order, prompt.next_token
        end = min(order.tokens, start + order.chunk)
        blocks = tuple(prompt.blocks[: self.blocks_of(end)])
        return StepChunk(order.key, f"engine-{order.key}", blocks, start, end, order.tokens)

    def _write(self, prompt: _Prompt, layer: int, start: int, end: int) -> None:
        for rank in self.ranks:
            rank.fill_layer(layer, prompt.order.key, prompt.blocks, start, end, prompt.order.tokens)

    def _finish(self, prompt: _Prompt, first_token: int | None, *, computed: bool) -> None:
        for server in self._servers:
            server.finish(prompt.order.key, first_token, computed=computed)
        (self._running if prompt in self._running else self._waiting).remove(prompt)
        if prompt.order.key not in self._kept:  # it was in no step: nobody is to release it
            self._over(prompt)
        self.say(Computed(prompt.order.key))

    def _preempt(self, prompt: _Prompt) -> None:
        for server in self._servers:
            server.preempt([prompt.order.key])
        self._running.remove(prompt)
        self._free(prompt)
        self._waiting.append(prompt)

    def _collect(self) -> None:
        for server in self._servers:
            for request_id in server.take_released():
                prompt = self._kept[request_id.removeprefix("engine-")]
                prompt.released_by += 1
                if prompt.released_by == len(self._servers):
                    self._over(prompt)

    def _free(self, prompt: _Prompt) -> None:
        self.give_back(prompt.blocks)
        prompt.blocks = []

    def _over(self, prompt: _Prompt) -> None:
        self._kept.pop(prompt.order.key, None)
        self._free(prompt)
        self.say(Released(prompt.order.key))


@dataclass(slots=True)
class _Reserved:
    order: Reserve
    blocks: list[int]
    first_block: int  # of those that are received
    reports: dict[int, bool] = field(default_factory=dict)  # by rank: complete
    retries: int = 0


class DecodeWorker(Worker):
    """Uses blocks as soon as their transfer was reported, and sees who else writes to them.

    ``_known`` is what each block of each rank must hold; what a rank waits for is not known.
    """

    def __init__(self, spec: Spec, link: socket.socket, options: TransferOptions) -> None:
        super().__init__(spec, link)
        hits = range(128 // spec.block_tokens)
        self._prefix = [self.free.popleft() for _ in hits]  # always the same ones
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._known = [[layer.clone() for layer in rank.layers] for rank in self.ranks]
        self._clients = [
            DecodeClient(
                rank.pages, rank.geometry, options,
                on_result=lambda: os.eventfd_write(self._bell, 1), on_stuck=self.stuck,
            )
            for rank in self.ranks
        ]  # fmt: skip
        self._reserved: dict[str, _Reserved] = {}

    def run(self) -> None:
        while (orders := self.orders(1.0, self._bell)) is not None:
            for order in orders:
                self._follow(order)
            self._results()
        for client in self._clients:
            client.stop()

    def _follow(self, order: Order) -> None:
        match order:
            case Reserve():
                self._reserve(order)
            case Cancel(key, addresses, incarnation):
                for client in self._clients:
                    client.cancel(key, addresses, incarnation)
            case Count():
                self._look_at_all_blocks("in the end")
                self.say(Free(len(self.free) + len(self._prefix)))

    def _reserve(self, order: Reserve) -> None:
        first = order.cached // self._tokens
        # Blocks that were free for a moment only, or for long: a late write shows in either.
        take = random.choice([self.free.pop, self.free.popleft])
        lacking = range(first, self.blocks_of(order.tokens))
        blocks = self._prefix[:first] + [take() for _ in lacking]
        self._reserved[order.key] = _Reserved(order, blocks, first)
        reservation = Reservation(
            order.key, f"engine-{order.key}", order.addresses, order.incarnation, tuple(blocks),
            order.cached, order.tokens,
        )  # fmt: skip
        for client in self._clients:
            client.reserve(reservation)

    def _results(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        for rank, client in enumerate(self._clients):
            for result in client.take_results():
                self._reported(rank, result)

    def _reported(self, rank: int, result: receive.TransferResult) -> None:
        reserved = self._reserved.get(result.key)
        if reserved is None or rank in reserved.reports:
            self.say(Wrong(f"rank {rank} reported {result.key} twice"))
            return
        order, lacking = reserved.order, reserved.blocks[reserved.first_block :]
        self._know(rank, lacking)
        if result.complete and not self._exact(rank, order, reserved.blocks):
            self.say(Wrong(f"rank {rank} has wrong KV of {order}"))
        reserved.reports[rank] = result.complete
        reserved.retries += result.retries
        self._look_at_all_blocks(f"when rank {rank} reported {order.key}")
        if len(reserved.reports) == len(self.ranks):
            self.give_back(lacking)
            for number in range(len(self.ranks)):
                self._know(number, lacking)
            del self._reserved[order.key]
            complete = all(reserved.reports.values())
            self.say(Result(order.key, complete, reserved.retries))

    def _exact(self, rank: int, order: Reserve, blocks: list[int]) -> bool:
        caches, lacking = self.ranks[rank], slice(order.cached, order.tokens)
        held = caches.geometry.heads
        return all(
            torch.equal(
                caches.read(layer, blocks, order.cached, order.tokens),
                kv[held.start : held.end, lacking],
            )
            for layer, kv in enumerate(kv_of(order.key, caches.geometry, order.tokens))
        )

    def _know(self, rank: int, blocks: list[int]) -> None:
        for known, layer in zip(self._known[rank], self.ranks[rank].layers, strict=True):
            known[blocks] = layer[blocks]

    def _look_at_all_blocks(self, when: str) -> None:
        for number, (rank, known) in enumerate(zip(self.ranks, self._known, strict=True)):
            waited_for = [
                block
                for reserved in self._reserved.values()
                if number not in reserved.reports
                for block in reserved.blocks[reserved.first_block :]
            ]
            for layer, (cache, should) in enumerate(zip(rank.layers, known, strict=True)):
                changed = (cache != should).flatten(1).any(1)
                changed[waited_for] = False
                if changed.any():
                    blocks = changed.nonzero().flatten().tolist()
                    self.say(Wrong(f"rank {number} layer {layer}: {blocks} changed, {when}"))
                    self._know(number, blocks)


class StoreBehind(Store):
    """Another store, seen through this one."""

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


class _Routed(StoreBehind):
    """A pair's store as a decode rank sees it: prefill's gloo is at the end of a link."""

    def __init__(self, store: Store, router_port: int) -> None:
        super().__init__(store)
        self._router_port = router_port

    def get(self, key: str) -> bytes:
        blob = super().get(key)
        if not (at := _port_at(blob)):
            return blob  # decode's own
        port = int.from_bytes(blob[at : at + 2], "big")
        link = linked(self._router_port, "data", PREFILL_HOST, port)
        return blob[:at] + link.to_bytes(2, "big") + blob[at + 2 :]


def _port_at(blob: bytes) -> int:
    """Where in gloo's address, which has a sockaddr_in in it, prefill's port is; 0: nowhere."""
    return max(0, blob.find(socket.inet_aton(PREFILL_HOST)) - 2)


class _NobodyCalls(Store):
    """A pair's store as if a peer had published its address, from which it is to call."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}
        self.port = 0  # of ours

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = bytes(value)

    def wait(self, keys: list[str], *timeout: Any) -> None:
        """Everything is there."""

    def get(self, key: str) -> bytes:
        ours = next(blob for blob in self._values.values() if _port_at(blob))
        at = _port_at(ours)
        self.port = int.from_bytes(ours[at : at + 2], "big")
        return ours.replace(socket.inet_aton(PREFILL_HOST), socket.inet_aton(DECODE_HOST))


def give_up_and_be_called() -> None:
    """What a process does not survive if a call finds what is left of a pair."""
    store = _NobodyCalls()
    try:
        pair.Pair(store, "pair", pair.PREFILL_RANK, torch.device("cpu"), PREFILL_HOST, 0.5)
    except PairError as error:
        with contextlib.suppress(OSError):  # refused; or never answered
            late = socket.create_connection((PREFILL_HOST, store.port), timeout=1)
            late.sendall(bytes(8))  # gloo's number of the connection
            late.recv(1)
        print(error)


def linked(router_port: int, kind: str, host: str, port: int) -> int:
    """The port of a link to an address."""
    with socket.create_connection((LINK_HOST, router_port)) as router:
        router.sendall(f"{kind} {host} {port}\n".encode())
        return int(router.makefile().readline())


def _lead_through_links(spec: Spec) -> None:
    """Gloo's connections and those to a decode worker's store; control addresses are given."""
    gloo: Callable[..., Any] = pair._gloo
    join_store = pair.join_store

    def routed_gloo(store: PrefixStore, *args: Any) -> Any:
        return gloo(_Routed(store, spec.router_port), *args)

    def routed_store(host: str, port: int, timeout_s: float) -> TCPStore:
        return join_store(LINK_HOST, linked(spec.router_port, "store", host, port), timeout_s)

    if spec.role == "decode":
        pair._gloo = routed_gloo  # type: ignore[assignment]
    else:
        send.join_store = routed_store  # type: ignore[attr-defined]


def _dawdle_over_pages(worker: Worker) -> None:
    """Copies that now and then take so long that everything else happens meanwhile."""
    gather, scatter = PageView.gather, PageView.scatter

    def dawdle() -> None:
        if random.random() < 0.1:
            threading.Event().wait(0.02)

    def slow_gather(self: PageView, area: Any, block_ids: Any, out: torch.Tensor) -> None:
        dawdle()
        gather(self, area, block_ids, out)
        if bool((out > _NEVER_KV).any()):
            worker.say(Wrong("blocks were read after they were free"))

    def slow_scatter(self: PageView, *args: Any) -> None:
        dawdle()
        scatter(self, *args)

    PageView.gather = slow_gather  # type: ignore[method-assign]
    PageView.scatter = slow_scatter  # type: ignore[method-assign,assignment]


class _Exceptions(logging.Handler):
    """A defect of the stream's own is logged with its exception."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(logging.ERROR)
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._worker.say(Wrong(self.format(record)))


def _work(spec: Spec, link: socket.socket) -> None:
    torch.set_num_threads(1)
    receive._PING_S, send._SWEEP_S = _PING_S, _SWEEP_S
    _lead_through_links(spec)
    # ZeroMQ's threads are there from the start.
    first: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    logging.basicConfig(format=f"%(asctime)s {spec.incarnation} %(message)s")
    host, kind = (
        (DECODE_HOST, DecodeWorker) if spec.role == "decode" else (PREFILL_HOST, PrefillWorker)
    )
    worker = kind(spec, link, replace(OPTIONS, incarnation=spec.incarnation, host=host))
    _dawdle_over_pages(worker)
    faulthandler.register(signal.SIGUSR1)  # says where all threads are
    logging.getLogger().addHandler(_Exceptions(worker))
    threading.excepthook = lambda args: worker.say(Wrong(f"{args.thread}: {args.exc_value!r}"))
    try:
        worker.say(Ready(os.getpid(), worker.addresses()))
        worker.run()
    except Exception:
        worker.say(Wrong(traceback.format_exc()))
        raise
    first.close()


def main(nursery: socket.socket) -> None:
    """Fork a worker for each Spec that comes, with the socket that comes with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while (handed := socket.recv_fds(nursery, MAX_PACKET_BYTES, 1))[0]:
        data, (fd,), _, _ = handed
        link = socket.socket(fileno=fd)
        if os.fork() == 0:
            nursery.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _work(msgspec.msgpack.decode(data, type=Spec), link)
            os._exit(0)
        link.close()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
