"""What a KV cache looks like, and how one rank's cache maps onto another's.

A layer's cache is logically ``[blocks, kv_heads, block_tokens, content]`` (vLLM's B, H, N, C;
``content`` is K and V of one head and token). A request's tokens lie in blocks in order: token
``t`` is in the request's block ``t // block_tokens``. A tensor-parallel rank holds a range of the
model's heads, or a copy of one where there are more ranks than heads.

What travels between two ranks is planned once, when they meet (``plan_pair``): the heads that both
hold, in *pages*. A page is the largest run of tokens of which either side's blocks are made: the
whole block where the sizes are equal, else their greatest common divisor. A page is sent once all
of its tokens were computed, and the last one of a prompt is sent whole.

A message carries a rectangle: layers ``[layer_start, layer_end)`` times the request's pages
``[page_start, page_end)``, layer after layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from kv_transfer.errors import IncompatibleError

_MAX_TP = 128  # bounds what a HELLO can make us count
# Facts that no mapping bridges.
_MUST_AGREE = ("model", "dtype", "num_layers", "total_kv_heads", "content", "item_bytes")


@dataclass(frozen=True, slots=True)
class HeadRange:
    """KV heads ``[start, end)``, counted over the whole model; may be empty."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __and__(self, other: HeadRange) -> HeadRange:
        start = max(self.start, other.start)
        return HeadRange(start, max(start, min(self.end, other.end)))


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The cache of one tensor-parallel rank."""

    model: str
    dtype: str
    num_layers: int
    total_kv_heads: int  # of the model, before it is split
    content: int  # elements per head and token: K and V
    item_bytes: int
    block_tokens: int
    layout: str  # of a block's inside; blocks of one layout and size are alike byte by byte
    by_token: bool  # it is known where in a block a token lies
    tp_size: int
    tp_rank: int

    def __post_init__(self) -> None:
        sizes = (self.num_layers, self.total_kv_heads, self.content, self.item_bytes)
        if min(*sizes, self.block_tokens) < 1 or not 0 <= self.tp_rank < self.tp_size <= _MAX_TP:
            raise ValueError(f"no such KV cache: {self}")

    @property
    def heads(self) -> HeadRange:
        """The heads on this rank."""
        return heads_of(self.tp_rank, self.tp_size, self.total_kv_heads)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return self.block_tokens * len(self.heads) * self.content * self.item_bytes


def heads_of(rank: int, tp_size: int, total: int) -> HeadRange:
    """The KV heads of a rank, as vLLM's QKVParallelLinear splits and replicates them.

    Raises IncompatibleError where vLLM would not start either.
    """
    if tp_size <= total:
        if total % tp_size:
            raise IncompatibleError(f"{total} KV heads cannot be split over {tp_size} ranks")
        each = total // tp_size
        return HeadRange(rank * each, (rank + 1) * each)
    if tp_size % total:
        raise IncompatibleError(f"{total} KV heads cannot be replicated over {tp_size} ranks")
    head = rank // (tp_size // total)
    return HeadRange(head, head + 1)


def sources(decode_rank: int, decode_tp: int, prefill_tp: int, total: int) -> dict[int, HeadRange]:
    """The prefill ranks that a decode rank fetches from, and which heads from each.

    Every head comes from exactly one rank; copies of a head share the decode ranks among
    themselves. A prefill rank that nobody needs has an empty range at one decode rank, so that it
    hears what became of each transfer.
    """
    return dict(_all_sources(decode_tp, prefill_tp, total)[decode_rank])


@lru_cache(maxsize=64)
def _all_sources(
    decode_tp: int, prefill_tp: int, total: int
) -> tuple[dict[int, HeadRange], ...]:  # by decode rank
    copies = max(1, prefill_tp // total)
    chosen: tuple[dict[int, HeadRange], ...] = tuple({} for _ in range(decode_tp))
    wanted = [heads_of(rank, decode_tp, total) for rank in range(decode_tp)]
    idle = set(range(prefill_tp))
    for first in range(0, prefill_tp, copies):
        held, readers = heads_of(first, prefill_tp, total), 0
        for rank in range(decode_tp):
            common = held & wanted[rank]
            if common:
                chosen[rank][first + readers % copies] = common
                idle.discard(first + readers % copies)
                readers += 1
    for rank in idle:
        chosen[rank % decode_tp][rank] = HeadRange(0, 0)
    return chosen


@dataclass(frozen=True, slots=True)
class PairPlan:
    """What travels between one prefill and one decode rank; both sides compute the same one."""

    heads: HeadRange  # empty: nothing travels, the pair only keeps both informed
    page_tokens: int
    whole_blocks: bool  # a page is a block, sent as it lies in memory (its heads at least)
    page_bytes: int  # of one page in one layer
    num_layers: int
    decode_ranks: int  # that reserve from this prefill rank

    def pages_of(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens, the last one perhaps in part."""
        return -(-num_tokens // self.page_tokens)

    def max_pages(self, message_bytes: int) -> int:
        """Pages (of all layers together) in the largest message; at least one."""
        return max(1, message_bytes // max(1, self.page_bytes))


def plan_pair(prefill: KvGeometry, decode: KvGeometry) -> PairPlan:
    """Map a prefill rank's cache onto a decode rank's.

    Raises:
        IncompatibleError: names each fact that keeps them apart.
    """
    differing = [
        f"{name} is {getattr(prefill, name)} in prefill and {getattr(decode, name)} in decode"
        for name in _MUST_AGREE
        if getattr(prefill, name) != getattr(decode, name)
    ]
    same_blocks = (prefill.block_tokens, prefill.layout) == (decode.block_tokens, decode.layout)
    for side, geometry in (("prefill", prefill), ("decode", decode)):
        if not (same_blocks or geometry.by_token):
            differing.append(
                f"block_tokens or layout differ ({prefill.block_tokens} {prefill.layout} in "
                f"prefill, {decode.block_tokens} {decode.layout} in decode) and {side} does not "
                "know where in a block a token lies"
            )
    if differing:
        raise IncompatibleError("KV caches cannot be mapped: " + "; ".join(differing))
    total = prefill.total_kv_heads
    readers = [
        rank
        for rank in range(decode.tp_size)
        if prefill.tp_rank in sources(rank, decode.tp_size, prefill.tp_size, total)
    ]
    if decode.tp_rank not in readers:
        raise IncompatibleError(
            f"decode rank {decode.tp_rank} of {decode.tp_size} has no business with prefill rank "
            f"{prefill.tp_rank} of {prefill.tp_size}"
        )
    heads = sources(decode.tp_rank, decode.tp_size, prefill.tp_size, total)[prefill.tp_rank]
    page_tokens = math.gcd(prefill.block_tokens, decode.block_tokens)
    return PairPlan(
        heads,
        page_tokens,
        same_blocks,
        page_tokens * len(heads) * prefill.content * prefill.item_bytes,
        prefill.num_layers,
        len(readers),
    )


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Layers times pages of one request; both ends exclusive."""

    layer_start: int
    layer_end: int
    page_start: int
    page_end: int

    def __post_init__(self) -> None:
        if not (0 <= self.layer_start < self.layer_end and 0 <= self.page_start < self.page_end):
            raise ValueError(f"empty or negative rectangle: {self}")

    @property
    def num_pages(self) -> int:
        """Pages of all layers together."""
        return (self.layer_end - self.layer_start) * (self.page_end - self.page_start)


def split_into_messages(area: Rectangle, max_pages: int) -> Iterator[Rectangle]:
    """Cut an area into messages of at most ``max_pages`` pages (of all layers together).

    Ordered by layer, so that each can leave while later layers are still being computed: several
    layers together where they are small, one layer in parts where it is large.
    """
    per_layer = area.page_end - area.page_start
    layers = max(1, max_pages // per_layer)
    pages = min(per_layer, max_pages)
    for layer in range(area.layer_start, area.layer_end, layers):
        layer_end = min(layer + layers, area.layer_end)
        for page in range(area.page_start, area.page_end, pages):
            yield Rectangle(layer, layer_end, page, min(page + pages, area.page_end))
