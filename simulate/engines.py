"""Models of the engines of both pools, in virtual time. A worker's life is in ``fleet``.

A prefill engine computes one prompt after the other. A decode engine runs a ``Batch``; a stream
first waits for KV room, then for its KV, then for the end of the current step.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.types import WorkerLoad
from simulate.batch import Batch, GapCounts, Gaps
from simulate.latency import KvReservation, LatencyModel
from simulate.trace import BLOCK_TOKENS

# A preempted stream comes back when this share of the KV room would stay free, so that it is not
# preempted again at once.
PREEMPTED_SPARE = 0.01


class Timeline(Protocol):
    """Virtual time. ``simulate.timeline`` implements it."""

    now_s: float

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call something at a time that is not in the past."""


class PrefixCache:
    """Which blocks of prompts a worker holds; the least recently used ones are dropped."""

    def __init__(self, room_tokens: int) -> None:
        self._room_blocks = room_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def cached_tokens(self, block_ids: Sequence[int], prompt_tokens: int) -> int:
        """Return how many tokens at the prompt's begin are held; one is always computed."""
        blocks = 0
        for block in block_ids:
            if block not in self._blocks:
                break
            self._blocks.move_to_end(block)
            blocks += 1
        return min(blocks * BLOCK_TOKENS, prompt_tokens - 1)

    def add(self, block_ids: Sequence[int]) -> None:
        """Note that a prompt was computed."""
        for block in block_ids:
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._room_blocks:
            self._blocks.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that a prefill engine computes."""

    tokens: int
    block_ids: tuple[int, ...]
    on_done: Callable[[], None]


class PrefillEngine:
    """Computes prompts in order of arrival."""

    def __init__(self, model: LatencyModel, timeline: Timeline) -> None:
        self._model = model
        self._timeline = timeline
        self._queue: deque[Prompt] = deque()
        self._cache = PrefixCache(model.kv.prefill_tokens)
        self._queued_tokens = 0

    @property
    def is_idle(self) -> bool:
        return not self._queue

    def submit(self, prompt: Prompt) -> None:
        """Compute a prompt after those that are here."""
        self._queue.append(prompt)
        self._queued_tokens += prompt.tokens
        if len(self._queue) == 1:
            self._begin()

    def load(self) -> WorkerLoad:
        """What the worker reports."""
        kv = self._model.kv
        blocks = kv.prefill_tokens // kv.block_tokens
        return WorkerLoad(
            queue_depth=max(0, len(self._queue) - 1),
            running=min(1, len(self._queue)),
            queued_tokens=self._queued_tokens,
            kv_blocks_free=blocks,
            kv_blocks_total=blocks,
            kv_block_tokens=kv.block_tokens,
        )

    def _begin(self) -> None:
        prompt = self._queue[0]
        cached = self._cache.cached_tokens(prompt.block_ids, prompt.tokens)
        seconds = self._model.prefill.seconds(prompt.tokens, cached)
        self._timeline.at(self._timeline.now_s + seconds, self._end)

    def _end(self) -> None:
        prompt = self._queue.popleft()
        self._queued_tokens -= prompt.tokens
        self._cache.add(prompt.block_ids)
        if self._queue:
            self._begin()
        prompt.on_done()


class Stream:
    """A request on a decode engine. Only the engine changes it after its creation.

    Args:
        kv_tokens: that it needs to begin: the prompt, and tokens from an earlier attempt.
        tokens: how many the engine shall generate.
        on_room: called once it has KV room, perhaps at once; the KV may then be sent.
        on_end: called when it has all its tokens.
    """

    __slots__ = ("gaps", "kv_tokens", "last_token_s", "number", "on_end", "on_room", "preempted",
                 "reserved_tokens", "tokens")  # fmt: skip

    def __init__(
        self,
        kv_tokens: int,
        tokens: int,
        on_room: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self.kv_tokens = kv_tokens
        self.tokens = tokens
        self.on_room = on_room
        self.on_end = on_end
        self.last_token_s: float | None = None  # None: the prefill has not ended
        self.gaps: GapCounts = []  # of its times in the batch, once it has left
        self.reserved_tokens = 0  # of KV room, beside what the batch counts
        self.number = 0  # in the batch; 0: not there
        self.preempted = False


class DecodeEngine:
    """Runs streams.

    Args:
        on_gaps: gets the times between two tokens.
    """

    def __init__(
        self, model: LatencyModel, timeline: Timeline, on_gaps: Callable[[Gaps], None]
    ) -> None:
        self._model = model
        self._timeline = timeline
        self._on_gaps = on_gaps
        self._batch: Batch[Stream] = Batch(model.decode, self._count)
        # A stream is in one of these, or in the batch.
        self._waiting: deque[Stream] = deque()  # for KV room, in order of arrival
        self._receiving: dict[Stream, None] = {}  # have room, wait for their KV
        self._ready: deque[Stream] = deque()  # wait for the end of the step
        self._reserved_tokens = 0
        self._scheduled_s = math.inf
        self._schedule_number = 0
        self._reported_tokens = 0
        self.done_tokens = 0
        self.preemptions = 0

    @property
    def is_idle(self) -> bool:
        return self.streams == 0

    @property
    def streams(self) -> int:
        """All requests here, running or not."""
        return len(self._batch) + len(self._ready) + len(self._receiving) + len(self._waiting)

    @property
    def kv_used_tokens(self) -> int:
        """KV tokens that are used or reserved, at the latest update."""
        grown = 0 if self._reserves_whole else self._batch.kv_tokens
        return self._reserved_tokens + grown

    def submit(self, stream: Stream) -> None:
        """Let a stream wait for room."""
        self._waiting.append(stream)
        self.update()

    def kv_arrived(self, stream: Stream) -> None:
        """Let a stream join the batch at the end of the current step."""
        if stream in self._receiving:
            del self._receiving[stream]
            self._ready.append(stream)
            self.update()

    def remove(self, stream: Stream) -> int:
        """Drop a stream. Return how many tokens it still had to generate."""
        self.update()
        if stream.number:
            self._take_out(stream)
        elif stream in self._receiving:
            del self._receiving[stream]
        elif stream in self._ready:
            self._ready.remove(stream)
        elif stream in self._waiting:
            self._waiting.remove(stream)
        self._release(stream)
        self.update()
        return stream.tokens

    def update(self) -> None:
        """Do all steps until now, and change the batch if a step has just ended."""
        now_s = self._timeline.now_s
        ended = self._batch.advance(now_s)
        for each in ended:
            each.item.number = 0
            each.item.gaps += each.gaps
            self._release(each.item)
        self._admit()
        if self._batch.is_between_steps(now_s):
            self._change_batch()
        self._schedule()
        for each in ended:
            each.item.on_end()

    def new_tokens(self) -> int:
        """Return how many tokens all streams got since the last call."""
        new, self._reported_tokens = self.done_tokens - self._reported_tokens, self.done_tokens
        return new

    def load(self) -> WorkerLoad:
        """What the worker reports."""
        kv = self._model.kv
        total = kv.decode_tokens // kv.block_tokens
        used = -(-self.kv_used_tokens // kv.block_tokens)
        return WorkerLoad(
            queue_depth=len(self._waiting),
            running=self.streams - len(self._waiting),
            queued_tokens=0,
            kv_blocks_free=max(0, total - used),
            kv_blocks_total=total,
            kv_block_tokens=kv.block_tokens,
        )

    @property
    def _reserves_whole(self) -> bool:
        return self._model.kv.reservation is KvReservation.WHOLE

    @property
    def _free_tokens(self) -> int:
        return self._model.kv.decode_tokens - self.kv_used_tokens

    def _count(self, gaps: Gaps) -> None:
        self.done_tokens += gaps.tokens
        self._on_gaps(gaps)

    def _admit(self) -> None:
        """Reserve room, in order of arrival."""
        kv = self._model.kv
        while self._waiting:
            stream = self._waiting[0]
            tokens = stream.kv_tokens + (stream.tokens if self._reserves_whole else 0)
            tokens = -(-tokens // kv.block_tokens) * kv.block_tokens
            spare = int(PREEMPTED_SPARE * kv.decode_tokens) if stream.preempted else 0
            # The running step has its room already: one token per stream.
            free_tokens = self._free_tokens - len(self._batch)
            # It needs no spare room if nothing else holds room; it would wait for ever.
            is_alone = stream.preempted and self.kv_used_tokens == 0
            if tokens + spare > free_tokens and not is_alone:
                return
            self._waiting.popleft()
            stream.reserved_tokens = tokens
            self._reserved_tokens += tokens
            if stream.preempted:
                self._ready.append(stream)
            else:
                self._receiving[stream] = None
                stream.on_room()

    def _change_batch(self) -> None:
        """Add the ready streams. While the next step lacks room, preempt the latest stream."""
        now_s = self._timeline.now_s
        while self._ready:
            stream = self._ready.popleft()
            if not self._reserves_whole:
                self._release(stream)
            last_s = stream.last_token_s
            stall_s = self._model.prefill.seconds(stream.kv_tokens) if stream.preempted else 0.0
            stream.preempted = False
            stream.number = self._batch.join(
                stream,
                stream.kv_tokens,
                stream.tokens,
                waited_s=0.0 if last_s is None else now_s - last_s,
                stall_s=stall_s,
            )
        if self._reserves_whole:
            return
        while self._free_tokens < len(self._batch) and self.streams > 1:
            stream = self._batch.latest
            self._take_out(stream)
            stream.preempted = True
            self._waiting.appendleft(stream)
            self.preemptions += 1

    def _take_out(self, stream: Stream) -> None:
        """Remove a stream from the batch before it has all its tokens."""
        left = self._batch.leave(stream.number)
        if left.gaps:  # it got tokens since it joined
            stream.last_token_s = self._batch.last_end_s
        stream.kv_tokens, stream.tokens, stream.number = left.kv_tokens, left.tokens, 0
        stream.gaps += left.gaps

    def _release(self, stream: Stream) -> None:
        self._reserved_tokens -= stream.reserved_tokens
        stream.reserved_tokens = 0

    def _schedule(self) -> None:
        """Plan the next update: when a stream ends, the KV is full, or a ready stream can join."""
        at_s = self._batch.next_end_s()
        if not self._reserves_whole:
            at_s = min(at_s, self._batch.fills_s(max(0, self._free_tokens)))
        if self._ready:
            at_s = min(at_s, self._batch.boundary_s(self._timeline.now_s))
        if at_s == self._scheduled_s:
            return
        self._scheduled_s = at_s
        self._schedule_number += 1
        if at_s < math.inf:
            number = self._schedule_number
            self._timeline.at(max(at_s, self._timeline.now_s), lambda: self._run(number))

    def _run(self, number: int) -> None:
        if number == self._schedule_number:
            self._scheduled_s = math.inf
            self.update()
