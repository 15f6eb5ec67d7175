"""A router in virtual time: admission, placement and the course of each request.

Admission (``router.admission.turns``), placement (``router.placement``), the estimates of output
lengths (``router.admission.expectation``) and the waits between two tries to place a moved request
(``router.dispatch.retry``) are the live router's own code. Here is what the live router does with
asyncio and gRPC:

    arrive ▸ wait for a turn ▸ prefill ─▸ first token ─▸ KV transfer ▸ decode ▸ end
                             └ reserve KV room on the decode worker ┘

There is one router. A request that runs has no deadline; it counts as late instead. It ends with an
error only if it has lost its worker and finds no other one within ``router.failover_timeout_s``.

The file has over 400 lines because it tells the whole course of a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import WORKER_DRAINING, BatonError, UnavailableError
from core.types import Need, Pool, QueueLoad
from router.admission.expectation import Expectation
from router.admission.policy import AdmissionLimits, AdmissionRequest
from router.admission.turns import Turn, Turns
from router.dispatch.retry import Retries, RetryLimits
from router.phases import PhaseClock
from router.placement.ledger import PlacementLedger, PlacementPermit
from router.placement.policy import PlacementFacts, PlacementLimits
from router.room import NoRoom
from router.signals import Signals
from simulate.batch import GapCounts, Gaps, gap_p95_s
from simulate.engines import Prompt, Stream, Timeline
from simulate.fleet import MODEL, Fleet, Worker
from simulate.known_room import KnownRoom
from simulate.latency import LatencyModel, TransferStart
from simulate.trace import TraceRequest

TOO_LONG = "TOO_LONG"


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """From the configuration of the router, and what clients ask for.

    ``max_tokens`` is what clients allow; None: exactly the length of the answer, as load generators
    do.
    """

    admission: AdmissionLimits
    placement: PlacementLimits
    deadline_s: float
    report_snapshots: int
    retries: RetryLimits
    max_tokens: int | None = None


class Active:
    """A request from its arrival to its end. Only ``Front`` changes it."""

    __slots__ = (
        *("arrived_s", "attempt", "decode", "ended_s", "first_s", "gap_p95_s", "gaps", "index"),
        *("is_prefilled", "last_token_s", "max_tokens", "permit", "phases", "prefill", "request"),
        *("retries", "sender", "service_class", "started_s", "status", "stream", "tokens", "turn"),
    )

    def __init__(
        self, index: int, request: TraceRequest, service_class: str, max_tokens: int
    ) -> None:
        self.index = index
        self.request = request
        self.service_class = service_class
        self.max_tokens = max_tokens
        self.arrived_s = math.nan  # at the router
        self.phases: PhaseClock
        self.turn: Turn[PlacementPermit] | None = None
        self.permit: PlacementPermit | None = None  # of the current attempt
        self.attempt = 0
        self.prefill: Worker | None = None
        self.decode: Worker | None = None
        self.stream: Stream | None = None
        self.sender: Worker | None = None  # the prefill worker that holds the prompt's KV
        self.is_prefilled = False  # in the current attempt
        self.tokens = 0  # that the client has, at the begin of the current attempt
        self.retries: Retries | None = None  # None: it was never moved
        self.started_s = math.nan  # when it was dispatched
        self.first_s = math.nan
        self.last_token_s = math.nan  # of the prefill, or of an earlier attempt
        self.ended_s = math.nan
        self.gaps: GapCounts = []  # without those of the current attempt's stream
        self.gap_p95_s = 0.0
        self.status = ""  # "ok" or the reason of the error, once it has ended


class Front:
    """Serves requests on the workers of a fleet.

    Args:
        on_end: called once for each request, when it has ended.
    """

    def __init__(
        self,
        model: LatencyModel,
        timeline: Timeline,
        settings: FrontSettings,
        *,
        on_end: Callable[[Active], None],
    ) -> None:
        self._model = model
        self._timeline = timeline
        self._settings = settings
        self._on_end = on_end
        self.fleet: Fleet  # set by the owner, before the first request
        self.turns = Turns(settings.admission, self._now)
        self.ledger = PlacementLedger(
            settings.placement, self._now, settings.retries.avoid_s, settings.report_snapshots
        )
        self.ledger.on_room = self._on_room
        self.expectation = Expectation()
        self.signals = Signals(self._now)
        self.running: dict[int, Active] = {}  # by index
        self.waiting: dict[int, Active] = {}
        self._decided: list[Active] = []
        # Running requests that have lost a worker and find no other one: since when, and the need.
        self._stranded: dict[int, tuple[float, Need]] = {}
        self._room = KnownRoom()
        self.moved = 0

    def arrive(self, index: int, request: TraceRequest) -> None:
        """Let a request run, wait or be refused."""
        classes = self._settings.admission.classes
        name = request.service_class or next(iter(classes))
        max_tokens = max(request.output_tokens, self._settings.max_tokens or 0)
        active = Active(index, request, name, max_tokens)
        active.arrived_s = self._now()
        active.phases = PhaseClock(self._now)
        self.signals.arrived(request.prompt_tokens)
        if not self._model.kv.holds(request.prompt_tokens + max_tokens):
            self._end(active, TOO_LONG)
            return
        wanted = AdmissionRequest(
            name,
            self._now() + self._settings.deadline_s,
            service_s=self.expectation.service_s(max_tokens),
            cost=request.prompt_tokens,
            prompt_tokens=request.prompt_tokens,
            kv_tokens=request.prompt_tokens + self.expectation.growth_tokens(max_tokens),
        )
        try:
            active.turn = self.turns.enter(
                wanted, lambda: self._acquire(active), lambda _turn: self._decided.append(active)
            )
        except BatonError as error:
            self._end(active, error.reason)
        else:
            if active.turn.permit is None:
                self.waiting[index] = active
                active.turn.on_limit = lambda: self._limit(active)
                self._limit(active)
            else:
                self._start(active)
        self.settle()

    def workers_changed(self) -> None:
        """Use the workers as they are now.

        Requests whose turn comes start at once, because their workers may leave next.
        """
        self._on_room()
        self.settle()

    def new_snapshot(self) -> None:
        """Note that the registry was read."""
        self.ledger.new_snapshot(frozenset(each.key for each in self.fleet.records))
        self.settle()

    def count_tokens(self) -> None:
        """Count the tokens of the running streams, for the rates of the decode workers."""
        done: set[str] = set()
        for active in self.running.values():
            worker, stream = active.decode, active.stream
            if worker is not None and stream is not None and stream.number:
                if worker.id not in done:
                    self._count_tokens(active)
                done.add(worker.id)

    def gaps(self, gaps: Gaps) -> None:
        """Count times between two tokens."""
        self.signals.decoded(gaps.tokens)
        self.signals.next_tokens(gaps.tokens, gaps.tokens * gaps.mean_s)

    def settle(self) -> None:
        """Start the requests whose turn has come, and end those that were refused."""
        while self._decided:
            active = self._decided.pop(0)
            del self.waiting[active.index]
            assert active.turn is not None
            if active.turn.error is not None:
                self._end(active, active.turn.error.reason)
            else:
                self._start(active)

    def move_all(self, worker: Worker) -> None:
        """Continue the streams of a decode worker elsewhere."""
        for active in [each for each in self.running.values() if each.decode is worker]:
            self._move(active)
        self.fleet.check(worker)
        self.settle()

    def stranded_loads(self) -> tuple[QueueLoad, ...]:
        """The running requests that wait for a worker, as ``Dispatcher.stranded_loads``.

        They are on no worker. Decode workers do not prefill here, so a request may need both pools.
        """
        loads = []
        for index, (since_s, need) in self._stranded.items():
            active = self.running[index]
            facts = self._facts(active, may_wait=True)
            loads.append(
                QueueLoad(
                    active.service_class,
                    need,
                    requests=1,
                    prompt_tokens=facts.prompt_tokens,
                    kv_tokens=facts.prompt_tokens + facts.growth_tokens,
                    oldest_wait_s=self._now() - since_s,
                )
            )
        return tuple(loads)

    @property
    def now_s(self) -> float:
        """Seconds since the start of the simulation."""
        return self._timeline.now_s

    def _now(self) -> float:
        return self._timeline.now_s

    def _on_room(self) -> None:
        self._room.freed()
        self.turns.wake()

    def _facts(self, active: Active, *, may_wait: bool) -> PlacementFacts:
        max_tokens = active.max_tokens - active.tokens
        return PlacementFacts(
            model=MODEL,
            prompt_tokens=active.request.prompt_tokens + active.tokens,
            max_tokens=max_tokens,
            growth_tokens=self.expectation.growth_tokens(max_tokens),
            local_prefill="never",
            may_wait=may_wait,
            coming=frozenset(Pool),
        )

    def _acquire(self, active: Active) -> PlacementPermit | NoRoom:
        """Take room on workers."""
        facts = self._facts(active, may_wait=True)
        sizes = {
            Pool.PREFILL: facts.prompt_tokens,
            Pool.DECODE: facts.prompt_tokens + facts.growth_tokens,
        }
        needs_both = facts.max_tokens > 1
        if needs_both and (known := self._room.answer(sizes)) is not None:
            return known
        taken = self.ledger.place(self.fleet.records, facts)
        if not isinstance(taken, NoRoom):
            self._room.taken()
        elif needs_both:
            self._room.note(sizes, taken)
        return taken

    def _limit(self, active: Active) -> None:
        """Give up at the time that is the limit now, unless the limit changes before."""
        turn = active.turn
        assert turn is not None
        limit_s = self.turns.give_up_s(turn)

        def give_up() -> None:
            if active.index not in self.waiting or self._now() < self.turns.give_up_s(turn):
                return
            del self.waiting[active.index]
            self._end(active, self.turns.give_up(turn).reason)
            self.settle()

        self._timeline.at(max(limit_s, self._now()), give_up)

    def _start(self, active: Active) -> None:
        assert active.turn is not None
        assert active.turn.permit is not None
        self.running[active.index] = active
        active.started_s = self._now()
        active.phases.dispatched()
        self._dispatch(active, active.turn.permit)

    def _dispatch(self, active: Active, permit: PlacementPermit) -> None:
        """Begin an attempt: both workers get the request at the same time."""
        placement, request = permit.placement, active.request
        workers = self.fleet.workers
        assert placement.prefill is not None
        active.attempt += 1
        attempt = active.attempt
        active.permit = permit
        active.is_prefilled = False
        active.prefill = workers[placement.prefill.id]
        active.decode = workers[placement.decode.id] if placement.decode is not None else None
        prompt_tokens = request.prompt_tokens + active.tokens
        left = request.output_tokens - active.tokens
        active.stream = None
        if active.decode is not None and left > 1:
            active.stream = Stream(
                prompt_tokens,
                left - 1,
                on_room=lambda: self._on_kv_room(active, attempt),
                on_end=lambda: self._decoded(active, attempt),
            )
            assert active.decode.decode is not None
            active.decode.decode.submit(active.stream)
        assert active.prefill.prefill is not None
        active.prefill.prefill.submit(
            Prompt(
                prompt_tokens,
                request.block_ids,
                lambda worker=active.prefill: self._prefilled(active, attempt, worker),  # type: ignore[misc]
            )
        )

    def _prefilled(self, active: Active, attempt: int, worker: Worker) -> None:
        if active.attempt == attempt and not active.status:
            self._note_prefill(active, attempt, worker)
        self.fleet.check(worker)
        self.settle()

    def _note_prefill(self, active: Active, attempt: int, worker: Worker) -> None:
        permit = active.permit
        assert permit is not None
        active.is_prefilled = True
        active.phases.tokens_arrived(1)
        self._note_token(active)
        stream = active.stream
        if stream is None:
            self._finish(active)
        elif self._model.transfer.start is TransferStart.AFTER_PREFILL:
            stream.last_token_s = self._now()
            worker.sends += 1
            active.sender = worker
            if stream.reserved_tokens:
                self._transfer(active, attempt)
        elif stream.tokens == 0:
            self._finish(active)
        permit.prefill_ended(True)

    def _note_token(self, active: Active) -> None:
        """Note a token of a prefill: TTFT, or the time for which a moved stream stood still."""
        now_s = self._now()
        if math.isnan(active.first_s):
            active.first_s = now_s
            self.signals.first_token(now_s - active.arrived_s)
        else:
            gap_s = now_s - active.last_token_s
            self.signals.next_tokens(1, gap_s)
            active.gaps.append((gap_s, 1))
        active.last_token_s = now_s

    def _on_kv_room(self, active: Active, attempt: int) -> None:
        if active.attempt != attempt:
            return
        at_once = self._model.transfer.start is TransferStart.AT_DISPATCH
        if at_once or active.is_prefilled:
            self._transfer(active, attempt)

    def _transfer(self, active: Active, attempt: int) -> None:
        """Send the prompt's KV from the prefill worker to the decode worker."""
        receiver, stream = active.decode, active.stream
        assert receiver is not None
        assert stream is not None

        def arrived() -> None:
            if active.attempt != attempt:
                return
            if receiver.decode is not None and active.permit is not None:
                active.permit.decoded(1)  # a stream begins; its first step's tokens count here
                receiver.decode.kv_arrived(stream)
            self._release(active)
            self.settle()

        seconds = self._model.transfer.seconds(stream.kv_tokens)
        self._timeline.at(self._now() + seconds, arrived)

    def _release(self, active: Active) -> None:
        """Let the prefill worker drop the prompt's KV."""
        worker, active.sender = active.sender, None
        if worker is not None:
            worker.sends -= 1
            self.fleet.check(worker)

    def _decoded(self, active: Active, attempt: int) -> None:
        if active.attempt != attempt:
            return
        assert active.stream is not None
        active.stream.tokens = 0
        self._count_tokens(active)
        if active.is_prefilled:
            self._finish(active)
            self.settle()

    def _count_tokens(self, active: Active) -> None:
        """Count the tokens of all streams on a request's decode worker.

        The ledger keeps one rate per worker, so that any stream's permit can report them.
        """
        worker = active.decode
        if worker is not None and worker.decode is not None and active.permit is not None:
            active.permit.decoded(worker.decode.new_tokens())

    def _finish(self, active: Active) -> None:
        request, worker = active.request, active.decode
        active.phases.tokens_arrived(request.output_tokens - active.tokens - 1)
        if active.stream is not None:
            active.gaps += active.stream.gaps
        active.gap_p95_s = gap_p95_s(active.gaps)
        del self.running[active.index]
        self.expectation.note(active.phases, request.output_tokens)
        if active.permit is not None:
            active.permit.close()
        assert active.turn is not None
        self.turns.end(active.turn)
        self._end(active, "ok")
        if worker is not None:
            self.fleet.check(worker)

    def _move(self, active: Active) -> None:
        """Begin another attempt with the tokens so far as part of the prompt."""
        worker, stream = active.decode, active.stream
        assert active.permit is not None
        if worker is not None and worker.decode is not None and stream is not None:
            left = worker.decode.remove(stream)
            if active.status:
                return  # it has just ended
            if active.is_prefilled:
                tokens = active.request.output_tokens - left
                active.phases.tokens_arrived(tokens - active.tokens - 1)
                active.tokens = tokens
                active.gaps += stream.gaps
                active.last_token_s = max(active.last_token_s, stream.last_token_s or 0.0)
        self.moved += 1
        active.attempt += 1  # what the workers still answer to the last attempt is ignored
        self._release(active)
        active.permit.close()
        active.decode = active.stream = active.permit = None
        if active.retries is None:
            active.retries = Retries(self._settings.retries)
        # No worker is to be avoided: one that drains gets no requests.
        left_pool = UnavailableError("the worker leaves its pool", reason=WORKER_DRAINING)
        active.retries.failed(left_pool, None, tokens=active.tokens, now_s=self._now())
        self._place_again(active, active.retries, self._now())

    def _place_again(self, active: Active, retries: Retries, since_s: float) -> None:
        self._stranded.pop(active.index, None)
        try:
            permit = self.ledger.place(self.fleet.records, self._facts(active, may_wait=False))
        except UnavailableError:
            try:
                again_s = self._now() + retries.wait_s(self._now())
            except BatonError as error:
                self._fail(active, error.reason)
                return
            no_room = self.ledger.place(self.fleet.records, self._facts(active, may_wait=True))
            assert isinstance(no_room, NoRoom), "a needed pool has no usable worker"
            self._stranded[active.index] = since_s, no_room.need
            self._timeline.at(again_s, lambda: self._place_again(active, retries, since_s))
            return
        assert not isinstance(permit, NoRoom), "only for requests that may wait"
        self._room.taken()
        self._dispatch(active, permit)
        self.settle()

    def _fail(self, active: Active, reason: str) -> None:
        """End a running request that is on no worker."""
        del self.running[active.index]
        self.expectation.note(active.phases, None)
        assert active.turn is not None
        self.turns.end(active.turn)
        self._end(active, reason)
        self.settle()

    def _end(self, active: Active, status: str) -> None:
        assert not active.status, "a request ends once"
        active.status = status
        active.ended_s = self._now()
        active.stream, active.gaps = None, []  # of no more use, and long
        self._on_end(active)
