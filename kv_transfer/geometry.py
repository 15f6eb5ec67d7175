"""Describes a rank's KV cache, and maps a prefill rank's cache onto a decode rank's.

A layer's cache is logically ``[blocks, kv_heads, block_tokens, content]`` (vLLM's B, H, N, C;
``content`` is K and V of one head and token). A request's tokens lie in blocks in order: token
``t`` is in the request's block ``t // block_tokens``. A tensor-parallel rank holds a range of the
model's heads. If there are more ranks than heads, each rank holds a copy of one head.

When two ranks make a pair, both compute the same plan (``plan_pair``): which heads travel, and how
many tokens form a *block unit* (short: unit). The size of a unit is the greatest common divisor of
the two block sizes, so the blocks of both sides consist of whole units. A unit is sent after all of
its tokens have been computed. The last unit of a prompt is sent whole, even if the prompt fills
only a part of it.

A message carries a ``LayerBlockRange``: layers ``[layer_start, layer_end)`` times the request's
units ``[unit_start, unit_end)``, layer after layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from kv_transfer.errors import IncompatibleError

# Bounds the work of planning, because the peer's HELLO may contain any TP size.
_MAX_TP = 128
# No mapping exists between caches that differ in one of these.
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
    total_kv_heads: int  # of the model, over all ranks
    content: int  # elements of one head and token, K and V together
    item_bytes: int
    block_tokens: int
    # Order of the elements inside a block. If two caches have the same layout and block size, a
    # block with the same KV has the same bytes in both.
    layout: str
    positions_known: bool  # whether we know where in a block each token lies
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
    """Return the KV heads of a rank, as vLLM's QKVParallelLinear splits and replicates them.

    Raises:
        IncompatibleError: the heads cannot be divided evenly. vLLM does not start then, either.
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
    """Return the prefill ranks from which a decode rank fetches, with the heads to fetch.

    Every head comes from exactly one rank. Prefill ranks that hold copies of a head divide the
    decode ranks among themselves. A prefill rank that no decode rank needs is listed with an empty
    range at one decode rank, so that the prefill rank learns how each transfer ends.
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
    """What travels between one prefill and one decode rank; both sides compute the same plan."""

    heads: HeadRange  # if empty, no KV travels and the pair only carries control messages
    unit_tokens: int
    # Whether both sides have the same layout and block size. A unit is then one block, and its
    # elements are sent in memory order.
    whole_blocks: bool
    unit_bytes: int  # of one unit in one layer
    num_layers: int
    num_decode_ranks: int  # decode ranks that reserve from this prefill rank

    def units_of(self, num_tokens: int) -> int:
        """Return how many units hold ``num_tokens`` tokens; the last one may be partly full."""
        return -(-num_tokens // self.unit_tokens)

    def max_units(self, message_bytes: int) -> int:
        """Return how many units a message may have, counted over all layers. At least one."""
        return max(1, message_bytes // max(1, self.unit_bytes))


def plan_pair(prefill: KvGeometry, decode: KvGeometry) -> PairPlan:
    """Map a prefill rank's cache onto a decode rank's.

    Raises:
        IncompatibleError: the caches differ too much (the message names every such difference),
            or these two ranks do not pair.
    """
    differing = [
        f"{name} is {getattr(prefill, name)} in prefill and {getattr(decode, name)} in decode"
        for name in _MUST_AGREE
        if getattr(prefill, name) != getattr(decode, name)
    ]
    same_blocks = (prefill.block_tokens, prefill.layout) == (decode.block_tokens, decode.layout)
    for side, geometry in (("prefill", prefill), ("decode", decode)):
        if not (same_blocks or geometry.positions_known):
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
            f"decode rank {decode.tp_rank} of {decode.tp_size} does not pair with prefill rank "
            f"{prefill.tp_rank} of {prefill.tp_size}"
        )
    heads = sources(decode.tp_rank, decode.tp_size, prefill.tp_size, total)[prefill.tp_rank]
    unit_tokens = math.gcd(prefill.block_tokens, decode.block_tokens)
    return PairPlan(
        heads=heads,
        unit_tokens=unit_tokens,
        whole_blocks=same_blocks,
        unit_bytes=unit_tokens * len(heads) * prefill.content * prefill.item_bytes,
        num_layers=prefill.num_layers,
        num_decode_ranks=len(readers),
    )


@dataclass(frozen=True, slots=True)
class LayerBlockRange:
    """Layers ``[layer_start, layer_end)`` times units ``[unit_start, unit_end)`` of one request."""

    layer_start: int
    layer_end: int
    unit_start: int
    unit_end: int

    def __post_init__(self) -> None:
        if not (0 <= self.layer_start < self.layer_end and 0 <= self.unit_start < self.unit_end):
            raise ValueError(f"empty or negative range: {self}")

    @property
    def num_units(self) -> int:
        """The number of units, counted over all layers."""
        return (self.layer_end - self.layer_start) * (self.unit_end - self.unit_start)


def split_into_messages(block_range: LayerBlockRange, max_units: int) -> Iterator[LayerBlockRange]:
    """Cut a range into messages of at most ``max_units`` units, counted over all layers.

    The messages are ordered by layer, so that each can leave while the engine computes later
    layers. If the layers are small, a message has several. Otherwise it has one layer or a part.
    """
    per_layer = block_range.unit_end - block_range.unit_start
    layers = max(1, max_units // per_layer)
    units = min(per_layer, max_units)
    for layer in range(block_range.layer_start, block_range.layer_end, layers):
        layer_end = min(layer + layers, block_range.layer_end)
        for unit in range(block_range.unit_start, block_range.unit_end, units):
            yield LayerBlockRange(layer, layer_end, unit, min(unit + units, block_range.unit_end))
