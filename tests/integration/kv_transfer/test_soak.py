"""Two prefill and two decode workers, some thousand transfers, and all that can go wrong at once.

The load, the faults and the checks are apart: ``_Soak.transfer`` is what a router and two engines
do, ``_Soak.fault`` what a data centre does, and what must hold in spite of it is checked by the
workers (``tests.support.kv_soak``) and in the end.

BATON_SOAK_TRANSFERS and BATON_SOAK_SEED set the length and repeat a run's dice (not its timing).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support import kv_soak
from tests.support.kv_soak import (
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
)
from tests.support.tcp_proxy import Link, time_passes
from tests.support.waiting import until

TRANSFERS = int(os.environ.get("BATON_SOAK_TRANSFERS", "2000"))
SEED = int(os.environ.get("BATON_SOAK_SEED", random.SystemRandom().randrange(10**6)))
BLOCKS = 200
# Unlike in tensor parallelism, block size and layout. The first of each side is never killed, so
# that what leaks a little with each lost peer adds up.
SHAPES = {
    "p0": ("prefill", 1, 16, "HNC"),
    "p1": ("prefill", 2, 16, "HNC"),
    "d0": ("decode", 1, 16, "HNC"),
    "d1": ("decode", 2, 24, "NHC"),
}
MORTAL = ("p1", "d1")
AT_ONCE = 12
TRANSFERS_A_FAULT = 12
REPORTED_WITHIN_S = 15.0  # several times the sum of the timeouts
MAX_GROWTH_BYTES = 24 * 2**20


class _Process:
    """A worker process and what it owes: prefill a release, decode a report, for each key."""

    def __init__(self, spec: Spec, link: socket.socket, ready: Ready, wrong: list[str]) -> None:
        self.spec = spec
        self.ready = ready
        self.gone = asyncio.Event()
        self.killed = False
        self.owed: set[str] = set()
        self.addresses: tuple[str, ...] = ()  # through links
        self._link = link
        self._wrong = wrong
        self._awaited: dict[tuple[type[Report], str], asyncio.Future[Report | None]] = {}
        self._listener = asyncio.create_task(self._listen())
        self._process = psutil.Process(ready.pid)
        self.at_first = self.threads_and_files()

    def threads_and_files(self) -> tuple[int, int]:
        return self._process.num_threads(), self._process.num_fds()

    def own_bytes(self) -> int:
        memory = self._process.memory_info()
        return int(memory.rss - memory.shared)

    def order(self, order: Order) -> None:
        """Tell it; a process that is gone hears nothing."""
        if self.gone.is_set():
            return
        if isinstance(order, Compute | Reserve):
            self.owed.add(order.key)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._link.send(kv_soak.packet(order))

    def hear(self, kind: type[Report], key: str = "") -> asyncio.Future[Report | None]:
        """Its report of this kind about this key; None if it is gone first."""
        future: asyncio.Future[Report | None] = asyncio.get_running_loop().create_future()
        if self.gone.is_set():
            future.set_result(None)
        else:
            self._awaited[kind, key] = future
        return future

    def signal(self, number: int) -> None:
        os.kill(self.ready.pid, number)

    async def end(self) -> None:
        """Its link closes, and it says goodbye and ends."""
        self._link.shutdown(socket.SHUT_WR)
        await self._listener

    async def kill(self) -> None:
        if not self.gone.is_set():
            self.killed = True
            self.signal(signal.SIGKILL)
        await self._listener

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionResetError):
            while data := await loop.sock_recv(self._link, kv_soak.MAX_PACKET_BYTES):
                self._heard(kv_soak.report_in(data))
        self.gone.set()
        self._link.close()
        for future in self._awaited.values():
            future.set_result(None)
        self._awaited.clear()

    def _heard(self, report: Report) -> None:
        if isinstance(report, Wrong):
            self._wrong.append(f"{self.spec.incarnation}: {report.what}")
            return
        key = getattr(report, "key", "")
        if isinstance(report, Result | Released):
            if key not in self.owed:
                self._wrong.append(f"{self.spec.incarnation}: a second {report}")
            self.owed.discard(key)
        if (future := self._awaited.pop((type(report), key), None)) is not None:
            future.set_result(report)


@dataclass(frozen=True, slots=True)
class _Plan:
    """One transfer as the dice want it."""

    key: str
    prefill: str
    decode: str
    tokens: int
    cached_on_p: int
    cached_on_d: int
    chunk: int
    compute_after_s: float = 0.0
    reserve_after_s: float | None = None  # None: when it was computed
    unfetched: bool = False
    on_prefill: type[Abort | Release | Preempt] | None = None
    on_prefill_after_s: float = 0.0
    cancel_after_s: float | None = None

    @staticmethod
    def cast(number: int, dice: random.Random) -> _Plan:
        tokens = dice.choice([dice.randint(1, 40), dice.randint(1, 120), dice.randint(1, 220)])
        prefill, decode = dice.choice(["p0", "p1"]), dice.choice(["d0", "d1"])
        _, _, block_tokens, _ = SHAPES[decode]
        hits = min(tokens - 1, 100)
        order = dice.choice(["before", "during", "after"])
        unlikely = dice.random()
        return _Plan(
            f"r{number}", prefill, decode, tokens,
            cached_on_p=dice.choice([0, dice.randint(0, hits // 16) * 16]),
            cached_on_d=dice.choice([0, dice.randint(0, hits // block_tokens) * block_tokens]),
            chunk=dice.randint(8, 100),
            compute_after_s=dice.random() * 0.05 if order == "before" else 0,
            reserve_after_s=(
                None if order == "after" else dice.random() * 0.05 * (order == "during")
            ),
            unfetched=unlikely < 0.02,
            on_prefill=dice.choice([Abort, Release, Preempt]) if 0.02 < unlikely < 0.10 else None,
            on_prefill_after_s=dice.random() * 0.08,
            cancel_after_s=dice.random() * 0.12 if unlikely > 0.90 else None,
        )  # fmt: skip


class _Soak:
    def __init__(self, nursery: socket.socket, seed: int) -> None:
        self.seed = seed
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.workers: dict[str, _Process] = {}
        self.links: dict[str, list[Link]] = {"control": [], "store": [], "data": []}
        self._nursery = nursery
        self._number = 0
        self._changing = {name: asyncio.Lock() for name in SHAPES}
        self._router: asyncio.Server | None = None

    # ---- processes and links -------------------------------------------------------------

    async def open(self) -> None:
        self._router = await asyncio.start_server(self._route, kv_soak.LINK_HOST, 0)
        for name in SHAPES:
            await self.start(name)

    async def start(self, name: str) -> None:
        assert self._router is not None
        role, tp_size, block_tokens, layout = SHAPES[name]
        self._number += 1
        spec = Spec(
            role, f"{name}-{self._number}", tp_size, block_tokens, layout, BLOCKS,
            self._router.sockets[0].getsockname()[1], self._number,
        )  # fmt: skip
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            socket.send_fds(self._nursery, [kv_soak.packet(spec)], [its.fileno()])
        ours.setblocking(False)
        data = await asyncio.get_running_loop().sock_recv(ours, kv_soak.MAX_PACKET_BYTES)
        ready = kv_soak.report_in(data)
        assert isinstance(ready, Ready), ready
        process = _Process(spec, ours, ready, self.wrong)
        process.addresses = tuple(
            [await self._control_link(address) for address in ready.addresses]
        )
        self.workers[name] = process

    async def _control_link(self, address: str) -> str:
        host, port = address.removeprefix("tcp://").split(":")
        return f"tcp://{kv_soak.LINK_HOST}:{await self._link('control', host, int(port))}"

    async def _link(self, kind: str, host: str, port: int) -> int:
        link = Link((host, port), once=kind != "control")
        self.links[kind].append(link)
        return await link.open(kv_soak.LINK_HOST)

    async def _route(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind, host, port = (await reader.readline()).decode().split()
        writer.write(b"%d\n" % await self._link(kind, host, int(port)))
        writer.close()

    async def close(self) -> None:
        for process in self.workers.values():
            await process.kill()
        for link in [link for links in self.links.values() for link in links]:
            await link.close()
        if self._router is not None:
            self._router.close()

    # ---- load ----------------------------------------------------------------------------

    async def transfer(self, plan: _Plan) -> None:
        prefill, decode = await self._alive(plan.prefill), await self._alive(plan.decode)
        computed = prefill.hear(Computed, plan.key)
        async with asyncio.TaskGroup() as sides:
            sides.create_task(self._prefill(plan, prefill))
            sides.create_task(self._decode(plan, prefill, decode, computed))

    async def _alive(self, name: str) -> _Process:
        await until(lambda: not self.workers[name].gone.is_set(), what=f"{name} is back")
        return self.workers[name]

    async def _prefill(self, plan: _Plan, prefill: _Process) -> None:
        await time_passes(plan.compute_after_s)
        prefill.order(Compute(plan.key, plan.tokens, plan.cached_on_p, plan.chunk))
        if plan.on_prefill is not None:
            await time_passes(plan.on_prefill_after_s)
            prefill.order(plan.on_prefill(plan.key))

    async def _decode(
        self, plan: _Plan, prefill: _Process, decode: _Process,
        computed: asyncio.Future[Report | None],
    ) -> None:  # fmt: skip
        if plan.reserve_after_s is None:
            await computed
        else:
            await time_passes(plan.reserve_after_s)
        if plan.unfetched:
            self.counts["unfetched"] += 1
            return
        where = prefill.addresses, prefill.spec.incarnation
        reported = decode.hear(Result, plan.key)
        decode.order(Reserve(plan.key, *where, plan.tokens, plan.cached_on_d))
        if plan.cancel_after_s is not None:
            await time_passes(plan.cancel_after_s)
            decode.order(Cancel(plan.key, *where))
        try:
            async with asyncio.timeout(REPORTED_WITHIN_S):
                result = await reported
        except TimeoutError:
            self.wrong.append(f"{decode.spec.incarnation}: nothing was reported of {plan}")
            return
        if not isinstance(result, Result):
            self.counts["lost with decode"] += 1
        elif result.complete:
            self.counts["complete"] += 1
            self.counts["retries"] += result.retries
        else:
            self.counts["cancelled" if plan.cancel_after_s is not None else "failed"] += 1

    # ---- faults --------------------------------------------------------------------------

    async def fault(self, dice: random.Random) -> None:
        faults = [self._kill, self._pause, self._cut, self._slow, self._hold]
        (fault,) = dice.choices(faults, weights=[6, 5, 6, 3, 2])
        await fault(dice)

    async def _kill(self, dice: random.Random) -> None:
        name = dice.choice(MORTAL)
        async with self._changing[name]:
            await self.workers[name].kill()
            await self.start(name)
        self.counts["kills"] += 1

    async def _pause(self, dice: random.Random) -> None:
        name, lease_s = dice.choice(sorted(SHAPES)), kv_soak.OPTIONS.peer_lease_s
        async with self._changing[name]:
            self.workers[name].signal(signal.SIGSTOP)
            await time_passes(lease_s * dice.choice([0.2, 0.5, 1.5, 2.5]))
            self.workers[name].signal(signal.SIGCONT)
        self.counts["pauses"] += 1

    def _some_link(self, dice: random.Random) -> Link | None:
        kind = dice.choices(["control", "store", "data"], weights=[2, 1, 2])[0]
        in_use = [link for link in self.links[kind] if link.connections]
        return dice.choice(in_use) if in_use else None

    async def _cut(self, dice: random.Random) -> None:
        if (link := self._some_link(dice)) is not None:
            self.counts["cuts"] += link.cut()

    async def _slow(self, dice: random.Random) -> None:
        if (link := self._some_link(dice)) is not None:
            link.delay_s = dice.choice([0.002, 0.02, 0.2])
            link.bytes_per_s = dice.choice([1e4, 1e5, 1e6])
            await time_passes(2 * dice.random())
            link.clear()
            self.counts["slow links"] += 1

    async def _hold(self, dice: random.Random) -> None:
        if (link := self._some_link(dice)) is not None:
            link.hold()
            await time_passes(kv_soak.OPTIONS.peer_lease_s * dice.choice([0.3, 3]))
            link.clear()
            self.counts["held links"] += 1


@contextlib.asynccontextmanager
async def _soak(log: Path) -> AsyncIterator[_Soak]:
    nursery, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a fork must have one thread
    with log.open("wb") as stderr, its:
        parent = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kv_soak", str(its.fileno())],
            pass_fds=[its.fileno()], stderr=stderr, env=os.environ | single,
        )  # fmt: skip
    soak = _Soak(nursery, SEED)
    try:
        await soak.open()
        yield soak
    finally:
        await soak.close()
        nursery.close()
        parent.wait()


async def _load(soak: _Soak, transfers: int) -> int:
    """All transfers, with faults; returns the most that an immortal has grown, in bytes."""
    dice, room = random.Random(soak.seed), asyncio.Semaphore(AT_ONCE)
    immortal = [soak.workers[name] for name in SHAPES if name not in MORTAL]
    grown_from: list[int] = []

    async def transfer(plan: _Plan) -> None:
        try:
            await soak.transfer(plan)
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        for number in range(transfers):
            await room.acquire()
            if soak.wrong:
                break
            if number == transfers // 4:
                grown_from = [process.own_bytes() for process in immortal]
            group.create_task(transfer(_Plan.cast(number, dice)))
            if dice.random() < 1 / TRANSFERS_A_FAULT:
                group.create_task(soak.fault(random.Random(dice.random())))
    return max(
        process.own_bytes() - before
        for process, before in zip(immortal, grown_from, strict=True)
    )


async def _settled(soak: _Soak) -> None:
    """Nothing is owed, and blocks, threads and files are as they were at first."""
    for name, process in soak.workers.items():
        await until(lambda process=process: not process.owed, what=f"{name} owes nothing")
        try:
            await until(
                lambda process=process: process.threads_and_files() == process.at_first,
                what=f"{name} has {process.at_first} threads and files again",
            )
        except AssertionError:
            print("DEBUG", name, process.threads_and_files(), process.at_first)
            for t in Path(f"/proc/{process.ready.pid}/task").iterdir(): print((t/"comm").read_text().strip())
            subprocess.run(["ls","-l",f"/proc/{process.ready.pid}/fd"])
            for c in process._process.net_connections("all"): print(c)
            raise
        free = process.hear(Free)
        process.order(Count())
        prefix = 128 // process.spec.block_tokens if process.spec.role == "decode" else 0
        assert await free == Free(BLOCKS - prefix), f"{name} has lost blocks"


@pytest.mark.timeout(120 + TRANSFERS * 0.1)
async def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "workers.log"
    async with _soak(log) as soak:
        began_s = time.monotonic()
        grown = await _load(soak, TRANSFERS)
        with capsys.disabled():
            print(f"\nsoak seed {SEED}: {dict(soak.counts)} grown {grown} {time.monotonic()-began_s:.1f}s log {log}")
        assert not soak.wrong, soak.wrong
        await _settled(soak)
