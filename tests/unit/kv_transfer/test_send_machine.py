"""When blocks go back to the prefill engine: a real ``PrefillServer``, one step at a time."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import zmq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kv_transfer import wire
from kv_transfer.errors import PairError
from kv_transfer.geometry import plan_pair
from kv_transfer.kv_caches import KvPages, PageView
from kv_transfer.send import server as send
from kv_transfer.send.server import PrefillServer, StepChunk
from kv_transfer.session import ReceiveSession, ReceiveState
from tests.support.kv_stepped import (
    BLOCK_TOKENS,
    BLOCKS,
    CONTENT,
    GEOMETRY,
    HEADS,
    LAYERS,
    OPTIONS,
    PLACES,
    Machine,
    Poller,
    Stepped,
    SteppedCondition,
    index,
    pause,
    tokens_of,
)

PREFILL_BLOCK_TOKENS = 2 * BLOCK_TOKENS  # a page is half of a block there
AHEAD = [0, -1, 0, -1, -2, 1, 2, 3]  # of the engine, with a reservation
DECODE_RANKS = {"a": (1, 0), "b0": (2, 0), "b1": (2, 1)}  # of two workers: tp_size, tp_rank


@dataclass(slots=True)
class Prompt:
    """A request of the prefill engine."""

    key: str
    worker: str  # that decodes it
    tokens: int
    truth: list[torch.Tensor]  # by layer, [tokens, heads, content]
    block_ids: tuple[int, ...] = ()
    computed: int = 0
    preempted: bool = False
    finished: bool = False
    spoilt: bool = False  # preempted once, or not reserved by all decode ranks


@dataclass(slots=True)
class Part:
    """What a decode rank reserved from the prefill rank, with blocks of its own."""

    session: ReceiveSession
    caches: list[torch.Tensor]
    view: PageView
    told: bool = False  # what became of it


class DecodeRank:
    """What a prefill rank has a pair with: process group, an honest decode rank behind it."""

    def __init__(self, machine: PrefillMachine, name: str) -> None:
        self._machine = machine
        self.name = name
        self.routing_id = f"{name}/{len(machine.ranks)}".encode()
        tp_size, tp_rank = DECODE_RANKS[name]
        self.geometry = replace(GEOMETRY, tp_size=tp_size, tp_rank=tp_rank)
        self.plan = plan_pair(machine.geometry, self.geometry)
        self.parts: dict[str, Part] = {}
        self.welcome = self.closed = self.lost = self.accident = False
        self._headers: deque[wire.Header] = deque()
        self._tensors: deque[torch.Tensor] = deque()
        self._heard = 0

    def say(self, message: wire.ToPrefill) -> None:
        self._machine.router.inbox.append([self.routing_id, wire.encode(message)])

    def reserve(self, prompt: Prompt, start: int) -> None:
        blocks = -(-prompt.tokens // BLOCK_TOKENS)
        shape = (blocks, len(self.geometry.heads), BLOCK_TOKENS, CONTENT)
        caches = [torch.zeros(shape) for _ in range(LAYERS)]
        session = ReceiveSession(prompt.key, start, prompt.tokens)
        session.follow(self.plan)
        view = KvPages(caches).view(self.plan, self.geometry.heads)
        self.parts[prompt.key] = Part(session, caches, view)
        self.say(wire.Reserve(prompt.key, start, prompt.tokens))

    def hear(self, message: wire.ToDecode) -> None:
        match message:
            case wire.Welcome():
                self.welcome = True
            case wire.Refuse():
                self.closed = True
            case wire.Header():
                self._machine.expect(message.sequence == self._heard, "a header is missing")
                self._heard += 1
                self._headers.append(message)
                self._match()
            case wire.Fail():
                part = self.parts[message.key]
                part.told = True
                part.session.fail()
            case wire.End():
                self._end(message)

    def _match(self) -> None:
        """Each message with the tensor that it announced."""
        while self._headers and self._tensors:
            header, tensor = self._headers.popleft(), self._tensors.popleft()
            part = self.parts[header.key]
            self._machine.expect(header.num_bytes == tensor.nbytes, "of another size")
            if not part.session.terminal:
                part.session.header(header.area, header.num_bytes)
                part.view.scatter(header.area, torch.arange(len(part.caches[0])), tensor)
                part.session.received(header.area, header.num_bytes)

    def _end(self, end: wire.End) -> None:
        part, prompt = self.parts[end.key], self._machine.prompts[end.key]
        self._machine.expect(not part.told, "a second END, or one after FAIL")
        part.told = True
        if part.session.terminal:
            return
        part.session.end(end)
        self._machine.expect(end.first_token == 7, "another first token")
        heads, first = self.plan.heads, self.geometry.heads.start
        for cache, truth in zip(part.caches, prompt.truth, strict=True):
            got = tokens_of(cache, tuple(range(len(cache))))[
                part.session.token_start : prompt.tokens
            ]
            got = got[:, heads.start - first : heads.end - first]
            want = truth[part.session.token_start :, heads.start : heads.end]
            self._machine.expect(torch.equal(got, want), "not what was computed")

    # as the process group

    def send(self, tensor: torch.Tensor) -> Sending:
        return Sending(self, tensor)

    def abort(self) -> None:
        self.lost = True

    def aborted(self, timeout_s: float) -> bool:
        return True

    def take(self, tensor: torch.Tensor) -> None:
        self._tensors.append(tensor.clone())
        self._match()


class Sending:
    """A send that is under way. Its bytes leave as late as they can."""

    def __init__(self, rank: DecodeRank, tensor: torch.Tensor) -> None:
        self._rank, self._tensor = rank, tensor

    def wait(self, timeout_s: float) -> None:
        pause("wait")
        if self._rank.lost:
            raise PairError("connection lost")
        self._rank.take(self._tensor)


class Router:
    """The control server's socket."""

    def __init__(self, ranks: dict[bytes, DecodeRank]) -> None:
        self._ranks = ranks
        self.inbox: deque[list[bytes]] = deque()

    def recv_multipart(self, _flags: int) -> list[bytes]:
        if not self.inbox:
            raise zmq.Again
        return self.inbox.popleft()

    def send_multipart(self, frames: list[bytes]) -> None:
        if frames[0] in self._ranks:
            self._ranks[frames[0]].hear(wire.decode_to_decode(frames[1]))

    def readable(self) -> bool:
        return bool(self.inbox)

    def bind_to_random_port(self, _address: str) -> int:
        return 1

    def setsockopt(self, *_: object) -> None: ...

    def close(self, linger: int) -> None: ...


class PrefillMachine(Machine):
    @initialize(
        idle=st.sampled_from([False, False, True]), peaceful=st.sampled_from([False, False, True]),
        ending=st.sampled_from(["calm", "calm", "silence", "stop"]),
    )  # fmt: skip
    def begin(self, idle: bool, peaceful: bool, ending: str) -> None:
        """``idle``: a second copy of a head, which no decode rank fetches anything from."""
        self.ending, self.peaceful = ending, peaceful
        self.geometry = replace(
            GEOMETRY,
            block_tokens=PREFILL_BLOCK_TOKENS,
            tp_size=4 if idle else 1,
            tp_rank=1 if idle else 0,
        )
        shape = (BLOCKS, len(self.geometry.heads), PREFILL_BLOCK_TOKENS, CONTENT)
        self.caches = [torch.full(shape, torch.nan) for _ in range(LAYERS)]
        self.prompts: dict[str, Prompt] = {}
        self.held: set[str] = set()  # scheduled, and not released as yet
        self.step: list[tuple[Prompt, int, int]] = []  # prompts and their tokens
        self.layers_done = 0
        self.preempting: tuple[Stepped, Prompt] | None = None
        self.ranks: dict[bytes, DecodeRank] = {}
        self.open: dict[str, DecodeRank] = {}  # by name
        self.threads: list[Stepped] = []
        self.router = Router(self.ranks)
        context = SimpleNamespace(instance=lambda: SimpleNamespace(socket=lambda _: self.router))
        self.fake(
            send,
            threading=SimpleNamespace(
                Thread=self.make_thread, Lock=threading.Lock, Condition=SteppedCondition
            ),
            zmq=SimpleNamespace(**vars(zmq) | {"Poller": Poller, "Context": context}),
            Pair=self.make_pair,
            join_store=lambda *_: None,
        )
        self.patch.setattr(PageView, "gather", self.slow(PageView.gather))
        options = replace(OPTIONS, incarnation="p1", max_pairs=2)
        pages = KvPages(self.caches)
        self.server = PrefillServer(pages, self.geometry, options, lambda: self.now_s)
        close_peer = self.server._close_peer

        def close_idle_peer(peer: send._Peer, reason: str) -> None:
            waiting = [w.peer for some in self.server._waiting.values() for w in some]
            idle = not peer.keys and peer not in waiting
            self.expect(idle or "room" not in reason, "the room of a peer that needs it")
            close_peer(peer, reason)

        self.patch.setattr(self.server, "_close_peer", close_idle_peer)
        (self.control_thread,) = self.threads

    def make_thread(self, **kwargs: Any) -> Stepped:
        self.threads.append(Stepped(**kwargs))
        return self.threads[-1]

    def make_pair(self, *_: object) -> DecodeRank:
        pause("group")
        rank = self.rank_of_this_thread()
        if rank.lost:
            raise PairError("connection lost")
        return rank

    def rank_of_this_thread(self) -> DecodeRank:
        thread = threading.current_thread()
        assert isinstance(thread, Stepped)
        (peer,) = thread.arguments
        return self.ranks[peer.routing_id]

    # ---- the engine ----------------------------------------------------------------------

    def prompt(self, number: int) -> Prompt:
        """One that the engine knows, or will know."""
        key = f"r{number}#1"
        if key not in self.prompts:
            tokens = 1 + 7 * number % 11
            truth = [torch.randn(tokens, HEADS, CONTENT) for _ in range(LAYERS)]
            self.prompts[key] = Prompt(key, "a" if number % 2 else "b", tokens, truth)
        return self.prompts[key]

    def under_way(self) -> list[Prompt]:
        """From those that are being read on."""
        prompts = [self.prompts[key] for key in self.keys if not self.prompts[key].finished]
        return sorted(prompts, key=lambda prompt: prompt.key not in self.used.values())

    @precondition(lambda self: self.preempting is None)
    @rule(new=st.booleans(), cached=st.booleans(), tokens=st.integers(1, 9))
    def begin_step(self, new: bool, cached: bool, tokens: int) -> None:
        self.end_step()
        begun = [p for p in self.under_way() if not p.preempted and p.computed < p.tokens][:1]
        starts = [prompt.computed for prompt in begun]
        free = [block for block in range(BLOCKS) if block not in self.owners]
        prompt = self.prompt(len(self.keys))
        blocks = -(-prompt.tokens // PREFILL_BLOCK_TOKENS)
        if new and len(free) >= blocks:
            prompt.block_ids = tuple(free[:blocks])
            self.owners |= dict.fromkeys(prompt.block_ids, prompt.key)
            self.keys.append(prompt.key)
            self.held.add(prompt.key)
            begun.append(prompt)
            hit = cached and prompt.tokens > PREFILL_BLOCK_TOKENS
            starts.append(PREFILL_BLOCK_TOKENS if hit else 0)
        chunks = []
        self.layers_done = 0
        for prompt, start in zip(begun, starts, strict=True):
            end = min(start + tokens, prompt.tokens)
            # What another request of this step is only about to compute counts as cached.
            self.step.append((prompt, prompt.computed, end))
            taken = prompt.block_ids[: -(-end // PREFILL_BLOCK_TOKENS)]
            request_id = f"engine-{prompt.key}"
            chunks.append(StepChunk(prompt.key, request_id, taken, start, end, prompt.tokens))
        self.server.begin_step(chunks)

    @precondition(lambda self: self.preempting is None)
    @rule(new=st.booleans(), cached=st.booleans())
    def prefill(self, new: bool, cached: bool) -> None:
        """From the first step to the sampled token."""
        self.begin_step(new, cached, tokens=11)
        self.end_step()
        for which in range(len(self.under_way())):
            self.finish(which, abort=False)

    def write(self, layer: int) -> None:
        held = self.geometry.heads
        for prompt, start, end in self.step:
            for token in range(start, end):
                block = prompt.block_ids[token // PREFILL_BLOCK_TOKENS]
                values = prompt.truth[layer][token, held.start : held.end]
                self.caches[layer][block, :, token % PREFILL_BLOCK_TOKENS] = values

    @precondition(lambda self: self.step and self.layers_done < LAYERS)
    @rule()
    def layer(self) -> None:
        self.write(self.layers_done)
        self.layers_done += 1
        self.server.layer_done(self.layers_done)

    def end_step(self) -> None:
        for layer in range(self.layers_done, LAYERS):
            self.write(layer)
        for prompt, _, end in self.step:
            prompt.computed = end
        self.step = []
        self.server.end_step()

    @precondition(lambda self: self.preempting is None)
    @rule(which=index, abort=st.booleans())
    def finish(self, which: int, abort: bool) -> None:
        self.end_step()
        if prompts := self.under_way():
            prompt = prompts[which % len(prompts)]
            sampled = prompt.preempted or prompt.computed == prompt.tokens
            if sampled or (abort and not self.peaceful):
                prompt.finished = True
                self.server.finish(prompt.key, 7 if sampled else None, computed=sampled)

    @precondition(lambda self: not (self.preempting or self.peaceful))
    @rule()
    def abort_before_the_first_step(self) -> None:
        self.end_step()
        prompt = self.prompt(len(self.keys))
        prompt.finished = True
        self.keys.append(prompt.key)
        self.server.finish(prompt.key, None, computed=False)

    @precondition(lambda self: self.preempting is None)
    @rule(which=index)
    def preempt(self, which: int) -> None:
        """Preferably what is being read."""
        self.end_step()
        if prompts := [prompt for prompt in self.under_way() if not prompt.preempted]:
            prompt = prompts[which % len(prompts)]
            self.preempting = Stepped(self.server.preempt, args=([prompt.key],)), prompt

    @invariant()
    def preempted_blocks_are_read_no_more(self) -> None:
        if self.preempting is None:
            return
        thread, prompt = self.preempting
        thread.go_to("asleep")
        if thread.ended:
            assert prompt.key not in self.used.values()
            prompt.preempted = prompt.spoilt = True
            self.preempting = None
            self.free(prompt)
        else:
            assert prompt.key in self.used.values(), "waits for nothing"

    @invariant()
    def blocks_are_released_once_when_nobody_reads(self) -> None:
        for request_id in self.server.take_released():
            key = request_id.removeprefix("engine-")
            self.held.remove(key)  # KeyError: a second time
            assert self.prompts[key].finished
            assert key not in self.used.values(), "its blocks are being read"
            self.free(self.prompts[key])

    def free(self, prompt: Prompt) -> None:
        for block in prompt.block_ids:
            del self.owners[block]
            for cache in self.caches:
                cache[block] = torch.nan
        prompt.block_ids = ()

    # ---- the decode ranks and their network ----------------------------------------------

    @precondition(lambda self: not self.peaceful)
    @rule(
        name=st.sampled_from(sorted(DECODE_RANKS)),
        wrong=st.sampled_from(["", "token", "model"]), at_once=st.booleans(),
    )  # fmt: skip
    def hello(self, name: str, wrong: str, at_once: bool) -> None:
        if self.geometry.tp_size > 1 and name == "b0":
            return  # has no business with the second copy of a head
        rank = DecodeRank(self, name)
        self.ranks[rank.routing_id] = rank
        geometry = replace(rank.geometry, model="other" if wrong == "model" else GEOMETRY.model)
        token = "guess" if wrong == "token" else OPTIONS.token
        version = wire.PROTOCOL_VERSION
        rank.say(wire.Hello(version, token, "p1", name, geometry, "gloo", "", "", 0))
        if not wrong:
            self.open[name] = rank
        if at_once:
            self.all_goes_well(1)

    def rank(self, which: int) -> DecodeRank | None:
        ranks = [rank for rank in self.open.values() if rank.welcome and not rank.closed]
        return ranks[which % len(ranks)] if ranks else None

    @rule(number=index, first=st.integers(0, 2), all_ranks=st.sampled_from([True, True, False]))
    def reserve(self, number: int, first: int, all_ranks: bool) -> None:
        """The newest ones, and the next; each is for the ranks of one of the two workers."""
        prompt = self.prompt(max(0, len(self.keys) + AHEAD[number]))
        start = min(first, (prompt.tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        names = [name for name in DECODE_RANKS if name.startswith(prompt.worker)]
        prompt.spoilt |= not all_ranks
        for name in names if all_ranks else names[-1:]:
            if name not in self.open or self.open[name].closed:
                self.hello(name, wrong="", at_once=True)
            rank = self.open.get(name)
            again = any(prompt.key in r.parts for r in self.ranks.values() if r.name == name)
            if rank is not None and rank.welcome and not again:
                rank.reserve(prompt, start)
            elif rank is None or prompt.key not in rank.parts:
                prompt.spoilt = True

    @precondition(lambda self: not self.peaceful)
    @rule(which=index, number=index)
    def cancel(self, which: int, number: int) -> None:
        if (rank := self.rank(which)) is not None and self.keys:
            key = self.some_key(number)
            if key in rank.parts:
                rank.parts[key].session.cancel()
            rank.say(wire.Cancel(key))
            self.control()

    def some_key(self, number: int) -> str:
        """Preferably what is being read."""
        keys = list(self.used.values()) if number % 2 else []
        keys = keys or self.keys
        return keys[-1 - number // 2 % len(keys)]

    @rule(number=index, owner=st.booleans())
    def release(self, number: int, owner: bool) -> None:
        if self.keys:
            token = OPTIONS.token if owner and not self.peaceful else "guess"
            message = wire.Release(token, self.some_key(number))
            self.router.inbox.append([b"front end", wire.encode(message)])
            self.control()

    @precondition(lambda self: not self.peaceful)
    @rule(which=index, how=st.sampled_from(["bye", "lose", "accident"]), sure=st.booleans())
    def lose(self, which: int, how: str, sure: bool) -> None:
        if sure and (rank := self.rank(which)) is not None:
            if how == "bye":
                rank.say(wire.Bye())
                self.control()
            rank.closed |= how == "bye"
            rank.lost |= how == "lose"
            rank.accident |= how == "accident"

    @precondition(lambda self: not self.peaceful)
    @rule(seconds=st.sampled_from([1, 6, 16]), silent=st.booleans())
    def wait(self, seconds: int, silent: bool) -> None:
        for rank in self.open.values():
            if rank.welcome and not (rank.closed or silent):
                rank.say(wire.Ping())
        self.control()
        self.now_s += seconds

    @rule()
    def control(self) -> None:
        """The server hears what was said to it, and says what it has to."""
        self.control_thread.go_to("idle")

    @rule(which=index, place=st.sampled_from([*PLACES, "asleep"]))
    def go(self, which: int, place: str) -> None:
        senders = [t for t in self.threads[1:] if not (t.ended or t.blocked)]
        if senders:
            senders[which % len(senders)].go_to(place)

    @precondition(lambda self: self.preempting is None)
    @rule(
        number=st.integers(0, 1), cached=st.booleans(), tokens=st.integers(1, 11),
        layers=st.integers(0, LAYERS), which=index, place=st.sampled_from(PLACES),
        then=st.sampled_from(["", "preempt", "abort", "cancel", "release", "bye", "lose"]),
    )  # fmt: skip
    def stream(
        self, number: int, cached: bool, tokens: int, layers: int, which: int, place: str,
        then: str,
    ) -> None:  # fmt: skip
        """Straight to somewhere in the middle of a step that is streamed, and what comes there."""
        self.reserve(number, 0, all_ranks=True)
        self.control()
        self.begin_step(number == 0, cached, tokens)
        for _ in range(layers):
            self.layer()
            self.go(which, place)
        if then == "preempt":
            self.preempt(0)
        if then == "abort":
            self.finish(0, abort=True)
        if then == "release":
            self.release(1, owner=True)
        if then == "cancel" and not self.peaceful:
            self.cancel(which, 1)
        if then in ("bye", "lose") and not self.peaceful:
            self.lose(which, then, sure=True)

    @rule(rounds=st.integers(1, 3))
    def all_goes_well(self, rounds: int) -> None:
        for _ in range(rounds):
            self.control()
            for thread in self.threads:
                thread.go_to("nowhere")

    # ---- what always holds ---------------------------------------------------------------

    @invariant()
    def bounds(self) -> None:
        server = self.server
        assert len(server._peers) <= 2
        assert len(server._ended_keys) <= OPTIONS.max_pending
        assert len(server._waiting) <= OPTIONS.max_pending
        waiting = [w.peer for reservations in server._waiting.values() for w in reservations]
        assert {peer.routing_id for peer in waiting} <= set(server._peers)
        assert all(set(peer.keys) <= set(server._transfers) for peer in server._peers.values())
        assert sum(t.gathering for t in server._transfers.values()) == len(self.used)

    @invariant()
    def no_sender_sleeps_while_there_is_something_to_send(self) -> None:
        for transfer in self.server._transfers.values():
            for rank in transfer.session.ready_ranks():
                thread = transfer.peers[rank].thread
                assert not (isinstance(thread, Stepped) and thread.blocked)

    def teardown(self) -> None:
        """However it ends, all blocks come back, and every decode rank is told."""
        try:
            self.end_step()
            if self.ending != "stop":
                self.end_quietly()
            self.server.stop()
            self.nothing_is_broken()
            assert all(thread.ended for thread in self.threads)
        finally:
            self.patch.undo()

    def end_quietly(self) -> None:
        for rank in self.open.values():
            rank.lost |= self.ending == "silence"
        for turn in range(16):
            self.all_goes_well(1)
            self.preempted_blocks_are_read_no_more()
            if self.preempting is None:
                self.begin_step(new=False, cached=False, tokens=11)
                self.end_step()
                for _ in self.under_way():
                    self.finish(0, abort=False)
            self.wait(0 if turn < 8 else 16, silent=self.ending == "silence")
            self.blocks_are_released_once_when_nobody_reads()
            self.bounds()
        assert not self.held, "blocks that the engine does not get back"
        assert not self.server._transfers
        assert not self.server._waiting
        assert not any(peer.keys for peer in self.server._peers.values())
        assert not self.server._peers or self.ending != "silence"
        for rank in self.ranks.values():
            for key, part in rank.parts.items():
                assert part.told or rank.closed or part.session.terminal
                prompt = self.prompts[key]
                if self.peaceful and prompt.finished and not (prompt.spoilt or rank.closed):
                    assert part.session.state is ReceiveState.COMPLETE


def test_a_server_that_stops_makes_no_new_pair() -> None:
    """Its control thread still finds a HELLO."""
    machine = PrefillMachine()
    machine.begin(idle=False, peaceful=False, ending="stop")
    machine.hello("a", wrong="", at_once=False)
    machine.teardown()


TestPrefillMachine = PrefillMachine.TestCase
TestPrefillMachine.settings = settings(PrefillMachine.TestCase.settings, max_examples=150)
