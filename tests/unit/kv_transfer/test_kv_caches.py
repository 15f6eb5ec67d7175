"""What is gathered on a prefill rank and scattered on a decode rank: each slot once, no others."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, replace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import KvGeometry, PairPlan, Rectangle, plan_pair, sources
from kv_transfer.kv_caches import KvPages, PageView
from kv_transfer.session import ReceiveSession, ReceiveState, SendSession, SendState
from tests.support.kv_shapes import RankCaches, blocks_for, geometry_of, ranks_of

BLOCKS = 40
KEY = "r#1"


def tp_sizes(heads: int) -> list[int]:
    return [n for n in range(1, 9) if heads % n == 0 or n % heads == 0]


@st.composite
def unlike_pairs(draw: st.DrawFn) -> tuple[KvGeometry, KvGeometry]:
    """Rank 0 of a prefill and of a decode worker whose caches can be mapped."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]), label="heads")
    content, layers = draw(st.integers(1, 4), label="content"), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(["int8", "bfloat16", "float32", "int64"]))

    def side() -> KvGeometry:
        return geometry_of(
            heads,
            draw(st.sampled_from(tp_sizes(heads)), label="tp"),
            draw(st.sampled_from([1, 2, 3, 4, 6, 8]), label="block_tokens"),
            draw(st.sampled_from(["HNC", "NHC", "HNC/1", "HNC/2"]), label="layout"),
            layers=layers,
            content=content,
            dtype=dtype,
        )

    prefill, decode = side(), side()
    if draw(st.booleans(), label="equal blocks"):
        alike = replace(decode, block_tokens=prefill.block_tokens, layout=prefill.layout)
        # Nobody needs to know where in a block a token lies.
        prefill = replace(prefill, by_token=draw(st.booleans()))
        decode = replace(alike, by_token=draw(st.booleans()))
    return prefill, decode


@dataclass
class Part:
    """What goes from one prefill to one decode rank."""

    plan: PairPlan
    source: PageView
    target: PageView
    counter: PageView
    session: ReceiveSession


class Decode:
    """A decode rank, and how often each element of its caches was written."""

    def __init__(self, geometry: KvGeometry, blocks: list[int], interleaved: bool, offset: int):
        def caches() -> RankCaches:
            return RankCaches(geometry, BLOCKS, interleaved=interleaved, offset=offset)

        self.caches, self.expected, self.required, self.allowed = (caches() for _ in range(4))
        self._mark = caches()
        self.blocks = blocks
        self.writes = torch.zeros(self.caches.storage.shape, dtype=torch.int64)

    def part(self, plan: PairPlan, source: PageView, start: int, tokens: int) -> Part:
        held = self.caches.geometry.heads
        session = ReceiveSession(KEY, start, tokens)
        session.follow(plan)
        target, counter = (c.pages.view(plan, held) for c in (self.caches, self._mark))
        return Part(plan, source, target, counter, session)

    def receive(self, part: Part, area: Rectangle, message: torch.Tensor) -> None:
        part.session.header(area, message.nbytes)
        block_ids = torch.tensor(self.blocks)
        part.target.scatter(area, block_ids, message)
        self._mark.storage.zero_()
        part.counter.scatter(area, block_ids, torch.ones_like(message))
        self.writes += self._mark.storage.long()
        part.session.received(area, message.nbytes)

    def check(self, start: int, tokens: int, last_page_end: int) -> None:
        """Each slot of ``[start, tokens)`` was written once, and right; no other was, but for what
        the prompt leaves free of its last page."""
        self.required.storage.zero_()
        self.allowed.storage.zero_()
        heads, content = len(self.caches.geometry.heads), self.caches.geometry.content
        for layer in range(self.caches.geometry.num_layers):
            ones = torch.ones(
                heads, last_page_end - start, content, dtype=self.caches.storage.dtype
            )
            self.required.write(layer, self.blocks, start, tokens, ones[:, : tokens - start])
            self.allowed.write(layer, self.blocks, start, last_page_end, ones)
            tail = self.caches.read(layer, self.blocks, tokens, last_page_end)
            self.expected.write(layer, self.blocks, tokens, last_page_end, tail)
        self.expected.fill(KEY, self.blocks, start, tokens, tokens)
        assert torch.all(self.writes >= self.required.storage.long())
        assert torch.all(self.writes <= self.allowed.storage.long())
        assert torch.equal(self.caches.storage, self.expected.storage)


@settings(deadline=None)
@given(
    data=st.data(),
    pair=unlike_pairs(),
    tokens=st.integers(1, 30),
    message_bytes=st.integers(1, 600),
    seed=st.integers(0, 2**32),
)
def test_d_gets_each_slot_that_it_lacks_once(
    data: st.DataObject, pair: tuple[KvGeometry, KvGeometry], tokens: int, message_bytes: int,
    seed: int,
) -> None:  # fmt: skip
    """Shapes, prefix hits, chunks, the moments of the reservations and their order are arbitrary.

    The prefill writes each layer just before it says so, thus nothing may leave any earlier.
    """
    rng = random.Random(seed)
    geometry, decode_geometry = pair
    in_memory = st.tuples(st.booleans(), st.integers(0, 3))
    hits = st.integers(0, tokens - 1)
    start = data.draw(hits, label="cached on D") // decode_geometry.block_tokens
    start *= decode_geometry.block_tokens
    cached = data.draw(hits, label="cached on P") // geometry.block_tokens * geometry.block_tokens
    cuts = sorted(
        data.draw(st.sets(st.integers(cached + 1, tokens)), label="chunk ends") | {tokens}
    )

    interleaved, offset = data.draw(in_memory, label="prefill memory")
    prefills = [
        RankCaches(rank, BLOCKS, interleaved=interleaved, offset=offset)
        for rank in ranks_of(geometry)
    ]
    blocks = blocks_for(geometry, tokens, BLOCKS, rng)
    sends = [SendSession(KEY, tokens, geometry.num_layers) for _ in prefills]
    interleaved, offset = data.draw(in_memory, label="decode memory")
    decodes = [
        Decode(rank, blocks_for(rank, tokens, BLOCKS, rng), interleaved, offset)
        for rank in ranks_of(decode_geometry)
    ]
    parts: dict[tuple[int, int], Part] = {}
    reserve_at = [data.draw(st.integers(0, len(cuts)), label="reserved") for _ in decodes]

    def reserve(rank: int) -> None:
        mine = decodes[rank].caches.geometry
        for source in sources(rank, mine.tp_size, geometry.tp_size, mine.total_kv_heads):
            caches = prefills[source]
            plan = plan_pair(caches.geometry, mine)
            view = caches.pages.view(plan, caches.geometry.heads)
            parts[source, rank] = decodes[rank].part(plan, view, start, tokens)
            sends[source].reserve(rank, plan, message_bytes, start, tokens)

    def pump() -> None:
        ready = [(source, rank) for source, send in enumerate(sends) for rank in send.ready_ranks()]
        rng.shuffle(ready)
        for source, rank in ready:
            part = parts[source, rank]
            while (area := sends[source].next_message(rank)) is not None:
                elements = area.num_pages * part.source.page_elements
                message = torch.empty(elements, dtype=part.source.dtype)
                assert message.nbytes <= max(message_bytes, part.plan.page_bytes)
                part.source.gather(area, torch.tensor(blocks), message)
                decodes[rank].receive(part, area, message)
                sends[source].message_sent(rank, area, hidden=True)

    for caches in prefills:
        caches.fill(KEY, blocks, 0, cached, tokens)
    done = 0
    for index, end in enumerate(cuts):
        for rank in [rank for rank, at in enumerate(reserve_at) if at == index]:
            reserve(rank)
        for send in sends:
            send.add_chunk(done, end)
        for layer in range(geometry.num_layers):
            for caches, send in zip(prefills, sends, strict=True):
                caches.fill_layer(layer, KEY, blocks, max(done, cached), end, tokens)
                send.advance(layer + 1)
            pump()
        done = end
    for send in sends:
        send.finish(7)
    for rank in [rank for rank, at in enumerate(reserve_at) if at == len(cuts)]:
        reserve(rank)
    pump()

    for (source, rank), part in parts.items():
        assert sends[source].state is SendState.SENDING, "until all its decode ranks have their end"
        manifest = sends[source].take_end(rank)
        assert manifest is not None
        part.session.end(manifest)
        assert part.session.state is ReceiveState.COMPLETE
    assert all(send.state is SendState.ENDED for send in sends)
    page_tokens = parts[min(parts)].plan.page_tokens
    for decode in decodes:
        decode.check(start, tokens, -(-tokens // page_tokens) * page_tokens)


def move(source: RankCaches, target: RankCaches, area: Rectangle, ids: list[int]) -> torch.Tensor:
    """Move a rectangle into the same blocks of another cache; returns the message."""
    plan = plan_pair(source.geometry, target.geometry)
    block_ids = torch.tensor(ids)
    views = [caches.pages.view(plan, caches.geometry.heads) for caches in (source, target)]
    message = torch.empty(area.num_pages * views[0].page_elements, dtype=source.storage.dtype)
    views[0].gather(area, block_ids, message)
    views[1].scatter(area, block_ids, message)
    return message


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["HNC", "NHC"])
def test_blocks_that_are_no_multiple_of_eight_bytes(dtype: str, layout: str) -> None:
    """Such are moved element by element, and torch cannot do that for each type."""
    source, target = (
        RankCaches(
            geometry_of(1, 1, tokens, layout, content=3, dtype=dtype), 4, offset=1, interleaved=True
        )
        for tokens in (3, 6)
    )
    for index, caches in enumerate((source, target)):
        bits = torch.arange(caches.storage.nbytes, dtype=torch.int32) * (3 + index)
        caches.storage.view(torch.uint8).copy_(bits % 251)
    before = target.storage.clone()
    move(source, target, Rectangle(0, 2, 0, 2), [1, 3])
    for layer in range(2):
        got, sent = (c.read(layer, [1, 3], 0, 6).contiguous() for c in (target, source))
        assert torch.equal(got.view(torch.uint8), sent.view(torch.uint8))
    changed = (target.storage.view(torch.uint8) != before.view(torch.uint8)).sum()
    assert changed <= 2 * 6 * 3 * source.geometry.item_bytes


@pytest.mark.parametrize("layout", ["HNC", "NHC"])
def test_heads_that_begin_at_no_multiple_of_their_number(layout: str) -> None:
    """Two heads of three, from the second on, where blocks lie a multiple of two heads apart."""
    source, target = (
        RankCaches(replace(geometry_of(6, tp, 4, layout), tp_rank=rank), 3, interleaved=True)
        for tp, rank in ((2, 1), (3, 2))
    )
    move(source, target, Rectangle(0, 2, 0, 2), [2, 1])
    for layer in range(2):
        got, sent = (caches.read(layer, [2, 1], 0, 8) for caches in (target, source))
        assert torch.equal(got, sent[1:])


@pytest.mark.parametrize("content", [3, 8])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "bfloat16", "float32", "float64"])
def test_any_bits_survive(dtype: str, content: int) -> None:
    """Blocks of quantised caches may read as signalling NaNs; a move must not quieten them."""
    source, target = (
        RankCaches(geometry_of(1, 1, tokens, content=content, dtype=dtype), 2) for tokens in (1, 3)
    )
    signalling = {1: 0x7F, 2: 0x7F81, 4: 0x7F800001, 8: 0x7FF0000000000001}
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for size in (8, source.geometry.item_bytes):
        if source.storage.nbytes % size == 0:
            source.storage.view(torch.uint8).view(word[size]).fill_(signalling[size])
            move(source, target, Rectangle(0, 2, 0, 1), [1])
            got, sent = (caches.read(0, [1], 0, 1).contiguous() for caches in (target, source))
            assert torch.equal(got.view(torch.uint8), sent.view(torch.uint8))


def test_a_whole_block_travels_as_it_lies() -> None:
    """One run of bytes a block, whatever a kernel means by them: no other order is as fast."""
    for layout in ("HNC", "NHC", "HNC/1"):
        caches = RankCaches(geometry_of(2, 1, 4, layout, by_token=False), 3)
        message = move(caches, caches, Rectangle(0, 1, 1, 3), [1, 2, 0])
        lie = caches.storage.view(2, 3, -1)[0, [2, 0]]
        assert torch.equal(message, lie.flatten())


def test_a_copy_takes_one_thread() -> None:
    """torch would use a team for each thread that copies, on the cores of the engine."""
    caches = KvPages([torch.zeros(512, 8, 16, 128) for _ in range(2)])
    geometry = geometry_of(8, 1, 16, content=128)
    view = caches.view(plan_pair(geometry, geometry), geometry.heads)
    area, block_ids = Rectangle(0, 2, 0, 500), torch.arange(511, 11, -1)
    (buffer,) = view.staging(1000, 1)
    threads: list[int] = []

    def copy() -> None:
        threads.append(psutil.Process().num_threads())
        view.gather(area, block_ids, buffer)
        view.scatter(area, block_ids, buffer)
        threads.append(psutil.Process().num_threads())

    was = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        copier = threading.Thread(target=copy)
        copier.start()
        copier.join()
    finally:
        torch.set_num_threads(was)
    before, after = threads
    assert after == before


def test_a_block_outside_of_the_cache_is_an_error() -> None:
    caches = RankCaches(geometry_of(2, 1, 4), 3)
    with pytest.raises(IndexError, match="block 3 of 3"):
        move(caches, caches, Rectangle(0, 1, 0, 2), [2, 3])


def test_caches_that_do_not_lie_block_by_block_are_refused() -> None:
    apart = torch.zeros(9, 2, 4, 12)[..., ::2]
    with pytest.raises(IncompatibleError, match="not contiguous"):
        KvPages([apart])
    heads_outside = torch.zeros(2, 9, 4, 6).transpose(0, 1)
    with pytest.raises(IncompatibleError, match="not contiguous"):
        KvPages([heads_outside])


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 1, 4, 2),  # more blocks
        torch.zeros(2, 2, 2, 2),  # the same bytes in another shape
        torch.zeros(2, 8),
        torch.zeros(2, 2, 4, 2)[:, :1],  # other strides
        torch.zeros(2, 1, 4, 2, dtype=torch.float16),
    ],
)
def test_layers_of_unlike_shape_or_type_are_refused(other: torch.Tensor) -> None:
    """All layers are indexed alike."""
    one = torch.zeros(2, 1, 4, 2)
    KvPages([one, one.clone()])
    for layers in ([one, other], [other, one]):
        with pytest.raises(IncompatibleError, match="unlike"):
            KvPages(layers)
