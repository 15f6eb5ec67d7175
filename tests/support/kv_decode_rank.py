"""Simulates correct decode ranks.

Tests use them to run a real prefill server one step at a time (``kv_stepped``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import zmq

from kv_transfer import wire
from kv_transfer.errors import PairError
from kv_transfer.geometry import KvGeometry, plan_pair
from kv_transfer.kv_caches import KvCaches, UnitView
from kv_transfer.session import ReceiveSession
from tests.support.kv_stepped import BLOCK_TOKENS, CONTENT, GEOMETRY, LAYERS, pause, tokens_of

DECODE_RANKS = {"a": (1, 0), "b0": (2, 0), "b1": (2, 1)}  # workers a and b: (tp_size, tp_rank)


@dataclass(slots=True)
class Prompt:
    """A request of the prefill engine."""

    transfer_id: str
    worker: str  # the decode worker
    tokens: int
    truth: list[torch.Tensor]  # by layer, [tokens, heads, content]
    block_ids: tuple[int, ...] = ()
    computed: int = 0
    preempted: bool = False
    finished: bool = False
    spoilt: bool = False  # its KV need not arrive: preempted, or not reserved by all decode ranks


@dataclass(slots=True)
class Leg:
    """One decode rank's reservation for a prompt, with KV caches that no other leg uses."""

    prompt: Prompt
    session: ReceiveSession
    caches: list[torch.Tensor]
    view: UnitView
    told: bool = False  # the prefill rank has sent END or FAIL


class Router:
    """Replaces the control server's ROUTER socket. A message is delivered while it is sent."""

    def __init__(self) -> None:
        self.ranks: dict[bytes, DecodeRank] = {}  # by routing id
        self.inbox: deque[list[bytes]] = deque()

    def recv_multipart(self, _flags: int) -> list[bytes]:
        if not self.inbox:
            raise zmq.Again
        return self.inbox.popleft()

    def send_multipart(self, frames: list[bytes]) -> None:
        if frames[0] in self.ranks:
            self.ranks[frames[0]].deliver(wire.decode_to_decode(frames[1]))

    def readable(self) -> bool:
        return bool(self.inbox)

    def bind_to_random_port(self, _address: str) -> int:
        return 1

    def setsockopt(self, *_: object) -> None: ...

    def close(self, linger: int) -> None: ...


class DecodeRank:
    """A correct decode rank. It also replaces the prefill rank's ``Pair``.

    Args:
        prefill: geometry of the prefill rank.
        expect: called with the result of each check, and with a description of the failure.
    """

    def __init__(
        self, name: str, prefill: KvGeometry, router: Router, expect: Callable[[bool, str], None]
    ) -> None:
        self.name = name
        self.routing_id = f"{name}/{len(router.ranks)}".encode()
        router.ranks[self.routing_id] = self
        tp_size, tp_rank = DECODE_RANKS[name]
        self.geometry = replace(GEOMETRY, tp_size=tp_size, tp_rank=tp_rank)
        self.plan = plan_pair(prefill, self.geometry)
        self.legs: dict[str, Leg] = {}  # by transfer id
        self.welcome = self.closed = self.lost = self.accident = False
        self._router = router
        self._expect = expect
        self._headers: deque[wire.Header] = deque()
        self._tensors: deque[torch.Tensor] = deque()
        self._announced = 0

    def post(self, message: wire.ToPrefill) -> None:
        self._router.inbox.append([self.routing_id, wire.encode(message)])

    def reserve(self, prompt: Prompt, start: int) -> None:
        blocks = -(-prompt.tokens // BLOCK_TOKENS)
        shape = (blocks, len(self.geometry.heads), BLOCK_TOKENS, CONTENT)
        caches = [torch.zeros(shape) for _ in range(LAYERS)]
        session = ReceiveSession(prompt.transfer_id, start, prompt.tokens)
        session.set_plan(self.plan)
        view = KvCaches(caches).view(self.plan, self.geometry.heads)
        self.legs[prompt.transfer_id] = Leg(prompt, session, caches, view)
        self.post(wire.Reserve(prompt.transfer_id, start, prompt.tokens))

    def deliver(self, message: wire.ToDecode) -> None:
        match message:
            case wire.Welcome():
                self.welcome = True
            case wire.Refuse():
                self.closed = True
            case wire.Header():
                self._expect(message.sequence == self._announced, "a header is missing")
                self._announced += 1
                self._headers.append(message)
                self._match()
            case wire.Fail():
                leg = self.legs[message.transfer_id]
                leg.told = True
                leg.session.fail()
            case wire.End():
                self._end(message)

    def _match(self) -> None:
        """Pair headers and tensors in order. Write each tensor to the blocks of its header."""
        while self._headers and self._tensors:
            header, tensor = self._headers.popleft(), self._tensors.popleft()
            leg = self.legs[header.transfer_id]
            self._expect(header.num_bytes == tensor.nbytes, "the tensor's size is not its header's")
            if not leg.session.ended:
                leg.session.accept_header(header.block_range, header.num_bytes)
                leg.view.scatter(header.block_range, torch.arange(len(leg.caches[0])), tensor)
                leg.session.received(header.block_range, header.num_bytes)

    def _end(self, end: wire.End) -> None:
        leg = self.legs[end.transfer_id]
        self._expect(not leg.told, "END after END or FAIL")
        leg.told = True
        if leg.session.ended:
            return
        leg.session.complete(end)
        self._expect(end.first_token_id == 7, "wrong first token")
        heads, first = self.plan.heads, self.geometry.heads.start
        lacking = slice(leg.session.token_start, leg.prompt.tokens)
        for cache, truth in zip(leg.caches, leg.prompt.truth, strict=True):
            got = tokens_of(cache, tuple(range(len(cache))))[lacking]
            got = got[:, heads.start - first : heads.end - first]
            want = truth[lacking, heads.start : heads.end]
            self._expect(torch.equal(got, want), "the KV is not what the engine computed")

    # ---- as the prefill rank's Pair -------------------------------------------------------

    def send(self, tensor: torch.Tensor) -> Sending:
        return Sending(self, tensor)

    def abort(self) -> None:
        self.lost = True

    def wait_aborted(self, timeout_s: float) -> bool:
        return True

    def take(self, tensor: torch.Tensor) -> None:
        self._tensors.append(tensor.clone())
        self._match()


class Sending:
    """A send that has started. The tensor is read as late as possible, at the end of ``wait``."""

    def __init__(self, rank: DecodeRank, tensor: torch.Tensor) -> None:
        self._rank, self._tensor = rank, tensor

    def wait(self, timeout_s: float) -> None:
        pause("wait")
        if self._rank.lost:
            raise PairError("connection lost")
        self._rank.take(self._tensor)
