"""Runs the two ends of the KV stream for ``bench.kv_stream``, each in its own process.

The decode process starts the prefill process and calls methods there over a pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore

from bench.kv_case import TIMEOUT_S, Case, caches, options
from kv_transfer.kv_caches import KvCaches
from kv_transfer.options import TransferOptions
from kv_transfer.pair import DECODE_RANK, PREFILL_RANK, Pair, PendingWork
from kv_transfer.receive.client import DecodeClient
from kv_transfer.receive.records import Reservation, TransferResult
from kv_transfer.send.records import StepChunk
from kv_transfer.send.server import PrefillServer

CHUNK_TOKENS = 512  # most tokens of an engine step, over all prompts together


# ---- the prefill process -------------------------------------------------------------------


class PrefillSide:
    """The prefill end of the stream. ``prefill_process`` calls the methods of this class."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._options = options("p", case.message_bytes, case.staging_buffers)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        self._server = PrefillServer(
            KvCaches(caches(case.geometry, case.blocks)), case.geometry, self._options
        )
        self._matrix = torch.rand(256, 256)
        self._products = 0

    def address(self) -> str:
        return self._server.address

    def calibrate(self, tokens_per_s: float) -> None:
        """Set the number of matrix products for a layer of a full chunk, to reach this speed."""
        layer_s = CHUNK_TOKENS / tokens_per_s / self._case.geometry.num_layers
        self._work(200)
        began_s = time.monotonic()
        self._work(1000)
        self._products = max(1, round(1000 * layer_s / (time.monotonic() - began_s)))

    def _work(self, products: int) -> None:
        for _ in range(products):
            torch.mm(self._matrix, self._matrix)

    def prefill(self, transfer_ids: list[str], *, work: bool) -> tuple[float, float, float]:
        """Compute one prompt for each transfer. Each step computes a part of every prompt.

        Args:
            work: if False, no matrix products are computed.

        Returns:
            Three times on the monotonic clock, in seconds: the prefill begins, the last layer is
            computed, and the first tokens are sampled.
        """
        case, server = self._case, self._server
        step = max(1, CHUNK_TOKENS // case.pairs)
        blocks = case.block_ids
        began_s = time.monotonic()
        for start in range(0, case.tokens, step):
            end = min(case.tokens, start + step)
            held = blocks[: -(-end // case.geometry.block_tokens)]
            server.begin_step(
                [
                    StepChunk(
                        transfer_id=transfer_id,
                        request_id=f"e-{transfer_id}",
                        block_ids=held,
                        token_start=start,
                        token_end=end,
                        num_tokens=case.tokens,
                    )
                    for transfer_id in transfer_ids
                ]
            )
            products = self._products * (end - start) * case.pairs // CHUNK_TOKENS if work else 0
            for layer in range(case.geometry.num_layers):
                self._work(products)
                server.layer_done(layer + 1)
            server.end_step()
        computed_s = time.monotonic()
        for transfer_id in transfer_ids:
            server.request_finished(transfer_id, 7, computed=True)
        sampled_s = time.monotonic()
        return began_s, computed_s, sampled_s

    def plain(self) -> float:
        """Return the seconds that a prefill of all prompts takes without the stream."""
        began_s, computed_s, _ = self.prefill([], work=True)
        return computed_s - began_s

    def raw(self, port: int, pair_ids: list[str]) -> None:
        """On each pair, wait for the receiver, then send as many bytes as one prompt's KV has."""
        messages = [raw_messages(self._case) for _ in pair_ids]

        def send(pair: Pair) -> None:
            self._options.bind_this_thread()
            pair.receive(torch.zeros(1), 1).wait(TIMEOUT_S)
            pump(pair.send, messages.pop(), self._case.staging_buffers)

        with_pairs(self._options, port, pair_ids, PREFILL_RANK, send)

    def stop(self) -> None:
        self._server.stop()


def prefill_process(case: Case, pipe: Connection) -> None:
    """Answer calls ``(method, *arguments)``. A dict at the end contains keyword arguments."""
    side = PrefillSide(case)
    while True:
        name, *arguments = pipe.recv()
        keywords = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        pipe.send(getattr(side, name)(*arguments, **keywords))
        if name == "stop":
            return


# ---- raw process groups --------------------------------------------------------------------


def raw_messages(case: Case) -> tuple[torch.Tensor, ...]:
    """Return contiguous messages. Together, they have the size of one prompt's KV."""
    data = torch.ones(case.num_bytes // case.pairs // 8, dtype=torch.int64)
    messages: tuple[torch.Tensor, ...] = data.split(case.message_bytes // 8)
    return messages


def pump(
    start: Callable[[torch.Tensor], PendingWork], messages: Iterable[torch.Tensor], depth: int
) -> None:
    """Send or receive all messages, with at most ``depth`` of them in flight."""
    pending: list[PendingWork] = []
    for message in messages:
        if len(pending) == depth:
            pending.pop(0).wait(TIMEOUT_S)
        pending.append(start(message))
    for work in pending:
        work.wait(TIMEOUT_S)


def _store(port: int, *, is_server: bool) -> TCPStore:
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=is_server,
        timeout=timedelta(seconds=TIMEOUT_S),
        wait_for_workers=False,
    )


def with_pairs(
    settings: TransferOptions, port: int, pair_ids: list[str], rank: int,
    use: Callable[[Pair], None],
) -> None:  # fmt: skip
    """In one thread for each id, make a pair and call ``use`` with it. Wait for all threads."""
    device = torch.device("cpu")

    def run(pair_id: str) -> None:
        # Each pair has its own connection: a wait blocks all users of its connection.
        store = PrefixStore(pair_id, _store(port, is_server=False))
        pair = Pair(store, rank, device, settings.host, TIMEOUT_S)
        try:
            use(pair)
        finally:
            pair.wait_aborted(TIMEOUT_S)

    threads = [threading.Thread(target=run, args=(pair_id,)) for pair_id in pair_ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- the decode process --------------------------------------------------------------------


class DecodeSide:
    """The decode end of the stream, with one client for each pair.

    The constructor starts the prefill process. ``call`` calls a method of ``PrefillSide`` there.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        # memcpy_s must copy in one thread, as the stream does.
        torch.set_num_threads(1)
        self._options = options("d", case.message_bytes, case.staging_buffers)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=prefill_process, args=(case, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._address: str = self.call("address")
        self._arrived = threading.Semaphore(0)
        self._clients = [
            DecodeClient(
                KvCaches(caches(case.geometry, case.blocks)),
                case.geometry,
                replace(self._options, incarnation=f"d{index}"),
                on_result=self._arrived.release,
            )
            for index in range(case.pairs)
        ]

    def call(self, *message: Any) -> Any:
        self._pipe.send(message)
        return self._pipe.recv()

    def begin_prefill(self, transfer_ids: list[str]) -> None:
        """Start a prefill without waiting for it. Call ``end_prefill`` before the next ``call``."""
        self._pipe.send(("prefill", transfer_ids, {"work": True}))

    def end_prefill(self) -> tuple[float, float, float]:
        """Wait until the prefill ends. Return what ``PrefillSide.prefill`` returns."""
        times: tuple[float, float, float] = self._pipe.recv()
        return times

    def new_transfer_ids(self) -> list[str]:
        """Return a new transfer id for each client."""
        return [f"{uuid.uuid4().hex}#1" for _ in self._clients]

    def reserve(self, transfer_ids: list[str]) -> None:
        blocks = self._case.block_ids
        for transfer_id, client in zip(transfer_ids, self._clients, strict=True):
            client.reserve(
                Reservation(
                    transfer_id=transfer_id,
                    request_id=transfer_id,
                    addresses=(self._address,),
                    incarnation="p",
                    block_ids=blocks,
                    token_start=0,
                    token_end=self._case.tokens,
                )
            )

    def results(self) -> tuple[list[TransferResult], list[float]]:
        """Wait for all results. Return them, and the time at which this thread took each one."""
        found: list[TransferResult] = []
        at_s: list[float] = []
        while len(found) < len(self._clients):
            if not self._arrived.acquire(timeout=TIMEOUT_S):
                raise RuntimeError("a transfer did not end")
            for client in self._clients:
                for result in client.take_results():
                    if not result.complete:
                        raise RuntimeError(f"a transfer failed: {result}")
                    found.append(result)
                    at_s.append(time.monotonic())
        return found, at_s

    def bulk_s(self) -> float:
        """Return the seconds that the transfer takes if all KV is already computed."""
        transfer_ids = self.new_transfer_ids()
        self.call("prefill", transfer_ids, {"work": False})
        began_s = time.monotonic()
        self.reserve(transfer_ids)
        _, at_s = self.results()
        return at_s[-1] - began_s

    def raw_s(self) -> float:
        """Return the seconds that send and receive alone take for the bytes of ``bulk_s``."""
        case = self._case
        store = _store(0, is_server=True)
        pair_ids = [uuid.uuid4().hex for _ in range(case.pairs)]
        self._pipe.send(("raw", store.port, pair_ids))
        messages = [raw_messages(case) for _ in pair_ids]
        all_ready = threading.Barrier(case.pairs)
        spans: list[tuple[float, float]] = []

        def receive(pair: Pair) -> None:
            self._options.bind_this_thread()
            all_ready.wait(TIMEOUT_S)
            began_s = time.monotonic()
            pair.send(torch.zeros(1)).wait(TIMEOUT_S)
            pump(
                lambda message: pair.receive(message, message.numel()),
                messages.pop(),
                case.staging_buffers,
            )
            spans.append((began_s, time.monotonic()))

        with_pairs(self._options, store.port, pair_ids, DECODE_RANK, receive)
        self._pipe.recv()
        return max(end for _, end in spans) - min(begin for begin, _ in spans)

    def stop(self) -> None:
        for client in self._clients:
            client.stop()
        self.call("stop")
        self._process.join()
