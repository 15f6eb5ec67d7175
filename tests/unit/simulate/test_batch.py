"""The closed form of a decode batch against a simulation of each token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulate.batch import Batch, Gaps, gap_p95_s
from simulate.engines import DecodeEngine, Stream
from simulate.latency import (
    DecodeLatency,
    KvReservation,
    KvRoom,
    LatencyModel,
    PrefillLatency,
    TransferLatency,
)
from simulate.timeline import VirtualTimeline

LATENCIES = (
    DecodeLatency(0.01),
    DecodeLatency(0.008, 5e-5, 5.6e-8),
    DecodeLatency(0.002, 1e-3, 1e-5),
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A stream. The odd number keeps arrivals away from the ends of steps, up to rounding."""

    at: int
    kv_tokens: int
    tokens: int

    @property
    def at_s(self) -> float:
        return self.at * 0.0013717 + 0.00012345


ARRIVALS = st.lists(
    st.builds(Arrival, st.integers(0, 400), st.integers(1, 3000), st.integers(1, 120)),
    min_size=1,
    max_size=12,
)


def model(latency: DecodeLatency, room_tokens: int, reservation: KvReservation) -> LatencyModel:
    return LatencyModel(
        name="t",
        source="",
        prefill=PrefillLatency(0.0, 1e-5),
        decode=latency,
        transfer=TransferLatency(0.0),
        kv=KvRoom(0, room_tokens, 1, reservation),
    )


def token_by_token(latency: DecodeLatency, arrivals: list[Arrival]) -> dict[int, list[float]]:
    """Return the times of each stream's tokens. Streams join between two steps."""
    pending = sorted(range(len(arrivals)), key=lambda index: arrivals[index].at_s)
    times: dict[int, list[float]] = {index: [] for index in pending}
    running: list[int] = []
    now_s = 0.0
    while pending or running:
        if not running:
            now_s = max(now_s, arrivals[pending[0]].at_s)
        while pending and arrivals[pending[0]].at_s <= now_s:
            running.append(pending.pop(0))
        kv_tokens = sum(arrivals[index].kv_tokens + len(times[index]) for index in running)
        now_s += latency.seconds(len(running), kv_tokens)
        for index in running:
            times[index].append(now_s)
        running = [each for each in running if len(times[each]) < arrivals[each].tokens]
    return times


class Replay:
    """Runs streams on an engine, whose KV arrives as soon as there is room."""

    def __init__(
        self, model: LatencyModel, arrivals: list[Arrival], polls: int, check: Callable[..., None]
    ) -> None:
        self.timeline = VirtualTimeline()
        self.gaps: list[Gaps] = []
        self.engine = DecodeEngine(model, self.timeline, self.gaps.append)
        self.ends: dict[int, tuple[float, float]] = {}  # time and p95 of the gaps
        self._check = check
        for index, arrival in enumerate(arrivals):
            self.timeline.at(arrival.at_s, functools.partial(self._arrive, index, arrival))
        for poll in range(polls):
            self.timeline.at(poll * 0.0371, self.engine.update)
        self.timeline.run()

    def _arrive(self, index: int, arrival: Arrival) -> None:
        def ended() -> None:
            self.ends[index] = self.timeline.now_s, gap_p95_s(stream.gaps)
            # Each token follows a gap, also if the stream was preempted.
            assert sum(count for _, count in stream.gaps) == arrival.tokens

        stream = Stream(
            arrival.kv_tokens,
            arrival.tokens,
            lambda: self.timeline.at(self.timeline.now_s, lambda: self._join(stream)),
            ended,
        )
        self.engine.submit(stream)
        self._check(self.engine)

    def _join(self, stream: Stream) -> None:
        stream.last_token_s = self.timeline.now_s
        self.engine.kv_arrived(stream)
        self._check(self.engine)


def no_check(_engine: DecodeEngine) -> None:
    """Nothing to check."""


@settings(derandomize=True, max_examples=60, deadline=None)
@given(arrivals=ARRIVALS, latency=st.sampled_from(LATENCIES), polls=st.sampled_from((0, 40)))
def test_segments_equal_single_steps(
    arrivals: list[Arrival], latency: DecodeLatency, polls: int
) -> None:
    """Updates in between, as the autoscaler's, change nothing."""
    expected = token_by_token(latency, arrivals)
    replay = Replay(model(latency, 10**9, KvReservation.PROMPT), arrivals, polls, no_check)
    for index, times in expected.items():
        end_s, found_s = replay.ends[index]
        assert end_s == pytest.approx(times[-1], rel=1e-9)
        last_s = arrivals[index].at_s
        gaps = []
        for time_s in times:
            gaps.append(time_s - last_s)
            last_s = time_s
        gaps.sort()
        least = gaps[max(0, -(-95 * len(gaps) // 100) - 1)]
        # A segment's steps count with their mean.
        assert found_s == pytest.approx(least, rel=0.2, abs=1e-3)
    assert sum(each.tokens for each in replay.gaps) == sum(each.tokens for each in arrivals)
    assert replay.engine.is_idle
    assert replay.engine.kv_used_tokens == 0


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    arrivals=ARRIVALS,
    reservation=st.sampled_from(list(KvReservation)),
    room_tokens=st.integers(3120, 9000),
)
def test_the_room_is_never_exceeded_and_no_token_is_lost(
    arrivals: list[Arrival], reservation: KvReservation, room_tokens: int
) -> None:
    def check(engine: DecodeEngine) -> None:
        assert engine.kv_used_tokens <= room_tokens

    latency = LATENCIES[1]
    replay = Replay(model(latency, room_tokens, reservation), arrivals, 40, check)
    assert replay.ends.keys() == set(range(len(arrivals)))
    assert sum(each.tokens for each in replay.gaps) == sum(each.tokens for each in arrivals)
    assert replay.engine.kv_used_tokens == 0
    if reservation is KvReservation.WHOLE:
        assert replay.engine.preemptions == 0


def test_a_full_engine_preempts_the_latest_stream_which_computes_its_prompt_again() -> None:
    arrivals = [Arrival(0, 100, 60), Arrival(10, 100, 60)]
    small = Replay(model(LATENCIES[0], 250, KvReservation.PROMPT), arrivals, 0, no_check)
    large = Replay(model(LATENCIES[0], 1000, KvReservation.PROMPT), arrivals, 0, no_check)
    assert small.engine.preemptions == 1
    assert small.ends[0] == large.ends[0]
    assert small.ends[1][0] > large.ends[1][0]


def test_a_preempted_stream_that_needs_nearly_all_room_comes_back_when_nothing_else_runs() -> None:
    """The third one waits behind it, and holds no room."""
    arrivals = [Arrival(0, 1, 7), Arrival(1, 988, 12), Arrival(2, 900, 10)]
    replay = Replay(model(LATENCIES[0], 1000, KvReservation.PROMPT), arrivals, 0, no_check)
    assert replay.engine.preemptions == 1
    assert replay.ends.keys() == {0, 1, 2}


def test_a_stream_that_leaves_takes_its_kv_along() -> None:
    batch: Batch[str] = Batch(LATENCIES[0], lambda _gaps: None)
    batch.advance(0.0)
    number = batch.join("a", kv_tokens=100, tokens=50, waited_s=0.0)
    batch.join("b", kv_tokens=10, tokens=50, waited_s=0.0)
    assert batch.advance(0.1 + 1e-9) == []
    assert batch.kv_tokens == 130
    left = batch.leave(number)
    assert (left.kv_tokens, left.tokens) == (110, 40)
    assert sum(count for _, count in left.gaps) == 10
    assert batch.kv_tokens == 20
    assert (len(batch), batch.latest) == (1, "b")


def test_a_gap_that_is_exceeded_by_a_twentieth() -> None:
    assert gap_p95_s([(3.0, 1), (1.0, 19)]) == 1.0
    assert gap_p95_s([(3.0, 1), (1.0, 18)]) == 3.0
    assert gap_p95_s([]) == 0.0
