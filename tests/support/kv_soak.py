"""Worker processes for the soak test. They make the calls of an engine, without an engine.

One parent process imports everything once and forks a worker for each ``Spec`` that it gets
(``main``). A worker gets its orders over a packet socket and sends its reports over the same
socket. The worker ends when the socket is closed. It checks all results itself and reports a failed
check as ``Wrong``.

The KV of a prompt depends only on its transfer id, layer, head and token. A block that has been
freed holds a number that KV never has.
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
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch
import zmq

from kv_transfer.kv_caches import UnitView
from kv_transfer.options import TransferOptions
from kv_transfer.receive import receiver
from kv_transfer.receive.client import DecodeClient
from kv_transfer.receive.records import Reservation, TransferResult
from kv_transfer.releaser import Releaser
from kv_transfer.send import control
from kv_transfer.send.records import StepChunk
from kv_transfer.send.server import PrefillServer
from tests.support.kv_shapes import RankCaches, geometry_of, kv_of, ranks_of
from tests.support.kv_soak_links import DECODE_HOST, PREFILL_HOST, lead_through_links
from tests.support.kv_soak_messages import (
    MAX_PACKET_BYTES,
    Abort,
    Cancel,
    Compute,
    Computed,
    Count,
    Free,
    Order,
    Preempt,
    Ready,
    Release,
    Released,
    Report,
    Reserve,
    Result,
    Spec,
    Wrong,
    order_in,
    packet,
)
from tests.support.waiting import wait_until

HEADS, LAYERS, CONTENT = 2, 4, 8
OPTIONS = TransferOptions(
    host="",
    incarnation="",
    secret="secret",
    # A message has several layers of a short prompt, or a part of one layer of a long prompt.
    message_bytes=3 * 16 * HEADS * CONTENT * 4,
    staging_buffers=2,
    pair_timeout_s=2,
    reserve_timeout_s=2,
    prefill_timeout_s=2,
    transfer_timeout_s=2,
    peer_lease_s=1,
    pair_idle_s=6,  # the longest timeout: blocks must become free while their pair is open
    max_pairs=5,  # at most 3 with live workers, and 2 more for pairs with dead ones
    max_pending=64,
)
_PING_S, _SWEEP_S = 0.2, 0.1  # short, because peer_lease_s is short
_IDLE_POLL_S = 0.01  # how long an idle prefill engine waits for orders
_NEVER_KV = 1000  # all numbers in KV are smaller


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

    def report(self, report: Report) -> None:
        """Send a report. Any thread may call this, because a packet is sent as a whole."""
        self._link.send(packet(report))

    def stuck(self, reason: str) -> None:
        self.report(Wrong(reason))

    def addresses(self) -> tuple[str, ...]:
        return ()

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._tokens)

    def give_back(self, blocks: list[int]) -> None:
        """Free blocks. Fill them with a number that differs between calls and that KV never has."""
        self._fills += 1
        self.fill(blocks, self._fills)
        self.free += blocks

    def fill(self, blocks: list[int], value: int) -> None:
        for layer in [layer for rank in self.ranks for layer in rank.layers]:
            layer[blocks] = value

    def orders(self, timeout_s: float, *others: int) -> list[Order] | None:
        """Return the orders that have arrived, or None if the link is closed.

        If none has arrived, wait until the link or one of the descriptors ``others`` is readable,
        for at most ``timeout_s``.
        """
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
            orders.append(order_in(data))
        return orders


@dataclass(slots=True, eq=False)
class _Prompt:
    order: Compute
    blocks: list[int] = field(default_factory=list)
    next_token: int = 0
    released_by: int = 0  # number of ranks that have released the blocks


class PrefillWorker(Worker):
    """Computes some prompts per step, layer by layer. Keeps blocks until all ranks release them."""

    def __init__(self, spec: Spec, link: socket.socket, options: TransferOptions) -> None:
        super().__init__(spec, link)
        self._rng = random.Random(spec.seed)
        self._servers = [
            PrefillServer(rank.kv_caches, rank.geometry, options, on_stuck=self.stuck)
            for rank in self.ranks
        ]
        self._front_end = Releaser(self.addresses(), options.secret)
        self._front_end.release("")  # connects before the test counts threads and files
        wait_until(
            lambda: all("" in server.transfers.ended_ids for server in self._servers),
            what="the release has arrived",
        )
        self._waiting: deque[_Prompt] = deque()
        self._running: list[_Prompt] = []
        self._kept: dict[str, _Prompt] = {}  # in at least one step, not yet released

    def addresses(self) -> tuple[str, ...]:
        return tuple(server.address for server in self._servers)

    def run(self) -> None:
        while (orders := self.orders(0 if self._running else _IDLE_POLL_S)) is not None:
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
            case Abort(transfer_id):
                for prompt in (*self._waiting, *self._running):
                    if prompt.order.transfer_id == transfer_id:
                        self._finish(prompt, None, computed=False)
            case Preempt():
                if begun := [p for p in self._running if p.order.transfer_id in self._kept]:
                    self._preempt(self._rng.choice(begun))
            case Release(transfer_id):
                self._front_end.release(transfer_id)
            case Count():
                self.report(Free(len(self.free)))

    def _step(self) -> None:
        while self._waiting and len(self.free) >= self.blocks_of(self._waiting[0].order.tokens):
            prompt = self._waiting.popleft()
            self._begin(prompt)
        batch = self._rng.sample(self._running, min(len(self._running), 3))
        if not batch:
            return
        self._kept |= {prompt.order.transfer_id: prompt for prompt in batch}
        chunks = [self._chunk(prompt) for prompt in batch]
        for server in self._servers:
            server.begin_step(chunks)
        for layer in range(LAYERS):
            for prompt, chunk in zip(batch, chunks, strict=True):
                self._write(prompt, layer, chunk.token_start, chunk.token_end)
            for server in self._servers:
                server.layer_done(layer + 1)
            computing_s = self._rng.random() * 0.004
            select.select([self._link], [], [], computing_s)
        for server in self._servers:
            server.end_step()
        for prompt, chunk in zip(batch, chunks, strict=True):
            prompt.next_token = chunk.token_end
            if chunk.token_end == prompt.order.tokens:
                self._finish(prompt, 42, computed=True)

    def _begin(self, prompt: _Prompt) -> None:
        # Take the blocks that were freed first, so that each block stays free for a long time.
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
        return StepChunk(
            transfer_id=order.transfer_id,
            request_id=f"engine-{order.transfer_id}",
            block_ids=blocks,
            token_start=start,
            token_end=end,
            num_tokens=order.tokens,
        )

    def _write(self, prompt: _Prompt, layer: int, start: int, end: int) -> None:
        for rank in self.ranks:
            rank.fill_layer(
                layer, prompt.order.transfer_id, prompt.blocks, start, end, prompt.order.tokens
            )

    def _finish(self, prompt: _Prompt, first_token_id: int | None, *, computed: bool) -> None:
        for server in self._servers:
            server.request_finished(prompt.order.transfer_id, first_token_id, computed=computed)
        (self._running if prompt in self._running else self._waiting).remove(prompt)
        if prompt.order.transfer_id not in self._kept:  # it was in no step, so no rank releases it
            self._report_released(prompt)
        self.report(Computed(prompt.order.transfer_id))

    def _preempt(self, prompt: _Prompt) -> None:
        for server in self._servers:
            server.preempt([prompt.order.transfer_id])
        self._running.remove(prompt)
        self._free(prompt)
        self._waiting.append(prompt)

    def _collect(self) -> None:
        for server in self._servers:
            for request_id in server.take_released():
                prompt = self._kept[request_id.removeprefix("engine-")]
                prompt.released_by += 1
                if prompt.released_by == len(self._servers):
                    self._report_released(prompt)

    def _free(self, prompt: _Prompt) -> None:
        self.give_back(prompt.blocks)
        prompt.blocks = []

    def _report_released(self, prompt: _Prompt) -> None:
        self._kept.pop(prompt.order.transfer_id, None)
        self._free(prompt)
        self.report(Released(prompt.order.transfer_id))


@dataclass(slots=True)
class _Reserved:
    order: Reserve
    blocks: list[int]
    first_block: int  # index of the first block into which KV is received
    reports: dict[int, bool] = field(default_factory=dict)  # by rank: TransferResult.complete
    retries: int = 0


class DecodeWorker(Worker):
    """Reuses blocks as soon as their transfer is reported, and detects later writes to them.

    ``_known`` is the expected content of each rank's blocks. While a rank has not reported a
    transfer, the rank's blocks of this transfer are not checked.
    """

    def __init__(self, spec: Spec, link: socket.socket, options: TransferOptions) -> None:
        super().__init__(spec, link)
        hits = range(128 // spec.block_tokens)
        self._prefix = [self.free.popleft() for _ in hits]  # shared by all requests
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._known = [[layer.clone() for layer in rank.layers] for rank in self.ranks]
        self._clients = [
            DecodeClient(
                rank.kv_caches, rank.geometry, options,
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
            case Cancel(transfer_id, addresses, incarnation):
                for client in self._clients:
                    client.cancel(transfer_id, addresses, incarnation)
            case Count():
                self._check_all_blocks("at the end")
                self.report(Free(len(self.free) + len(self._prefix)))

    def _reserve(self, order: Reserve) -> None:
        first = order.cached // self._tokens
        # Take the newest or the oldest free blocks. The checks find a late write in both cases.
        take = random.choice([self.free.pop, self.free.popleft])
        lacking = range(first, self.blocks_of(order.tokens))
        blocks = self._prefix[:first] + [take() for _ in lacking]
        self._reserved[order.transfer_id] = _Reserved(order, blocks, first)
        reservation = Reservation(
            transfer_id=order.transfer_id,
            request_id=f"engine-{order.transfer_id}",
            addresses=order.addresses,
            incarnation=order.incarnation,
            block_ids=tuple(blocks),
            token_start=order.cached,
            token_end=order.tokens,
        )
        for client in self._clients:
            client.reserve(reservation)

    def _results(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        for rank, client in enumerate(self._clients):
            for result in client.take_results():
                self._reported(rank, result)

    def _reported(self, rank: int, result: TransferResult) -> None:
        reserved = self._reserved.get(result.transfer_id)
        if reserved is None or rank in reserved.reports:
            self.report(Wrong(f"rank {rank} reported {result.transfer_id} twice"))
            return
        order, lacking = reserved.order, reserved.blocks[reserved.first_block :]
        self._remember(rank, lacking)
        if result.complete and not self._exact(rank, order, reserved.blocks):
            self.report(Wrong(f"rank {rank} has wrong KV of {order}"))
        reserved.reports[rank] = result.complete
        reserved.retries += result.retries
        self._check_all_blocks(f"when rank {rank} reported {order.transfer_id}")
        if len(reserved.reports) == len(self.ranks):
            self.give_back(lacking)
            for number in range(len(self.ranks)):
                self._remember(number, lacking)
            del self._reserved[order.transfer_id]
            complete = all(reserved.reports.values())
            self.report(Result(order.transfer_id, complete, reserved.retries))

    def _exact(self, rank: int, order: Reserve, blocks: list[int]) -> bool:
        caches, lacking = self.ranks[rank], slice(order.cached, order.tokens)
        held = caches.geometry.heads
        return all(
            torch.equal(
                caches.read(layer, blocks, order.cached, order.tokens),
                kv[held.start : held.end, lacking],
            )
            for layer, kv in enumerate(kv_of(order.transfer_id, caches.geometry, order.tokens))
        )

    def _remember(self, rank: int, blocks: list[int]) -> None:
        for known, layer in zip(self._known[rank], self.ranks[rank].layers, strict=True):
            known[blocks] = layer[blocks]

    def _check_all_blocks(self, when: str) -> None:
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
                    self.report(Wrong(f"rank {number} layer {layer}: {blocks} changed, {when}"))
                    self._remember(number, blocks)


def _slow_down_copies(worker: Worker) -> None:
    """Delay some copies, so that other events happen meanwhile. Report reads of freed blocks."""
    gather, scatter = UnitView.gather, UnitView.scatter

    def wait_sometimes() -> None:
        if random.random() < 0.1:
            threading.Event().wait(0.02)

    def slow_gather(self: UnitView, block_range: Any, block_ids: Any, out: torch.Tensor) -> None:
        wait_sometimes()
        gather(self, block_range, block_ids, out)
        if bool((out > _NEVER_KV).any()):
            worker.report(Wrong("blocks were read after they were free"))

    def slow_scatter(self: UnitView, *args: Any) -> None:
        wait_sometimes()
        scatter(self, *args)

    UnitView.gather = slow_gather  # type: ignore[method-assign]
    UnitView.scatter = slow_scatter  # type: ignore[method-assign,assignment]


class _Exceptions(logging.Handler):
    """Reports every logged exception, because the stream logs its own defects as exceptions."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(logging.ERROR)
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._worker.report(Wrong(self.format(record)))


def _work(spec: Spec, link: socket.socket) -> None:
    torch.set_num_threads(1)
    receiver._PING_S, control._SWEEP_S = _PING_S, _SWEEP_S
    lead_through_links(spec.role, spec.router_port)
    # The first socket starts ZeroMQ's threads, before threads and files are counted.
    first: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    logging.basicConfig(format=f"%(asctime)s {spec.incarnation} %(message)s")
    host, kind = (
        (DECODE_HOST, DecodeWorker) if spec.role == "decode" else (PREFILL_HOST, PrefillWorker)
    )
    worker = kind(spec, link, replace(OPTIONS, incarnation=spec.incarnation, host=host))
    _slow_down_copies(worker)
    faulthandler.register(signal.SIGUSR1)  # prints the stacks of all threads
    logging.getLogger().addHandler(_Exceptions(worker))
    threading.excepthook = lambda args: worker.report(Wrong(f"{args.thread}: {args.exc_value!r}"))
    try:
        worker.report(Ready(os.getpid(), worker.addresses()))
        worker.run()
    except Exception:
        worker.report(Wrong(traceback.format_exc()))
        raise
    first.close()


def main(nursery: socket.socket) -> None:
    """Fork a worker for each Spec that arrives. The Spec comes with the worker's socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
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
