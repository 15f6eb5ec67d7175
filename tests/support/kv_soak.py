"""Prefill and decode workers as processes to torment: an engine's calls, and no engine.

One parent process imports everything once and forks a worker for each ``Spec`` that it is handed
(``main``). A worker does what it is told over a packet socket, and says there what it sees; it ends
when that socket does. It checks as it goes, and says ``Wrong``.

What a prompt's KV is depends on its key, layer, head and token (``kv_of``) and on nothing else.
Blocks that belong to nobody hold negative numbers, which are never KV.
"""

from __future__ import annotations

import logging
import os
import random
import select
import signal
import socket
import sys
import threading
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch
import zmq
from torch.distributed import PrefixStore, Store, TCPStore

from kv_transfer import pair, receive, send
from kv_transfer.geometry import KvGeometry, heads_of
from kv_transfer.options import TransferOptions
from kv_transfer.pages import KvPages
from kv_transfer.receive import DecodeClient, Reservation
from kv_transfer.release import Releaser
from kv_transfer.send import PrefillServer, StepChunk

LAYERS, HEADS, CONTENT = 4, 2, 8
# Gloo's side with the greater address calls the other: so decode calls prefill, in any case.
PREFILL_HOST, LINK_HOST, DECODE_HOST = "127.0.0.1", "127.0.0.1", "127.0.0.2"
OPTIONS = TransferOptions(
    host="",
    incarnation="",
    token="secret",
    message_bytes=3 * 16 * HEADS * CONTENT * 4,
    staging_buffers=2,
    pair_timeout_s=2,
    reserve_timeout_s=2,
    prefill_timeout_s=2,
    transfer_timeout_s=2,
    peer_lease_s=1,
    pair_idle_s=1,
    max_pairs=6,
    max_pending=64,
)
_PING_S, _SWEEP_S = 0.2, 0.1  # in proportion to that lease
MAX_PACKET_BYTES = 32 * 1024
_ENGINE_LOOKS_S = 0.01


class Spec(msgspec.Struct, frozen=True):
    role: str  # "prefill" or "decode"
    incarnation: str
    tp_size: int
    block_tokens: int
    layout: str  # "HNC" or "NHC"
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
    """▸ prefill: the engine takes the blocks away and computes once more, later."""

    key: str


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


def kv_of(key: str, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """int32 ``[tokens, heads of the model, content]``, never negative."""
    first = zlib.crc32(f"{key} {layer}".encode()) & 0x3FFFFFFF
    inside = torch.arange(HEADS * CONTENT, dtype=torch.int32).view(HEADS, CONTENT)
    return first + tokens.to(torch.int32).view(-1, 1, 1) * (HEADS * CONTENT) + inside


class Rank:
    """One rank's caches."""

    def __init__(self, spec: Spec, rank: int) -> None:
        self.block_tokens = spec.block_tokens
        self.heads = heads_of(rank, spec.tp_size, HEADS)
        self.geometry = KvGeometry(
            "tiny", "int32", LAYERS, HEADS, CONTENT, 4, spec.block_tokens, spec.layout, True,
            spec.tp_size, rank,
        )  # fmt: skip
        heads, tokens = len(self.heads), spec.block_tokens
        inside = (heads, tokens) if spec.layout == "HNC" else (tokens, heads)
        shape = (spec.blocks, *inside, CONTENT)
        caches = [torch.full(shape, -1, dtype=torch.int32) for _ in range(LAYERS)]
        if spec.layout == "NHC":
            caches = [cache.transpose(1, 2) for cache in caches]
        self.caches = caches  # [blocks, heads, tokens, content] each

    def _place(self, blocks: list[int], tokens: torch.Tensor) -> tuple[Any, ...]:
        at = torch.tensor(blocks)[tokens // self.block_tokens]
        return at, slice(None), tokens % self.block_tokens

    def _kv(self, key: str, layer: int, tokens: torch.Tensor) -> torch.Tensor:
        return kv_of(key, layer, tokens)[:, self.heads.start : self.heads.end]

    def write(self, key: str, layer: int, blocks: list[int], tokens: torch.Tensor) -> None:
        self.caches[layer][self._place(blocks, tokens)] = self._kv(key, layer, tokens)

    def holds(self, key: str, blocks: list[int], tokens: torch.Tensor) -> bool:
        """Whether these blocks hold exactly this KV."""
        place = self._place(blocks, tokens)
        return all(
            torch.equal(cache[place], self._kv(key, layer, tokens))
            for layer, cache in enumerate(self.caches)
        )

    def fill(self, blocks: list[int], value: int) -> None:
        for cache in self.caches:
            cache[torch.tensor(blocks, dtype=torch.int64)] = value


class Worker:
    """What prefill and decode workers have in common."""

    def __init__(self, spec: Spec, link: socket.socket) -> None:
        self._link = link
        self.free = list(range(spec.blocks))  # the newest is taken first

    def say(self, report: Report) -> None:
        """From any thread: a packet is sent whole or not at all."""
        self._link.send(packet(report))

    def addresses(self) -> tuple[str, ...]:
        return ()

    def take(self, blocks: int) -> list[int]:
        return [self.free.pop() for _ in range(blocks)]

    def orders(self, timeout_s: float, *others: socket.socket) -> list[Order] | None:
        """What there is to do, perhaps nothing within the time; None: it is over."""
        ready, _, _ = select.select([self._link, *others], [], [], timeout_s)
        orders: list[Order] = []
        while self._link in ready:
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
        self._tokens = spec.block_tokens
        self._ranks = [Rank(spec, rank) for rank in range(spec.tp_size)]
        self._servers = [
            PrefillServer(KvPages(rank.caches), rank.geometry, options, on_stuck=self._stuck)
            for rank in self._ranks
        ]
        self._front_end = Releaser(self.addresses(), options.token)
        self._waiting: deque[_Prompt] = deque()
        self._running: list[_Prompt] = []
        self._kept: dict[str, _Prompt] = {}  # begun, and not released
        self._fills = -1

    def addresses(self) -> tuple[str, ...]:
        return tuple(server.address for server in self._servers)

    def _stuck(self, reason: str) -> None:
        self.say(Wrong(reason))

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
            case Preempt(key):
                for prompt in [p for p in self._running if p.order.key == key]:
                    self._preempt(prompt)
            case Release(key):
                self._front_end.release(key)
            case Count():
                self.say(Free(len(self.free)))

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._tokens)

    def _step(self) -> None:
        while self._waiting and len(self.free) >= self._blocks_of(self._waiting[0].order.tokens):
            prompt = self._waiting.popleft()
            self._begin(prompt)
        batch = self._rng.sample(self._running, min(len(self._running), 3))
        if not batch:
            return
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
        prompt.blocks = self.take(self._blocks_of(prompt.order.tokens))
        prompt.next_token = prompt.order.cached
        for layer in range(LAYERS):
            self._write(prompt, layer, 0, prompt.order.cached)
        self._running.append(prompt)
        self._kept[prompt.order.key] = prompt

    def _chunk(self, prompt: _Prompt) -> StepChunk:
        order, start = prompt.order, prompt.next_token
        end = min(order.tokens, start + order.chunk)
        blocks = tuple(prompt.blocks[: self._blocks_of(end)])
        return StepChunk(order.key, f"engine-{order.key}", blocks, start, end, order.tokens)

    def _write(self, prompt: _Prompt, layer: int, start: int, end: int) -> None:
        for rank in self._ranks:
            rank.write(prompt.order.key, layer, prompt.blocks, torch.arange(start, end))

    def _finish(self, prompt: _Prompt, first_token: int | None, *, computed: bool) -> None:
        for server in self._servers:
            server.finish(prompt.order.key, first_token, computed=computed)
        if prompt in self._running:
            self._running.remove(prompt)
        else:
            self._waiting.remove(prompt)
            if prompt.order.key not in self._kept:  # never begun: nobody is to release it
                self._free(prompt)
        self.say(Computed(prompt.order.key))

    def _preempt(self, prompt: _Prompt) -> None:
        for server in self._servers:
            server.preempt([prompt.order.key])
        self._running.remove(prompt)
        self._scribble(prompt.blocks)  # the engine needs them for another one, now
        self._waiting.append(prompt)

    def _collect(self) -> None:
        for server in self._servers:
            for request_id in server.take_released():
                prompt = self._kept[request_id.removeprefix("engine-")]
                prompt.released_by += 1
                if prompt.released_by == len(self._servers):
                    self._free(prompt)

    def _free(self, prompt: _Prompt) -> None:
        self._kept.pop(prompt.order.key, None)
        self._scribble(prompt.blocks)
        self.say(Released(prompt.order.key))

    def _scribble(self, blocks: list[int]) -> None:
        """Blocks that are free may hold anything, from now on."""
        self._fills -= 1
        for rank in self._ranks:
            rank.fill(blocks, self._fills)
        self.free += blocks
        blocks.clear()


@dataclass(slots=True)
class _Reserved:
    order: Reserve
    blocks: list[int]
    first_block: int  # of those that are received
    reports: dict[int, bool] = field(default_factory=dict)  # by rank: complete
    retries: int = 0


class DecodeWorker(Worker):
    """Uses blocks again as soon as their transfer was reported, and sees who else writes to them.

    ``_known`` is what each block of each rank must hold; what a rank waits for is not known.
    """

    def __init__(self, spec: Spec, link: socket.socket, options: TransferOptions) -> None:
        super().__init__(spec, link)
        self._tokens = spec.block_tokens
        self._prefix = self.take(blocks=128 // spec.block_tokens)  # hits: always the same ones
        self._ring, ringer = socket.socketpair()
        ringer.setblocking(False)
        self._ranks = [Rank(spec, rank) for rank in range(spec.tp_size)]
        self._known = [[cache.clone() for cache in rank.caches] for rank in self._ranks]
        self._clients = [
            DecodeClient(
                KvPages(rank.caches), rank.geometry, options,
                on_result=lambda: _ring(ringer), on_stuck=lambda why: self.say(Wrong(why)),
            )
            for rank in self._ranks
        ]  # fmt: skip
        self._reserved: dict[str, _Reserved] = {}
        self._fills = -1

    def run(self) -> None:
        while (orders := self.orders(1.0, self._ring)) is not None:
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
                self.say(Free(len(self.free)))

    def _reserve(self, order: Reserve) -> None:
        first = order.cached // self._tokens
        blocks = self._prefix[:first] + self.take(-(-order.tokens // self._tokens) - first)
        self._reserved[order.key] = _Reserved(order, blocks, first)
        reservation = Reservation(
            order.key, f"engine-{order.key}", order.addresses, order.incarnation, tuple(blocks),
            order.cached, order.tokens,
        )  # fmt: skip
        for client in self._clients:
            client.reserve(reservation)

    def _results(self) -> None:
        _silence(self._ring)
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
        tokens = torch.arange(order.cached, order.tokens)
        if result.complete and not self._ranks[rank].holds(order.key, reserved.blocks, tokens):
            self.say(Wrong(f"rank {rank} has wrong KV of {order}"))
        reserved.reports[rank] = result.complete
        reserved.retries += result.retries
        self._look_at_all_blocks(f"when rank {rank} reported {order.key}")
        if len(reserved.reports) == len(self._ranks):
            self._use(lacking)
            del self._reserved[order.key]
            complete = all(reserved.reports.values())
            self.say(Result(order.key, complete, reserved.retries))

    def _know(self, rank: int, blocks: list[int]) -> None:
        at = torch.tensor(blocks)
        for known, cache in zip(self._known[rank], self._ranks[rank].caches, strict=True):
            known[at] = cache[at]

    def _use(self, blocks: list[int]) -> None:
        """The engine writes its own into these blocks, and soon gives them to another request."""
        self._fills -= 1
        at = torch.tensor(blocks)
        for rank, known in zip(self._ranks, self._known, strict=True):
            for cache in (*rank.caches, *known):
                cache[at] = self._fills
        self.free += blocks

    def _look_at_all_blocks(self, when: str) -> None:
        for number, (rank, known) in enumerate(zip(self._ranks, self._known, strict=True)):
            waited_for = [
                block
                for reserved in self._reserved.values()
                if number not in reserved.reports
                for block in reserved.blocks[reserved.first_block :]
            ]
            for layer, (cache, should) in enumerate(zip(rank.caches, known, strict=True)):
                changed = (cache != should).flatten(1).any(1)
                changed[waited_for] = False
                if changed.any():
                    blocks = changed.nonzero().flatten().tolist()
                    self.say(Wrong(f"rank {number} layer {layer}: {blocks} changed, {when}"))
                    self._know(number, blocks)


def _ring(ringer: socket.socket) -> None:
    try:
        ringer.send(b"\0")
    except BlockingIOError:
        pass  # it rings already


def _silence(ring: socket.socket) -> None:
    try:
        while ring.recv(4096, socket.MSG_DONTWAIT):
            pass
    except BlockingIOError:
        pass


class _Routed(Store):
    """A pair's store as a decode rank sees it: prefill's gloo is at the end of a link."""

    def __init__(self, store: Store, router_port: int) -> None:
        super().__init__()
        self._store = store
        self._router_port = router_port

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self._store.wait(keys, *timeout)

    def get(self, key: str) -> bytes:
        """Gloo's blob, with a sockaddr_in in it."""
        blob: bytes = self._store.get(key)
        port_at = blob.find(socket.inet_aton(PREFILL_HOST)) - 2
        if port_at < 0:
            return blob  # decode's own
        port = int.from_bytes(blob[port_at : port_at + 2], "big")
        link = linked(self._router_port, "data", PREFILL_HOST, port)
        return blob[:port_at] + link.to_bytes(2, "big") + blob[port_at + 2 :]


def linked(router_port: int, kind: str, host: str, port: int) -> int:
    """The port of a link to an address."""
    with socket.create_connection((LINK_HOST, router_port)) as router:
        router.sendall(f"{kind} {host} {port}\n".encode())
        return int(router.makefile().readline())


def _lead_through_links(spec: Spec) -> None:
    """Gloo's connections and those to a decode worker's store; control addresses are given."""
    gloo: Callable[..., Any] = pair._gloo
    join_store: Callable[..., TCPStore] = send.join_store

    def routed_gloo(store: PrefixStore, *args: Any) -> Any:
        return gloo(_Routed(store, spec.router_port), *args)

    def routed_store(host: str, port: int, timeout_s: float) -> TCPStore:
        return join_store(
            LINK_HOST, linked(spec.router_port, "store", host, port), timeout_s
        )

    if spec.role == "decode":
        pair._gloo = routed_gloo
    else:
        send.join_store = routed_store


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
    zmq.Context.instance().socket(zmq.DEALER).close()  # its threads are there from the start
    logging.basicConfig(format=f"%(asctime)s {spec.incarnation} %(message)s")
    host, kind = (
        (DECODE_HOST, DecodeWorker) if spec.role == "decode" else (PREFILL_HOST, PrefillWorker)
    )
    worker = kind(spec, link, replace(OPTIONS, incarnation=spec.incarnation, host=host))
    logging.getLogger().addHandler(_Exceptions(worker))
    threading.excepthook = lambda args: worker.say(Wrong(f"{args.thread}: {args.exc_value!r}"))
    try:
        worker.say(Ready(os.getpid(), worker.addresses()))
        worker.run()
    except Exception:
        worker.say(Wrong(traceback.format_exc()))


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
