"""Tests when the prefill engine gets its blocks back.

A real ``PrefillServer`` runs one step at a time (``kv_stepped``).
"""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import zmq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kv_transfer import wire
from kv_transfer.errors import PairError
from kv_transfer.kv_caches import KvCaches, UnitView
from kv_transfer.send import control, sender, transfers
from kv_transfer.send.records import Peer, StepChunk
from kv_transfer.send.sender import Sender
from kv_transfer.send.server import PrefillServer
from kv_transfer.session import ReceiveState
from tests.support.kv_decode_rank import DECODE_RANKS, DecodeRank, Prompt, Router
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
)

PREFILL_BLOCK_TOKENS = 2 * BLOCK_TOKENS  # a unit is half of such a block
AHEAD = [0, -1, 0, -1, -2, 1, 2, 3]  # which prompt is reserved, relative to the engine's next one


class PrefillMachine(Machine):
    @initialize(
        idle=st.sampled_from([False, False, True]), peaceful=st.sampled_from([False, False, True]),
        ending=st.sampled_from(["calm", "calm", "silence", "stop"]),
    )  # fmt: skip
    def begin(self, idle: bool, peaceful: bool, ending: str) -> None:
        """If ``idle``, the rank holds a second copy of a head. No decode rank fetches this copy."""
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
        self.held: set[str] = set()  # scheduled and not yet released
        self.step: list[tuple[Prompt, int, int]] = []  # prompt, first token, end
        self.layers_done = 0
        self.preempting: tuple[Stepped, Prompt] | None = None
        self.open: dict[str, DecodeRank] = {}  # by name: the newest rank
        self.threads: list[Stepped] = []
        self.router = Router()
        self.ranks = self.router.ranks
        context = SimpleNamespace(instance=lambda: SimpleNamespace(socket=lambda _: self.router))
        self.fake(
            transfers,
            threading=SimpleNamespace(Lock=threading.Lock, Condition=SteppedCondition),
        )
        self.fake(
            control,
            threading=SimpleNamespace(Thread=self.make_thread),
            zmq=SimpleNamespace(**vars(zmq) | {"Poller": Poller, "Context": context}),
        )
        self.fake(
            sender,
            threading=SimpleNamespace(Thread=self.make_thread),
            Pair=self.make_pair,
        )
        self.patch.setattr(UnitView, "gather", self.slow(UnitView.gather))
        options = replace(OPTIONS, incarnation="p1", max_pairs=2)
        kv_caches = KvCaches(self.caches)
        self.server = PrefillServer(kv_caches, self.geometry, options, lambda: self.now_s)
        close_peer = self.server.transfers.close_peer

        def close_idle_peer(peer: Peer, reason: str) -> None:
            waiting = [w.peer for some in self.server.transfers.waiting.values() for w in some]
            idle = not peer.transfer_ids and peer not in waiting
            self.expect(idle or "room" not in reason, "a busy peer was closed to make room")
            close_peer(peer, reason)

        self.patch.setattr(self.server.transfers, "close_peer", close_idle_peer)
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
        assert isinstance(thread.owner, Sender)
        return self.ranks[thread.owner.peer.routing_id]

    # ---- the engine ----------------------------------------------------------------------

    def prompt(self, number: int) -> Prompt:
        """Return a prompt that the engine knows or will know."""
        transfer_id = f"r{number}#1"
        if transfer_id not in self.prompts:
            tokens = 1 + 7 * number % 11
            truth = [torch.randn(tokens, HEADS, CONTENT) for _ in range(LAYERS)]
            self.prompts[transfer_id] = Prompt(
                transfer_id, "a" if number % 2 else "b", tokens, truth
            )
        return self.prompts[transfer_id]

    def under_way(self) -> list[Prompt]:
        """Return the prompts that are not finished, first those whose blocks are being read."""
        prompts = [
            self.prompts[transfer_id]
            for transfer_id in self.transfer_ids
            if not self.prompts[transfer_id].finished
        ]
        return sorted(prompts, key=lambda prompt: prompt.transfer_id not in self.used.values())

    @precondition(lambda self: self.preempting is None)
    @rule(new=st.booleans(), cached=st.booleans(), tokens=st.integers(1, 9))
    def begin_step(self, new: bool, cached: bool, tokens: int) -> None:
        self.end_step()
        begun = [p for p in self.under_way() if not p.preempted and p.computed < p.tokens][:1]
        starts = [prompt.computed for prompt in begun]
        free = [block for block in range(BLOCKS) if block not in self.owners]
        prompt = self.prompt(len(self.transfer_ids))
        blocks = -(-prompt.tokens // PREFILL_BLOCK_TOKENS)
        if new and len(free) >= blocks:
            prompt.block_ids = tuple(free[:blocks])
            self.owners |= dict.fromkeys(prompt.block_ids, prompt.transfer_id)
            self.transfer_ids.append(prompt.transfer_id)
            self.held.add(prompt.transfer_id)
            begun.append(prompt)
            hit = cached and prompt.tokens > PREFILL_BLOCK_TOKENS
            starts.append(PREFILL_BLOCK_TOKENS if hit else 0)
        chunks = []
        self.layers_done = 0
        for prompt, start in zip(begun, starts, strict=True):
            end = min(start + tokens, prompt.tokens)
            # Prefix hits are written in this step, as if another request computed them now.
            self.step.append((prompt, prompt.computed, end))
            chunks.append(
                StepChunk(
                    transfer_id=prompt.transfer_id,
                    request_id=f"engine-{prompt.transfer_id}",
                    block_ids=prompt.block_ids[: -(-end // PREFILL_BLOCK_TOKENS)],
                    token_start=start,
                    token_end=end,
                    num_tokens=prompt.tokens,
                )
            )
        self.server.begin_step(chunks)

    @precondition(lambda self: self.preempting is None)
    @rule(new=st.booleans(), cached=st.booleans())
    def prefill(self, new: bool, cached: bool) -> None:
        """Run a step long enough for any prompt. Then finish the computed or preempted prompts."""
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
                self.server.request_finished(
                    prompt.transfer_id, 7 if sampled else None, computed=sampled
                )

    @precondition(lambda self: not (self.preempting or self.peaceful))
    @rule()
    def abort_before_the_first_step(self) -> None:
        self.end_step()
        prompt = self.prompt(len(self.transfer_ids))
        prompt.finished = True
        self.transfer_ids.append(prompt.transfer_id)
        self.server.request_finished(prompt.transfer_id, None, computed=False)

    @precondition(lambda self: self.preempting is None)
    @rule(which=index)
    def preempt(self, which: int) -> None:
        """Preempt a prompt. ``which`` 0 selects one whose blocks are being read, if any are."""
        self.end_step()
        if prompts := [prompt for prompt in self.under_way() if not prompt.preempted]:
            prompt = prompts[which % len(prompts)]
            self.preempting = Stepped(self.server.preempt, args=([prompt.transfer_id],)), prompt

    @invariant()
    def preempted_blocks_are_read_no_more(self) -> None:
        if self.preempting is None:
            return
        thread, prompt = self.preempting
        thread.go_to("asleep")
        if thread.ended:
            assert prompt.transfer_id not in self.used.values()
            prompt.preempted = prompt.spoilt = True
            self.preempting = None
            self.free(prompt)
        else:
            assert prompt.transfer_id in self.used.values(), "preempt waits, but no sender reads"

    @invariant()
    def blocks_are_released_once_when_nobody_reads(self) -> None:
        for request_id in self.server.take_released():
            transfer_id = request_id.removeprefix("engine-")
            self.held.remove(transfer_id)  # KeyError if it is released twice
            assert self.prompts[transfer_id].finished
            assert transfer_id not in self.used.values(), "its blocks are being read"
            self.free(self.prompts[transfer_id])

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
        wrong=st.booleans(), at_once=st.booleans(),
    )  # fmt: skip
    def hello(self, name: str, wrong: bool, at_once: bool) -> None:
        if self.geometry.tp_size > 1 and name == "b0":
            return  # b0 does not pair with the rank that holds the second copy
        rank = DecodeRank(name, self.geometry, self.router, self.expect)
        geometry = replace(rank.geometry, model="other" if wrong else GEOMETRY.model)
        rank.post(
            wire.Hello(
                version=wire.PROTOCOL_VERSION,
                expected_incarnation="p1",
                incarnation=name[0],  # all ranks of a worker have the same one
                geometry=geometry,
                backend="gloo",
                pair_id="",
            )
        )
        if not wrong:
            self.open[name] = rank
        if at_once:
            self.all_goes_well(1)

    def rank(self, which: int) -> DecodeRank | None:
        ranks = [rank for rank in self.open.values() if rank.welcome and not rank.closed]
        return ranks[which % len(ranks)] if ranks else None

    @rule(number=index, first=st.integers(0, 2), all_ranks=st.sampled_from([True, True, False]))
    def reserve(self, number: int, first: int, all_ranks: bool) -> None:
        """Reserve a recent or future prompt for all ranks of its decode worker or only the last."""
        prompt = self.prompt(max(0, len(self.transfer_ids) + AHEAD[number]))
        start = min(first, (prompt.tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        names = [name for name in DECODE_RANKS if name.startswith(prompt.worker)]
        prompt.spoilt |= not all_ranks
        for name in names if all_ranks else names[-1:]:
            if name not in self.open or self.open[name].closed:
                self.hello(name, wrong="", at_once=True)
            rank = self.open.get(name)
            again = any(prompt.transfer_id in r.legs for r in self.ranks.values() if r.name == name)
            if rank is not None and rank.welcome and not again:
                rank.reserve(prompt, start)
            elif rank is None or prompt.transfer_id not in rank.legs:
                prompt.spoilt = True

    @precondition(lambda self: not self.peaceful)
    @rule(which=index, number=index)
    def cancel(self, which: int, number: int) -> None:
        if (rank := self.rank(which)) is not None and self.transfer_ids:
            transfer_id = self.some_id(number)
            if transfer_id in rank.legs:
                rank.legs[transfer_id].session.cancel()
            rank.post(wire.Cancel(transfer_id))
            self.control()

    def some_id(self, number: int) -> str:
        """Return a transfer id. An odd ``number`` prefers one whose blocks are being read."""
        transfer_ids = list(self.used.values()) if number % 2 else []
        transfer_ids = transfer_ids or self.transfer_ids
        return transfer_ids[-1 - number // 2 % len(transfer_ids)]

    @precondition(lambda self: not self.peaceful)
    @rule(number=index)
    def release(self, number: int) -> None:
        if self.transfer_ids:
            message = wire.Release(self.some_id(number))
            self.router.inbox.append([b"front end", wire.encode(message)])
            self.control()

    @precondition(lambda self: not self.peaceful)
    @rule(which=index, how=st.sampled_from(["bye", "lose", "accident"]), sure=st.booleans())
    def lose(self, which: int, how: str, sure: bool) -> None:
        if sure and (rank := self.rank(which)) is not None:
            if how == "bye":
                rank.post(wire.Bye())
                self.control()
            rank.closed |= how == "bye"
            rank.lost |= how == "lose"
            rank.accident |= how == "accident"

    @precondition(lambda self: not self.peaceful)
    @rule(seconds=st.sampled_from([1, 6, 16]), silent=st.booleans())
    def wait(self, seconds: int, silent: bool) -> None:
        for rank in self.open.values():
            if rank.welcome and not (rank.closed or silent):
                rank.post(wire.Ping())
        self.control()
        self.now_s += seconds

    @rule()
    def control(self) -> None:
        """Let the control thread handle its messages and send what is posted."""
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
        """Stream a step up to some place. Then perhaps interrupt it, as ``then`` says."""
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
        if then == "release" and not self.peaceful:
            self.release(1)
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
        assert len(server.transfers.peers) <= 2
        assert len(server.transfers.ended_ids) <= OPTIONS.max_pending
        assert len(server.transfers.waiting) <= OPTIONS.max_pending
        waiting = [
            w.peer for reservations in server.transfers.waiting.values() for w in reservations
        ]
        assert {peer.routing_id for peer in waiting} <= set(server.transfers.peers)
        assert all(
            set(peer.transfer_ids) <= set(server.transfers.by_id)
            for peer in server.transfers.peers.values()
        )
        assert sum(t.gathering for t in server.transfers.by_id.values()) == len(self.used)

    @invariant()
    def no_sender_sleeps_while_there_is_something_to_send(self) -> None:
        threads = {t.owner.peer: t for t in self.threads if isinstance(t.owner, Sender)}
        for transfer in self.server.transfers.by_id.values():
            for rank in transfer.session.ready_ranks():
                assert not threads[transfer.peers[rank]].blocked

    def teardown(self) -> None:
        """Stop the server. Unless ``ending`` is "stop", let all transfers end first."""
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
        """Check that all blocks are released, and that no decode rank waits for a leg to end."""
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
        assert not self.held, "blocks were not released"
        assert not self.server.transfers.by_id
        assert not self.server.transfers.waiting
        assert not any(peer.transfer_ids for peer in self.server.transfers.peers.values())
        assert not self.server.transfers.peers or self.ending != "silence"
        for rank in self.ranks.values():
            for transfer_id, leg in rank.legs.items():
                assert leg.told or rank.closed or leg.session.ended
                prompt = self.prompts[transfer_id]
                if self.peaceful and prompt.finished and not (prompt.spoilt or rank.closed):
                    assert leg.session.state is ReceiveState.COMPLETE


def test_a_server_that_stops_makes_no_new_pair() -> None:
    """When the server stops, the control thread has not yet read the HELLO."""
    machine = PrefillMachine()
    machine.begin(idle=False, peaceful=False, ending="stop")
    machine.hello("a", wrong="", at_once=False)
    machine.teardown()


def test_without_faults_all_legs_complete() -> None:
    """Tests the machine: its checks would pass even if no decode rank ever reserved anything."""
    machine = PrefillMachine()
    machine.begin(idle=False, peaceful=True, ending="calm")
    machine.reserve(0, 0, all_ranks=True)
    machine.prefill(new=True, cached=False)
    machine.all_goes_well(3)
    legs = [leg for rank in machine.ranks.values() for leg in rank.legs.values()]
    assert [leg.session.state for leg in legs] == [ReceiveState.COMPLETE] * 2
    machine.teardown()


TestPrefillMachine = PrefillMachine.TestCase
TestPrefillMachine.settings = settings(PrefillMachine.TestCase.settings, max_examples=150)
