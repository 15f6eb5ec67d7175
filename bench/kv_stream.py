"""The KV stream by itself, between two processes: how fast, how well hidden, what it costs.

A prefill process, bound to core 0, computes made-up prompts: for each layer of each chunk of 512
tokens some matrix products, then the hooks that vLLM would call. A decode process reserves and
receives, one client for each pair, each with a cache of its own.

    gbps              KV that lies there already, from the first header to the last manifest
    raw_gbps          as many bytes by ProcessGroup.send/recv alone, from and to contiguous memory,
                      in messages of the same size, as many at a time
    memcpy_gbps       one thread copies messages of that size (read + written counts once)
    hidden_share      of the bytes, sent before the last layer was computed
    prefill_slowdown  time of the prefill with the stream / without, in turns; 1.00 is none
    tail_ms           last layer computed -> manifest complete at decode
    handoff_ms        first token sampled -> the decode engine's thread has the result

For SmolLM2 and one pair, vLLM takes the place of the made-up prefill (``--no-engines``: not): there
``handoff_ms`` is P's first token -> D's second, minus one decode step, and the slowdown, the hidden
share and the tail are those of the real engines; see ``bench.prefill``.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.report import Report, quantile
from kv_transfer.geometry import KvGeometry
from kv_transfer.kv_caches import KvPages
from kv_transfer.options import TransferOptions
from kv_transfer.pair import DECODE_RANK, PREFILL_RANK, Pair, PendingWork, host_store, join_store
from kv_transfer.receive.client import DecodeClient, Reservation, TransferResult
from kv_transfer.send.server import PrefillServer, StepChunk

MIB = 1 << 20
CHUNK_TOKENS = 512  # of all prompts together, in one engine step
TIMEOUT_S = 120.0
GEOMETRIES = {
    # As vLLM's CPU build lays it out, and as its CUDA build does by default.
    "smollm2-135m": KvGeometry("smollm2-135m", "bfloat16", 30, 3, 128, 2, 128, "LBHNC", True, 1, 0),
    "llama-3-8b": KvGeometry("llama-3-8b", "bfloat16", 32, 8, 256, 2, 16, "LBHNC", True, 1, 0),
}


def options(incarnation: str, message_bytes: int, staging_buffers: int) -> TransferOptions:
    return TransferOptions(
        host="127.0.0.1",
        incarnation=incarnation,
        token="bench",
        message_bytes=message_bytes,
        staging_buffers=staging_buffers,
        pair_timeout_s=TIMEOUT_S,
        reserve_timeout_s=TIMEOUT_S,
        prefill_timeout_s=TIMEOUT_S,
        transfer_timeout_s=TIMEOUT_S,
        peer_lease_s=TIMEOUT_S,
        pair_idle_s=TIMEOUT_S,
        max_pairs=8,
        max_pending=64,
        cores=frozenset(os.sched_getaffinity(0)),
    )


def caches(geometry: KvGeometry, blocks: int) -> list[torch.Tensor]:
    shape = (blocks, geometry.total_kv_heads, geometry.block_tokens, geometry.content)
    dtype = getattr(torch, geometry.dtype)
    # Written to, so that the pages are there before the clock runs.
    return [torch.full(shape, 0.5, dtype=dtype) for _ in range(geometry.num_layers)]


@dataclass(frozen=True)
class Case:
    geometry: KvGeometry
    tokens: int
    pairs: int
    message_bytes: int
    staging_buffers: int

    @property
    def blocks(self) -> int:
        """Of one prompt."""
        return -(-self.tokens // self.geometry.block_tokens)

    @property
    def num_bytes(self) -> int:
        """Of all prompts."""
        return self.pairs * self.blocks * self.geometry.num_layers * self.geometry.block_bytes

    @cached_property  # not while the clock runs
    def block_ids(self) -> tuple[int, ...]:
        """Of a prompt, in a cache that has been in use: in no order."""
        return tuple(random.Random(0).sample(range(self.blocks), self.blocks))


# ---- the prefill process -------------------------------------------------------------------


class PrefillSide:
    """Answers the calls that come over the pipe: ``[method, *arguments]``."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._options = options("p", case.message_bytes, case.staging_buffers)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        self._server = PrefillServer(
            KvPages(caches(case.geometry, case.blocks)), case.geometry, self._options
        )
        self._matrix = torch.rand(256, 256)
        self._products = 0

    def address(self) -> str:
        return self._server.address

    def calibrate(self, tokens_per_s: float) -> None:
        """How much work one layer of a whole chunk is."""
        layer_s = CHUNK_TOKENS / tokens_per_s / self._case.geometry.num_layers
        self._work(200)
        began_s = time.monotonic()
        self._work(1000)
        self._products = max(1, round(1000 * layer_s / (time.monotonic() - began_s)))

    def _work(self, products: int) -> None:
        for _ in range(products):
            torch.mm(self._matrix, self._matrix)

    def prefill(self, keys: list[str], *, work: bool) -> tuple[float, float, float]:
        """Compute a prompt for each key, in chunks of all of them.

        Returns:
            When it began, when the last layer was computed, when the first tokens were there.
        """
        case, server = self._case, self._server
        step = max(1, CHUNK_TOKENS // case.pairs)
        blocks = case.block_ids
        began_s = time.monotonic()
        for start in range(0, case.tokens, step):
            end = min(case.tokens, start + step)
            held = blocks[: -(-end // case.geometry.block_tokens)]
            server.begin_step(
                [StepChunk(key, f"e-{key}", held, start, end, case.tokens) for key in keys]
            )
            products = self._products * (end - start) * case.pairs // CHUNK_TOKENS if work else 0
            for layer in range(case.geometry.num_layers):
                self._work(products)
                server.layer_done(layer + 1)
            server.end_step()
        computed_s = time.monotonic()
        for key in keys:
            server.finish(key, 7, computed=True)
        sampled_s = time.monotonic()
        return began_s, computed_s, sampled_s

    def plain(self) -> float:
        """Seconds for the same work without the stream."""
        began_s, computed_s, _ = self.prefill([], work=True)
        return computed_s - began_s

    def raw(self, port: int, pair_ids: list[str]) -> None:
        """Send as many bytes as the KV has on each pair, once the other end is there."""
        messages = [raw_messages(self._case) for _ in pair_ids]

        def send(pair: Pair) -> None:
            self._options.bind_this_thread()
            pair.receive(torch.zeros(1)).wait(TIMEOUT_S)
            pump(pair.send, messages.pop(), self._case.staging_buffers)

        with_pairs(self._options, "127.0.0.1", port, pair_ids, PREFILL_RANK, send)

    def stop(self) -> None:
        self._server.stop()


def prefill_process(case: Case, pipe: Connection) -> None:
    side = PrefillSide(case)
    while True:
        name, *arguments = pipe.recv()
        keywords = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        pipe.send(getattr(side, name)(*arguments, **keywords))
        if name == "stop":
            return


# ---- raw process groups --------------------------------------------------------------------


def raw_messages(case: Case) -> tuple[torch.Tensor, ...]:
    """The bytes of one pair, contiguous, cut into messages."""
    data = torch.ones(case.num_bytes // case.pairs // 8, dtype=torch.int64)
    messages: tuple[torch.Tensor, ...] = data.split(case.message_bytes // 8)
    return messages


def pump(
    start: Callable[[torch.Tensor], PendingWork], messages: Iterable[torch.Tensor], depth: int
) -> None:
    """Keep ``depth`` messages on their way."""
    pending: list[PendingWork] = []
    for message in messages:
        if len(pending) == depth:
            pending.pop(0).wait(TIMEOUT_S)
        pending.append(start(message))
    for work in pending:
        work.wait(TIMEOUT_S)


def with_pairs(
    settings: TransferOptions, host: str, port: int, pair_ids: list[str], rank: int,
    use: Callable[[Pair], None],
) -> None:  # fmt: skip
    """Make a process group for each id, and use each in a thread of its own."""
    device = torch.device("cpu")

    def run(pair_id: str) -> None:
        store = join_store(host, port, TIMEOUT_S)
        pair = Pair(store, pair_id, rank, device, settings.host, TIMEOUT_S)
        try:
            use(pair)
        finally:
            pair.aborted(TIMEOUT_S)

    threads = [threading.Thread(target=run, args=(pair_id,)) for pair_id in pair_ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- the decode process --------------------------------------------------------------------


class DecodeSide:
    """One client for each pair; ``call`` reaches the prefill process."""

    def __init__(self, case: Case) -> None:
        self._case = case
        torch.set_num_threads(1)  # of memcpy_s; the stream's copies have no more anyway
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
                KvPages(caches(case.geometry, case.blocks)),
                case.geometry,
                replace(self._options, incarnation=f"d{index}"),
                on_result=self._arrived.release,
            )
            for index in range(case.pairs)
        ]

    def call(self, *message: Any) -> Any:
        self._pipe.send(message)
        return self._pipe.recv()

    def new_keys(self) -> list[str]:
        """One prompt for each client."""
        return [f"{uuid.uuid4().hex}#1" for _ in self._clients]

    def reserve(self, keys: list[str]) -> None:
        blocks = self._case.block_ids
        for key, client in zip(keys, self._clients, strict=True):
            client.reserve(
                Reservation(key, key, (self._address,), "p", blocks, 0, self._case.tokens)
            )

    def results(self) -> tuple[list[TransferResult], list[float]]:
        """Wait for all, as they come: what the engine's thread sees, and when."""
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
        """Seconds that the KV of all prompts takes when all of it lies there."""
        keys = self.new_keys()
        self.call("prefill", keys, {"work": False})
        began_s = time.monotonic()
        self.reserve(keys)
        _, at_s = self.results()
        return at_s[-1] - began_s

    def raw_s(self) -> float:
        """Seconds for the same bytes by send and receive alone."""
        case = self._case
        store = host_store("127.0.0.1", TIMEOUT_S)
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
            pump(pair.receive, messages.pop(), case.staging_buffers)
            spans.append((began_s, time.monotonic()))

        with_pairs(self._options, "127.0.0.1", store.port, pair_ids, DECODE_RANK, receive)
        self._pipe.recv()
        return max(end for _, end in spans) - min(begin for begin, _ in spans)

    def stop(self) -> None:
        for client in self._clients:
            client.stop()
        self.call("stop")
        self._process.join()


def memcpy_s(case: Case) -> float:
    """Seconds in which one thread copies as many bytes, message by message."""
    source = torch.ones(64 * MIB // 8, dtype=torch.int64)
    target = torch.zeros_like(source).add_(1)  # its pages are there before the clock runs
    words = case.message_bytes // 8
    began_s = time.monotonic()
    done = 0
    while done < case.num_bytes:
        at = done // 8 % (source.numel() - words + 1)
        target[at : at + words].copy_(source[at : at + words])
        done += case.message_bytes
    return time.monotonic() - began_s


def measure(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    side = DecodeSide(case)
    try:
        bulk_s, raw_s, copy_s = [], [], []
        plain_s, streamed_s = [], []
        tail_ms: list[float] = []
        handoff_ms: list[float] = []
        hidden = total = 0
        side.bulk_s()  # makes the pairs
        for _ in range(args.rounds):
            bulk_s.append(side.bulk_s())
            raw_s.append(side.raw_s())
            copy_s.append(memcpy_s(case))
        side.call("calibrate", args.tokens_per_s)
        seconds = 2 * case.tokens * case.pairs / args.tokens_per_s
        for _ in range(max(3, min(args.rounds, round(args.budget_s / seconds)))):
            plain_s.append(side.call("plain"))
            side.reserve(keys := side.new_keys())
            side._pipe.send(("prefill", keys, {"work": True}))
            found, at_s = side.results()
            began, computed, sampled = side._pipe.recv()
            streamed_s.append(computed - began)
            tail_ms += [(at - computed) * 1000 for at in at_s]
            handoff_ms += [(at - sampled) * 1000 for at in at_s]
            hidden += sum(result.hidden_bytes for result in found)
            total += sum(result.num_bytes for result in found)
    finally:
        side.stop()

    def gbps(seconds: list[float]) -> float:
        return round(case.num_bytes / statistics.median(seconds) / 1e9, 3)

    return {
        "geometry": name,
        "tokens": case.tokens,
        "pairs": case.pairs,
        "mib": round(case.num_bytes / MIB, 1),
        "message_bytes": case.message_bytes,
        "gbps": gbps(bulk_s),
        "raw_gbps": gbps(raw_s),
        "memcpy_gbps": gbps(copy_s),
        "of_raw": round(statistics.median(raw_s) / statistics.median(bulk_s), 3),
        "hidden_share": round(hidden / total, 4),
        "prefill_slowdown": round(statistics.median(streamed_s) / statistics.median(plain_s), 4),
        "tail_ms": round(statistics.median(tail_ms), 2),
        "handoff_ms_p50": round(statistics.median(handoff_ms), 2),
        "handoff_ms_p99": round(quantile(handoff_ms, 0.99), 2),
        "rounds": len(streamed_s),
        "prefill": "made up",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kv_stream", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES))
    parser.add_argument("--message-bytes", type=int, default=2 * MIB)
    parser.add_argument("--staging-buffers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--budget-s", type=float, default=30, help="of made-up prefills in a row")
    parser.add_argument("--tokens-per-s", type=float, default=1000, help="of the made-up prefill")
    parser.add_argument("--engines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = Report(args.json)
    engines = asyncio.run(measure_engines(args)) if args.engines else {}
    for name in args.geometry:
        for tokens in args.tokens:
            for pairs in args.pairs:
                case = Case(
                    GEOMETRIES[name], tokens, pairs, args.message_bytes, args.staging_buffers
                )
                real = engines.get((name, tokens, pairs), {})
                report.add(**measure(name, case, args) | real)
    report.save()


async def measure_engines(args: argparse.Namespace) -> dict[tuple[str, int, int], dict[str, Any]]:
    """What real engines say, by geometry, tokens and pairs."""
    from bench import prefill  # vLLM: seconds of import

    if "smollm2-135m" not in args.geometry or 1 not in args.pairs:
        return {}
    cases = [  # the model's context has to hold the answer too
        (min(tokens, 8192 - 16), max(3, min(args.rounds, 20_000 // tokens)))
        for tokens in args.tokens
    ]
    overrides = {
        "kv_transfer.message_bytes": args.message_bytes,
        "kv_transfer.staging_buffers": args.staging_buffers,
    }
    rows = [row async for row in prefill.measure(cases, overrides)]
    return {
        ("smollm2-135m", tokens, 1): row | {"tokens": tokens, "prefill": "vllm", "rounds": rounds}
        for tokens, (_, rounds), row in zip(args.tokens, cases, rows, strict=True)
    }


if __name__ == "__main__":
    main()
