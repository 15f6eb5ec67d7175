"""Run thousands of transfers between four workers while faults of all kinds occur.

Load, faults and checks are separate: ``_Soak.transfer`` does what a router and two engines do, and
``_Soak.fault`` injects a fault. The workers (``tests.support.kv_soak``) check results while they
run, and the test checks the state at the end.

BATON_SOAK_TRANSFERS sets the number of transfers. BATON_SOAK_SEED seeds the choice of transfers and
faults. The same seed repeats neither the timing nor the random choices inside the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import pytest
import torch
from torch.distributed import Store

from kv_transfer.errors import PairError
from kv_transfer.pair import DECODE_RANK, PREFILL_RANK, Pair
from tests.support.kv_pair_stores import linked_stores
from tests.support.kv_soak import OPTIONS
from tests.support.kv_soak_links import LINK_HOST, ForwardingStore
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
    packet,
    report_in,
)
from tests.support.tcp_proxy import Link, time_passes
from tests.support.waiting import until, wait_until

TRANSFERS = int(os.environ.get("BATON_SOAK_TRANSFERS", "2000"))
SEED = int(os.environ.get("BATON_SOAK_SEED", random.SystemRandom().randrange(10**6)))
BLOCKS = 256
# The workers differ in tensor parallelism, block size and layout.
SHAPES = {
    "p0": ("prefill", 1, 16, "HNC"),
    "p1": ("prefill", 2, 16, "HNC/7"),
    "d0": ("decode", 1, 16, "HNC"),
    "d1": ("decode", 2, 24, "NHC"),
}
# Only these are killed. The others live through the whole run, so that small leaks add up.
KILLABLE = ("p1", "d0")
AT_ONCE = 16
TRANSFERS_PER_FAULT = 14
UNWANTED = ("cancelled", "not fetched", "not computed")
ENDS_WITHIN_S = 8.5  # the longest chain of timeouts (7 s), plus the longest pause (1.5 s)
MAX_GROWTH_BYTES = 8 * 2**20


class _Process:
    """A worker process.

    ``owed`` holds the transfers that lack a Released (prefill) or a Result (decode).
    """

    def __init__(self, spec: Spec, link: socket.socket, ready: Ready, wrong: list[str]) -> None:
        self.spec = spec
        self.ready = ready
        self.gone = asyncio.Event()
        self.may_end = False
        self.owed: set[str] = set()
        self.addresses: tuple[str, ...] = ()  # of links to its control servers
        self._link = link
        self._wrong = wrong
        self._awaited: dict[tuple[type[Report], str], asyncio.Future[Report | None]] = {}
        self._listener = asyncio.create_task(self._listen())
        self._process = psutil.Process(ready.pid)
        self._at_first = self.threads_and_files()

    def threads_and_files(self) -> tuple[int, int]:
        return self._process.num_threads(), self._process.num_fds()

    async def as_at_first(self) -> None:
        """Wait until the process has no pairs and as many threads and files as at its start."""
        try:
            await until(
                lambda: self.threads_and_files() == self._at_first,
                what=f"{self.spec.incarnation} has {self._at_first} threads and files again",
                within_s=OPTIONS.pair_idle_s + 5,
            )
        except AssertionError as error:
            self.signal(signal.SIGUSR1)
            has = self.threads_and_files(), self._process.net_connections("tcp")
            raise AssertionError(f"{error}; it has {has}") from None

    def own_bytes(self) -> int:
        memory = self._process.memory_info()
        return int(memory.rss - memory.shared)

    def order(self, order: Order) -> None:
        """Send an order, unless the process is gone."""
        if self.gone.is_set():
            return
        if isinstance(order, Compute | Reserve):
            self.owed.add(order.transfer_id)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._link.send(packet(order))

    def next_report(
        self, kind: type[Report], transfer_id: str = ""
    ) -> asyncio.Future[Report | None]:
        """Return a future of the next report of ``kind``, or of None if the process ends first."""
        future: asyncio.Future[Report | None] = asyncio.get_running_loop().create_future()
        if self.gone.is_set():
            future.set_result(None)
        else:
            self._awaited[kind, transfer_id] = future
        return future

    def signal(self, number: int) -> None:
        os.kill(self.ready.pid, number)

    async def free_blocks(self) -> int:
        """Return the number of free blocks. In decode, the blocks of prefix hits count as free."""
        answer = self.next_report(Free)
        self.order(Count())
        free = await answer
        assert isinstance(free, Free)
        return free.blocks

    async def end(self) -> None:
        """Shut down the socket for orders, which stops the worker, and wait until it is gone."""
        self.may_end = True
        self._link.shutdown(socket.SHUT_WR)
        await self.gone.wait()

    async def kill(self) -> None:
        if not self.gone.is_set():
            self.may_end = True
            self.signal(signal.SIGKILL)
        await self.gone.wait()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionResetError):
            while data := await loop.sock_recv(self._link, MAX_PACKET_BYTES):
                self._take_report(report_in(data))
        self.gone.set()
        if not self.may_end:
            self._wrong.append(f"{self.spec.incarnation} ended by itself")
        self._link.close()
        for kind, transfer_id in list(self._awaited):
            self._answer(kind, transfer_id, None)

    def _take_report(self, report: Report) -> None:
        if isinstance(report, Wrong):
            self._wrong.append(f"{self.spec.incarnation}: {report.what}")
            return
        transfer_id = getattr(report, "transfer_id", "")
        if isinstance(report, Result | Released):
            if transfer_id not in self.owed:
                self._wrong.append(f"{self.spec.incarnation}: a second {report}")
            self.owed.discard(transfer_id)
        self._answer(type(report), transfer_id, report)

    def _answer(self, kind: type[Report], transfer_id: str, report: Report | None) -> None:
        future = self._awaited.pop((kind, transfer_id), None)
        if future is not None and not future.done():
            future.set_result(report)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What happens to one transfer."""

    transfer_id: str
    prefill: str
    decode: str
    tokens: int
    cached_on_p: int
    cached_on_d: int
    chunk: int
    compute_after_s: float = 0.0
    reserve_after_s: float | None = None  # None: when the prompt has been computed
    computed: bool = True
    fetched: bool = True
    on_prefill: Abort | Release | Preempt | None = None
    on_prefill_after_s: float = 0.0
    cancel_after_s: float | None = None

    @staticmethod
    def cast(number: int, dice: random.Random) -> _Plan:
        tokens = dice.choice([dice.randint(1, 40), dice.randint(1, 120), dice.randint(1, 220)])
        prefill, decode = dice.choice(["p0", "p1"]), dice.choice(["d0", "d1"])
        _, _, block_tokens, _ = SHAPES[decode]
        hits = min(tokens - 1, 100)
        transfer_id = f"r{number}"
        interruptions: list[Abort | Release | Preempt] = [
            Abort(transfer_id),
            Release(transfer_id),
            Preempt(),
        ]
        rare, early = dice.random(), dice.random() * 0.05
        compute_after_s, reserve_after_s = dice.choice([(early, 0.0), (0.0, early), (0.0, None)])
        if rare < 0.01:
            reserve_after_s = early  # do not wait for a prompt that is never computed
        return _Plan(
            transfer_id=transfer_id,
            prefill=prefill,
            decode=decode,
            tokens=tokens,
            cached_on_p=dice.choice([0, dice.randint(0, hits // 16) * 16]),
            cached_on_d=dice.choice([0, dice.randint(0, hits // block_tokens) * block_tokens]),
            chunk=dice.randint(8, 100),
            compute_after_s=compute_after_s,
            reserve_after_s=reserve_after_s,
            computed=rare > 0.01,
            fetched=not 0.01 < rare < 0.03,
            on_prefill=dice.choice(interruptions) if 0.03 < rare < 0.12 else None,
            on_prefill_after_s=dice.random() * 0.03,
            cancel_after_s=dice.random() * 0.06 if rare > 0.90 else None,
        )


class _Soak:
    def __init__(self, nursery: socket.socket) -> None:
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.workers: dict[str, _Process] = {}
        self.links: dict[str, list[Link]] = {"control": [], "data": []}
        self.room = asyncio.Semaphore(AT_ONCE)
        self._nursery = nursery
        self._number = 0
        self._changing = {name: asyncio.Lock() for name in SHAPES}
        self._router: asyncio.Server | None = None

    # ---- processes and links -------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._router = await asyncio.start_server(self._route, LINK_HOST, 0)
        for name in SHAPES:
            await self.start(name)
        return self

    async def start(self, name: str) -> None:
        assert self._router is not None
        role, tp_size, block_tokens, layout = SHAPES[name]
        self._number += 1
        spec = Spec(
            role=role,
            incarnation=f"{name}-{self._number}",
            tp_size=tp_size,
            block_tokens=block_tokens,
            layout=layout,
            blocks=BLOCKS,
            router_port=self._router.sockets[0].getsockname()[1],
            seed=self._number,
        )
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with contextlib.ExitStack() as failed:
            failed.enter_context(ours)
            with its:
                socket.send_fds(self._nursery, [packet(spec)], [its.fileno()])
            data = await asyncio.get_running_loop().sock_recv(ours, MAX_PACKET_BYTES)
            assert data, f"{spec.incarnation} did not start"
            ready = report_in(data)
            assert isinstance(ready, Ready), ready
            failed.pop_all()
        process = _Process(spec, ours, ready, self.wrong)
        process.addresses = tuple(
            [await self._control_link(address) for address in ready.addresses]
        )
        self.workers[name] = process

    async def _control_link(self, address: str) -> str:
        host, port = address.removeprefix("tcp://").split(":")
        return f"tcp://{LINK_HOST}:{await self._link('control', host, int(port))}"

    async def _link(self, kind: str, host: str, port: int) -> int:
        link = Link((host, port), once=kind != "control")
        self.links[kind].append(link)
        return await link.open(LINK_HOST)

    async def _route(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind, host, port = (await reader.readline()).decode().split()
        writer.write(b"%d\n" % await self._link(kind, host, int(port)))
        writer.close()

    async def __aexit__(self, *_: object) -> None:
        for process in self.workers.values():
            await process.kill()
        for link in [link for links in self.links.values() for link in links]:
            await link.close()
        if self._router is not None:
            self._router.close()

    # ---- load ----------------------------------------------------------------------------

    async def transfer(self, plan: _Plan) -> None:
        """Run one transfer. The caller has acquired ``room``. Release ``room`` when decode ends."""
        async with asyncio.TaskGroup() as sides:
            try:
                prefill, decode = await self._alive(plan.prefill), await self._alive(plan.decode)
                computed = prefill.next_report(Computed, plan.transfer_id)
                sides.create_task(self._prefill(plan, prefill))
                await self._decode(plan, prefill, decode, computed)
            finally:
                self.room.release()

    async def _alive(self, name: str) -> _Process:
        await until(lambda: not self.workers[name].gone.is_set(), what=f"{name} is back")
        return self.workers[name]

    async def _prefill(self, plan: _Plan, prefill: _Process) -> None:
        if not plan.computed:
            self.counts["not computed"] += 1
            return
        await time_passes(plan.compute_after_s)
        released = prefill.next_report(Released, plan.transfer_id)
        prefill.order(Compute(plan.transfer_id, plan.tokens, plan.cached_on_p, plan.chunk))
        if plan.on_prefill is not None:
            await time_passes(plan.on_prefill_after_s)
            prefill.order(plan.on_prefill)
        await self._in_time(released, prefill, f"no release of {plan}")

    async def _decode(
        self, plan: _Plan, prefill: _Process, decode: _Process,
        computed: asyncio.Future[Report | None],
    ) -> None:  # fmt: skip
        if plan.reserve_after_s is None:
            await computed
        else:
            await time_passes(plan.reserve_after_s)
        if not plan.fetched:
            self.counts["not fetched"] += 1
            return
        where = prefill.addresses, prefill.spec.incarnation
        reported = decode.next_report(Result, plan.transfer_id)
        decode.order(Reserve(plan.transfer_id, *where, plan.tokens, plan.cached_on_d))
        if plan.cancel_after_s is not None:
            await time_passes(plan.cancel_after_s)
            decode.order(Cancel(plan.transfer_id, *where))
        result = await self._in_time(reported, decode, f"no report of {plan}")
        assert isinstance(result, Result | None)
        if result is None:
            self.counts["lost with decode"] += 1
        elif result.complete:
            self.counts["complete"] += 1
            self.counts["retries"] += result.retries
        else:
            self.counts["cancelled" if plan.cancel_after_s is not None else "failed"] += 1

    async def _in_time(
        self, report: asyncio.Future[Report | None], process: _Process, what: str
    ) -> Report | None:
        """Wait for a report. If it does not come in time, add an entry to ``wrong``."""
        try:
            async with asyncio.timeout(ENDS_WITHIN_S):
                return await report
        except TimeoutError:
            process.signal(signal.SIGUSR1)
            self.wrong.append(f"{process.spec.incarnation}: {what}")
            return None

    # ---- faults --------------------------------------------------------------------------

    async def fault(self, dice: random.Random) -> None:
        faults = [self._kill, self._pause, self._cut, self._slow, self._hold]
        (fault,) = dice.choices(faults, weights=[6, 4, 6, 3, 2])
        await fault(dice)

    async def _kill(self, dice: random.Random) -> None:
        name = dice.choice(KILLABLE)
        async with self._changing[name]:
            await self.workers[name].kill()
            await self.start(name)
        self.counts["kills"] += 1

    async def _pause(self, dice: random.Random) -> None:
        name, lease_s = dice.choice(sorted(SHAPES)), OPTIONS.peer_lease_s
        async with self._changing[name]:
            self.workers[name].signal(signal.SIGSTOP)
            await time_passes(lease_s * dice.choice([0.2, 0.5, 1.5]))
            self.workers[name].signal(signal.SIGCONT)
        self.counts["pauses"] += 1

    def _some_link(self, dice: random.Random) -> Link | None:
        kind = dice.choice(["control", "data"])
        in_use = [link for link in self.links[kind] if link.connections]
        return dice.choice(in_use) if in_use else None

    async def _cut(self, dice: random.Random) -> None:
        if (link := self._some_link(dice)) is not None:
            self.counts["cuts"] += link.cut(dice.choice([1, None]))

    async def _slow(self, dice: random.Random) -> None:
        if (link := self._some_link(dice)) is not None:
            link.delay_s = dice.choice([0.002, 0.02, 0.2])
            link.bytes_per_s = dice.choice([1e5, 1e6])
            await time_passes(2 * dice.random())
            link.clear()
            self.counts["slow links"] += 1

    async def _hold(self, dice: random.Random) -> None:
        if (link := self._some_link(dice)) is not None:
            link.hold()
            await time_passes(OPTIONS.peer_lease_s * dice.choice([0.3, 2]))
            link.clear()
            self.counts["held links"] += 1


@contextlib.contextmanager
def _nursery(log: Path) -> Iterator[socket.socket]:
    """Run the process from which all workers are forked. The workers log to ``log``."""
    environment = os.environ | {
        # The process that forks must have one thread.
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with log.open("wb") as stderr, its:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kv_soak", str(its.fileno())],
            pass_fds=[its.fileno()], stderr=stderr, env=environment,
        )  # fmt: skip
    try:
        with ours:
            yield ours
    finally:
        process.wait()


async def _load(soak: _Soak, transfers: int) -> int:
    """Run transfers and faults. Return by how many bytes the survivor that grew most has grown."""
    dice = random.Random(SEED)
    survivors = [soak.workers[name] for name in SHAPES if name not in KILLABLE]
    at_first: list[int] = []
    async with asyncio.TaskGroup() as group:
        for number in range(transfers):
            await soak.room.acquire()
            assert not soak.wrong, soak.wrong
            if number == transfers // 4:  # after warm-up
                at_first = [process.own_bytes() for process in survivors]
            group.create_task(soak.transfer(_Plan.cast(number, dice)))
            if dice.random() < 1 / TRANSFERS_PER_FAULT:
                group.create_task(soak.fault(random.Random(dice.random())))
    now = [process.own_bytes() for process in survivors]
    return max(after - before for before, after in zip(at_first, now, strict=True))


async def _check_settled(soak: _Soak) -> None:
    """Check that no report is owed, all blocks are free, and all new threads and files are gone."""
    for name, process in soak.workers.items():
        await until(
            lambda process=process: not process.owed,  # type: ignore[misc]
            what=f"{name} owes nothing while its pairs are open",
            within_s=OPTIONS.pair_idle_s - 1,
        )
        assert await process.free_blocks() == BLOCKS, name
    for process in soak.workers.values():
        await process.as_at_first()


class _StoreOfDyingPeer(ForwardingStore):
    """The store of an end that publishes its address and dies before it connects."""

    def get(self, key: str) -> bytes:
        raise PairError(f"dead before it could read {key}")


def test_a_pair_whose_peer_dies_while_it_is_made_is_aborted_in_time() -> None:
    """Prefill holds KV while gloo waits for the first connection.

    gloo waits for five times its own timeout, so ``Pair`` sets this to a fifth of ``timeout_s``.
    """
    host, cpu = "127.0.0.1", torch.device("cpu")
    failed = []

    def make(store: Store, rank: int, host: str) -> None:
        try:
            Pair(store, rank, cpu, host, timeout_s=1)
        except PairError:
            failed.append(rank)

    stores = linked_stores(timeout_s=15)
    dying, mine = _StoreOfDyingPeer(stores[DECODE_RANK]), stores[PREFILL_RANK]
    # The end with the greater address connects to the other end: here, decode to prefill.
    decode = threading.Thread(target=make, args=(dying, DECODE_RANK, "127.0.0.2"))
    prefill = threading.Thread(target=make, args=(mine, PREFILL_RANK, host))
    decode.start()
    prefill.start()
    try:
        wait_until(lambda: failed == [DECODE_RANK], what="decode is dead")
        wait_until(lambda: PREFILL_RANK in failed, what="prefill has aborted the pair", within_s=3)
    finally:
        decode.join()
        prefill.join()


def test_a_late_connection_to_an_aborted_pair_does_no_harm() -> None:
    """If gloo's device still listened, it would pass the connection to a freed pair: SIGSEGV."""
    call = "abort_and_accept_late_connection"
    script = f"from tests.support.kv_soak_links import {call}; {call}()"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Connect timeout" in run.stdout, run.stderr
    assert run.returncode == 0


@pytest.mark.timeout(120 + TRANSFERS * 0.1)
async def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print(f"BATON_SOAK_SEED={SEED}; the workers' log is in {tmp_path}")
    with _nursery(tmp_path / "workers.log") as nursery:
        async with _Soak(nursery) as soak:
            grown_bytes = await _load(soak, TRANSFERS)
            with capsys.disabled():
                print(f"\nsoak {SEED}: {dict(soak.counts)}, grown by {grown_bytes} bytes")
            await _check_settled(soak)
            assert grown_bytes < MAX_GROWTH_BYTES
            complete = soak.counts["complete"]
            wanted = TRANSFERS - sum(soak.counts[why] for why in UNWANTED)
            assert complete >= wanted / 2, "too few complete transfers for the run to show much"
            for prefill, decode in itertools.product(("p0", "p1"), ("d0", "d1")):
                plan = _Plan(
                    transfer_id=f"{prefill} {decode}",
                    prefill=prefill,
                    decode=decode,
                    tokens=100,
                    cached_on_p=16,
                    cached_on_d=48,
                    chunk=40,
                )
                await soak.room.acquire()
                await soak.transfer(plan)
            assert soak.counts["complete"] == complete + 4
            for process in soak.workers.values():
                async with asyncio.timeout(OPTIONS.pair_timeout_s * 2):
                    await process.end()
            assert not soak.wrong, soak.wrong
