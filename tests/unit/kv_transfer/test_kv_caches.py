"""Tests gather and scatter: each slot that a decode rank lacks is written exactly once."""

from __future__ import annotations

import array
import mmap
import random
import threading
from dataclasses import dataclass, replace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import KvGeometry, LayerBlockRange, PairPlan, plan_pair, sources
from kv_transfer.kv_caches import KvCaches, UnitView
from kv_transfer.session import ReceiveSession, ReceiveState, SendSession, SendState
from tests.support.kv_shapes import RankCaches, blocks_for, geometry_of, ranks_of

BLOCKS = 40
TRANSFER_ID = "r#1"


def tp_sizes(heads: int) -> list[int]:
    return [n for n in range(1, 9) if heads % n == 0 or n % heads == 0]


@st.composite
def unlike_pairs(draw: st.DrawFn) -> tuple[KvGeometry, KvGeometry]:
    """Draw rank 0 of a prefill worker and of a decode worker whose caches can be mapped."""
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
        # Equal blocks travel whole, so no side needs to know the positions in a block.
        prefill = replace(prefill, positions_known=draw(st.booleans()))
        decode = replace(alike, positions_known=draw(st.booleans()))
    return prefill, decode


@dataclass
class Leg:
    """The part of a transfer that one prefill rank sends to one decode rank."""

    plan: PairPlan
    source: UnitView
    target: UnitView
    counter: UnitView
    session: ReceiveSession


class Decode:
    """A decode rank, and how often each element of its caches was written."""

    def __init__(self, geometry: KvGeometry, blocks: list[int], interleaved: bool, offset: int):
        def caches() -> RankCaches:
            return RankCaches(geometry, BLOCKS, interleaved=interleaved, offset=offset)

        self.caches, self.expected, self.required, self.allowed = (caches() for _ in range(4))
        self._counts = caches()
        self.blocks = blocks
        self.writes = torch.zeros(self.caches.storage.shape, dtype=torch.int64)

    def leg(self, plan: PairPlan, source: UnitView, start: int, tokens: int) -> Leg:
        held = self.caches.geometry.heads
        session = ReceiveSession(TRANSFER_ID, start, tokens)
        session.set_plan(plan)
        target, counter = (c.kv_caches.view(plan, held) for c in (self.caches, self._counts))
        return Leg(plan, source, target, counter, session)

    def receive(self, leg: Leg, block_range: LayerBlockRange, message: torch.Tensor) -> None:
        leg.session.accept_header(block_range, message.nbytes)
        block_ids = torch.tensor(self.blocks)
        leg.target.scatter(block_range, block_ids, message)
        self._counts.storage.zero_()
        leg.counter.scatter(block_range, block_ids, torch.ones_like(message))
        self.writes += self._counts.storage.long()
        leg.session.received(block_range, message.nbytes)

    def check(self, start: int, tokens: int, last_unit_end: int) -> None:
        """Check that each slot of tokens ``[start, tokens)`` was written once, with the right KV.

        The rest of the prompt's last unit may be written once. No other slot may be written.
        """
        self.required.storage.zero_()
        self.allowed.storage.zero_()
        heads, content = len(self.caches.geometry.heads), self.caches.geometry.content
        for layer in range(self.caches.geometry.num_layers):
            ones = torch.ones(
                heads, last_unit_end - start, content, dtype=self.caches.storage.dtype
            )
            self.required.write(layer, self.blocks, start, tokens, ones[:, : tokens - start])
            self.allowed.write(layer, self.blocks, start, last_unit_end, ones)
            tail = self.caches.read(layer, self.blocks, tokens, last_unit_end)
            self.expected.write(layer, self.blocks, tokens, last_unit_end, tail)
        self.expected.fill(TRANSFER_ID, self.blocks, start, tokens, tokens)
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
    """Shapes, prefix hits, chunks, and the times and order of the reservations are arbitrary.

    The prefill rank writes each layer just before it reports the layer, so a message that leaves
    too early carries wrong KV.
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
    sends = [SendSession(TRANSFER_ID, tokens, geometry.num_layers) for _ in prefills]
    interleaved, offset = data.draw(in_memory, label="decode memory")
    decodes = [
        Decode(rank, blocks_for(rank, tokens, BLOCKS, rng), interleaved, offset)
        for rank in ranks_of(decode_geometry)
    ]
    legs: dict[tuple[int, int], Leg] = {}
    reserve_at = [data.draw(st.integers(0, len(cuts)), label="reserved") for _ in decodes]

    def reserve(rank: int) -> None:
        mine = decodes[rank].caches.geometry
        for source in sources(rank, mine.tp_size, geometry.tp_size, mine.total_kv_heads):
            caches = prefills[source]
            plan = plan_pair(caches.geometry, mine)
            view = caches.kv_caches.view(plan, caches.geometry.heads)
            legs[source, rank] = decodes[rank].leg(plan, view, start, tokens)
            sends[source].reserve(rank, plan, message_bytes, start, tokens)

    def pump() -> None:
        ready = [(source, rank) for source, send in enumerate(sends) for rank in send.ready_ranks()]
        rng.shuffle(ready)
        for source, rank in ready:
            leg = legs[source, rank]
            while (block_range := sends[source].next_message(rank)) is not None:
                elements = block_range.num_units * leg.source.unit_elements
                message = torch.empty(elements, dtype=leg.source.dtype)
                assert message.nbytes <= max(message_bytes, leg.plan.unit_bytes)
                leg.source.gather(block_range, torch.tensor(blocks), message)
                decodes[rank].receive(leg, block_range, message)
                sends[source].message_sent(rank, block_range, hidden=True)

    for caches in prefills:
        caches.fill(TRANSFER_ID, blocks, 0, cached, tokens)
    done = 0
    for index, end in enumerate(cuts):
        for rank in [rank for rank, at in enumerate(reserve_at) if at == index]:
            reserve(rank)
        for send in sends:
            send.add_chunk(done, end)
        for layer in range(geometry.num_layers):
            for caches, send in zip(prefills, sends, strict=True):
                caches.fill_layer(layer, TRANSFER_ID, blocks, max(done, cached), end, tokens)
                send.advance(layer + 1)
            pump()
        done = end
    for send in sends:
        send.request_finished(7)
    for rank in [rank for rank, at in enumerate(reserve_at) if at == len(cuts)]:
        reserve(rank)
    pump()

    for (source, rank), leg in legs.items():
        assert sends[source].state is SendState.SENDING, "the transfer ended before its last END"
        manifest = sends[source].take_manifest(rank)
        assert manifest is not None
        leg.session.complete(manifest)
        assert leg.session.state is ReceiveState.COMPLETE
    assert all(send.state is SendState.COMPLETE for send in sends)
    unit_tokens = legs[min(legs)].plan.unit_tokens
    for decode in decodes:
        decode.check(start, tokens, -(-tokens // unit_tokens) * unit_tokens)


def move(
    source: RankCaches, target: RankCaches, block_range: LayerBlockRange, ids: list[int]
) -> torch.Tensor:
    """Copy a range into the same blocks of another cache, and return the message."""
    plan = plan_pair(source.geometry, target.geometry)
    block_ids = torch.tensor(ids)
    views = [caches.kv_caches.view(plan, caches.geometry.heads) for caches in (source, target)]
    message = torch.empty(
        block_range.num_units * views[0].unit_elements, dtype=source.storage.dtype
    )
    views[0].gather(block_range, block_ids, message)
    views[1].scatter(block_range, block_ids, message)
    return message


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["HNC", "NHC"])
def test_blocks_that_are_no_multiple_of_eight_bytes(dtype: str, layout: str) -> None:
    """Such blocks are copied as integers of an element's size, as NumPy lacks some of the types."""
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
    move(source, target, LayerBlockRange(0, 2, 0, 2), [1, 3])
    for layer in range(2):
        got, sent = (c.read(layer, [1, 3], 0, 6).contiguous() for c in (target, source))
        assert torch.equal(got.view(torch.uint8), sent.view(torch.uint8))
    changed = (target.storage.view(torch.uint8) != before.view(torch.uint8)).sum()
    assert changed <= 2 * 6 * 3 * source.geometry.item_bytes


@pytest.mark.parametrize("layout", ["HNC", "NHC"])
def test_heads_that_begin_at_no_multiple_of_their_number(layout: str) -> None:
    """The source sends the last two of its three heads. Its blocks are six heads apart."""
    source, target = (
        RankCaches(replace(geometry_of(6, tp, 4, layout), tp_rank=rank), 3, interleaved=True)
        for tp, rank in ((2, 1), (3, 2))
    )
    move(source, target, LayerBlockRange(0, 2, 0, 2), [2, 1])
    for layer in range(2):
        got, sent = (caches.read(layer, [2, 1], 0, 8) for caches in (target, source))
        assert torch.equal(got, sent[1:])


@pytest.mark.parametrize("content", [3, 8])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "bfloat16", "float32", "float64"])
def test_any_bits_survive(dtype: str, content: int) -> None:
    """Blocks of quantised caches may look like signalling NaNs; a copy must not change them."""
    source, target = (
        RankCaches(geometry_of(1, 1, tokens, content=content, dtype=dtype), 2) for tokens in (1, 3)
    )
    signalling = {1: 0x7F, 2: 0x7F81, 4: 0x7F800001, 8: 0x7FF0000000000001}
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for size in (8, source.geometry.item_bytes):
        if source.storage.nbytes % size == 0:
            source.storage.view(torch.uint8).view(word[size]).fill_(signalling[size])
            move(source, target, LayerBlockRange(0, 2, 0, 1), [1])
            got, sent = (caches.read(0, [1], 0, 1).contiguous() for caches in (target, source))
            assert torch.equal(got.view(torch.uint8), sent.view(torch.uint8))


def test_a_whole_block_travels_as_it_lies() -> None:
    """A block is sent as one run of bytes, in memory order. Any other order is slower."""
    for layout in ("HNC", "NHC", "HNC/1"):
        caches = RankCaches(geometry_of(2, 1, 4, layout, positions_known=False), 3)
        message = move(caches, caches, LayerBlockRange(0, 1, 1, 3), [1, 2, 0])
        lie = caches.storage.view(2, 3, -1)[0, [2, 0]]
        assert torch.equal(message, lie.flatten())


def test_a_copy_takes_one_thread() -> None:
    """If torch copied, it would start threads that compete with the engine for its cores."""
    caches = KvCaches([torch.zeros(512, 8, 16, 128) for _ in range(2)])
    geometry = geometry_of(8, 1, 16, content=128)
    view = caches.view(plan_pair(geometry, geometry), geometry.heads)
    block_range, block_ids = LayerBlockRange(0, 2, 0, 500), torch.arange(511, 11, -1)
    (buffer,) = view.staging(1000, 1)
    threads: list[int] = []

    def copy() -> None:
        threads.append(psutil.Process().num_threads())
        view.gather(block_range, block_ids, buffer)
        view.scatter(block_range, block_ids, buffer)
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
        move(caches, caches, LayerBlockRange(0, 1, 0, 2), [2, 3])


def test_caches_whose_blocks_are_not_contiguous_are_refused() -> None:
    apart = torch.zeros(9, 2, 4, 12)[..., ::2]
    with pytest.raises(IncompatibleError, match="not contiguous"):
        KvCaches([apart])
    heads_outside = torch.zeros(2, 9, 4, 6).transpose(0, 1)
    with pytest.raises(IncompatibleError, match="not contiguous"):
        KvCaches([heads_outside])


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
    """All layers are indexed in the same way."""
    one = torch.zeros(2, 1, 4, 2)
    KvCaches([one, one.clone()])
    for layers in ([one, other], [other, one]):
        with pytest.raises(IncompatibleError, match="with the same shape"):
            KvCaches(layers)


def resident_bytes(storage: torch.Tensor) -> int:
    """Return how much of a tensor is in memory; the process's own size changes for other reasons.

    /proc/self/pagemap has 64 bits a page, of which the highest says that the page is in memory
    (https://docs.kernel.org/admin-guide/mm/pagemap.html).
    """
    page, address = mmap.PAGESIZE, storage.data_ptr()
    pages = (address + storage.nbytes - 1) // page - address // page + 1
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // page * 8)
        entries = array.array("Q", pagemap.read(pages * 8))
    return page * sum(entry >> 63 for entry in entries)


def test_caches_that_were_not_written_take_no_memory() -> None:
    mib = 2**20
    storage = torch.zeros(64 * mib, dtype=torch.uint8)
    layers = [part.view(16, 4, 16, 32 * 1024) for part in storage.chunk(2)]
    layers[1][7, 1, 2, 3] = 5
    before = resident_bytes(storage)
    KvCaches(layers).drop_zeros()
    assert before - resident_bytes(storage) > 48 * mib, "all but the part that was written"
    assert storage.sum() == 5
    layers[0][3, 1, 2, 3] = 6
    assert storage.sum() == 11
