"""Runs the threads of a real prefill server or decode client one step at a time.

The test controls the clock, the network and the threads. A thread runs when the test tells it to.
It pauses where it waits, sends or receives a message, or copies. While it pauses, anything else can
happen: a request is cancelled, a transfer fails on another rank, a pair is closed.
"""

from __future__ import annotations

import select
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant

from kv_transfer.geometry import KvGeometry, LayerBlockRange
from kv_transfer.kv_caches import UnitView
from kv_transfer.options import TransferOptions

LAYERS, HEADS, BLOCK_TOKENS, CONTENT, BLOCKS = 2, 2, 2, 2, 9
GEOMETRY = KvGeometry(
    model="m",
    dtype="float32",
    num_layers=LAYERS,
    total_kv_heads=HEADS,
    content=CONTENT,
    item_bytes=4,
    block_tokens=BLOCK_TOKENS,
    layout="HNC",
    positions_known=True,
    tp_size=1,
    tp_rank=0,
)
OPTIONS = TransferOptions(
    host="here",
    incarnation="d1",
    secret="secret",
    message_bytes=2 * GEOMETRY.block_bytes,
    staging_buffers=2,
    pair_timeout_s=5,
    reserve_timeout_s=30,
    prefill_timeout_s=30,
    transfer_timeout_s=20,
    pair_idle_s=15,
    peer_lease_s=30,
    max_pairs=5,
    max_pending=3,
)

_PAUSES = 12  # maximum per ``go_to``; enough for a few messages
# Places to which a test lets a thread run. "copy" is drawn more often.
PLACES = ["group", "sent", "received", "wait", "copy", "copy", "copy", "idle"]

index = st.integers(0, 7)  # index into a list, used modulo the length of the list


class Stepped(threading.Thread):
    """A thread that runs only when the test calls ``go``, and then until it pauses or ends."""

    def __init__(
        self, target: Callable[..., None], args: tuple[Any, ...] = (), name: str = "",
        daemon: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(target=target, args=args, name=name, daemon=daemon)
        self.owner = getattr(target, "__self__", None)  # the object whose method the thread runs
        self.ended = False
        self.blocked = False  # waits for a condition
        self.place = "start"
        self._may_go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)

    def start(self) -> None:
        """Do nothing. The first ``go`` starts the thread."""

    def go(self) -> None:
        if self.ident is None:
            super().start()
        self._may_go.release()
        assert self._stopped.acquire(timeout=10), "a thread is blocked, but not at a pause"

    def run(self) -> None:
        self._may_go.acquire()
        try:
            super().run()
        finally:
            self.ended = True
            self._stopped.release()

    def pause(self, place: str) -> None:
        self.place = place
        self._stopped.release()
        self._may_go.acquire()

    def is_alive(self) -> bool:
        return not self.ended

    def join(self, timeout: float | None = None) -> None:
        for _ in range(10):
            self.go_to("nowhere")

    def go_to(self, place: str) -> None:
        """Run until the thread pauses at this place, ends or blocks.

        Stop after ``_PAUSES`` pauses at other places.
        """
        for _ in range(_PAUSES):
            if self.ended or self.blocked:
                break
            self.go()
            if self.place == place:
                break


def pause(place: str) -> None:
    thread = threading.current_thread()
    assert isinstance(thread, Stepped)
    thread.pause(place)


class SteppedCondition:
    """A condition. A waiter continues when it has been notified and the test tells it to run."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiters: deque[Stepped] = deque()

    def wait(self) -> None:
        thread = threading.current_thread()
        assert isinstance(thread, Stepped)
        thread.blocked = True
        self._waiters.append(thread)
        self._lock.release()
        try:
            thread.pause("asleep")
        finally:
            self._lock.acquire()

    def notify(self) -> None:
        if self._waiters:
            self._waiters.popleft().blocked = False

    def notify_all(self) -> None:
        while self._waiters:
            self.notify()


class Poller:
    """A poller that pauses instead of waiting, and then returns the sources that are readable."""

    def __init__(self) -> None:
        self._sources: list[Any] = []

    def register(self, source: Any, _flags: int) -> None:
        self._sources.append(source)

    def poll(self, _timeout_ms: int) -> list[tuple[Any, int]]:
        pause("idle")
        return [
            (source.fileno() if isinstance(source, socket.socket) else source, 1)
            for source in self._sources
            if (
                select.select([source], [], [], 0)[0]
                if isinstance(source, socket.socket)
                else source.readable()
            )
        ]


class AccidentError(Exception):
    """Stands for an exception that our own code does not raise, for example an error in a copy."""


def random_caches() -> list[torch.Tensor]:
    return [torch.randn(BLOCKS, HEADS, BLOCK_TOKENS, CONTENT) for _ in range(LAYERS)]


def tokens_of(cache: torch.Tensor, block_ids: tuple[int, ...]) -> torch.Tensor:
    """Return a request's KV in one layer: ``[tokens, heads, content]``."""
    return cache[list(block_ids)].transpose(1, 2).flatten(0, 1)


class Machine(RuleBasedStateMachine):
    """Tracks which transfer owns each block. Checks that a block keeps its owner during a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.transfer_ids: list[str] = []
        self.owners: dict[int, str] = {}  # by block: the transfer for which the engine holds it
        self.used: dict[Stepped, str] = {}  # by copying thread: the transfer that owns the blocks
        self.broken: list[str] = []  # checks that ``expect`` found false, and logged exceptions
        self.patch = pytest.MonkeyPatch()

    def fake(self, module: ModuleType, **fakes: object) -> None:
        """Replace names in a module.

        If the module logs an exception other than ``AccidentError``, the test fails.
        """
        for name, fake in fakes.items():
            self.patch.setattr(module, name, fake)
        if hasattr(module, "logger"):
            self.patch.setattr(module.logger, "exception", self.log_exception)

    def rank_of_this_thread(self) -> Any:
        """Return the peer of the pair for which the calling thread works."""
        raise NotImplementedError

    def slow(self, copy: Callable[..., None]) -> Callable[..., None]:
        """Wrap ``copy`` to pause first. Check that its blocks keep their owner until it ends."""

        def slow_copy(
            view: UnitView,
            block_range: LayerBlockRange,
            block_ids: torch.Tensor,
            buffer: torch.Tensor,
        ) -> None:
            thread = threading.current_thread()
            assert isinstance(thread, Stepped)
            per_block = view._units_per_block
            units = slice(
                block_range.unit_start // per_block, -(-block_range.unit_end // per_block)
            )
            blocks = block_ids.tolist()[units]
            before = {self.owners.get(block) for block in blocks}
            self.expect(len(before) == 1 and None not in before, "copied blocks without one owner")
            self.used[thread] = before.pop() or ""
            try:
                thread.pause("copy")
                copy(view, block_range, block_ids, buffer)
                if self.rank_of_this_thread().accident:
                    raise AccidentError
            finally:
                owner = self.used.pop(thread)
                after = {self.owners.get(block) for block in blocks}
                self.expect(after == {owner}, "a block changed its owner while it was copied")

        return slow_copy

    def expect(self, true: bool, what: str) -> None:
        """Record a failed check. An assert would be caught and logged by the code under test."""
        if not true:
            self.broken.append("".join(traceback.format_stack()) + what)

    def log_exception(self, *_: object) -> None:
        if not isinstance(sys.exception(), AccidentError):
            self.broken.append(traceback.format_exc())

    @invariant()
    def nothing_is_broken(self) -> None:
        assert not self.broken, self.broken[0]
