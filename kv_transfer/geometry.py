"""What a KV cache looks like, and which bytes of it a message carries.

A layer's cache is logically ``[blocks, kv_heads, block_tokens, content]`` (vLLM's B, H, N, C;
``content`` is K and V of one head and token). A request's tokens lie in blocks in order: token
``t`` is in the request's block ``t // block_tokens``.

The unit of transfer is a whole block of one layer, as it lies in memory. How a block is laid out
inside belongs to the attention kernel (vLLM's CPU kernels, for one, pack the keys of a block
across tokens), so a block is sent once all of its tokens were computed, and the last block of a
prompt is sent whole. Both sides have the same block size and layout (checked at HELLO).

A message carries a rectangle: layers ``[layer_start, layer_end)`` times the request's blocks
``[block_start, block_end)``, layer after layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from kv_transfer.errors import IncompatibleError


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The facts that both sides must share for one tensor-parallel rank."""

    model: str
    dtype: str
    layout: str  # vLLM's name of the memory order, e.g. "LBHNC"
    num_layers: int
    kv_heads: int  # on this rank
    block_tokens: int
    content: int  # elements per head and token: K and V
    item_bytes: int
    tp_size: int
    tp_rank: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return self.block_tokens * self.kv_heads * self.content * self.item_bytes

    def blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens, the last one perhaps in part."""
        return -(-num_tokens // self.block_tokens)

    def require_compatible(self, other: KvGeometry) -> None:
        """Raises IncompatibleError naming each fact that differs."""
        mine, theirs = asdict(self), asdict(other)
        differing = [
            f"{name} is {mine[name]} here and {theirs[name]} there"
            for name in mine
            if mine[name] != theirs[name]
        ]
        if differing:
            raise IncompatibleError("KV caches cannot be mapped: " + "; ".join(differing))


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Layers times blocks of one request; both ends exclusive."""

    layer_start: int
    layer_end: int
    block_start: int
    block_end: int

    def __post_init__(self) -> None:
        if not (0 <= self.layer_start < self.layer_end and 0 <= self.block_start < self.block_end):
            raise ValueError(f"empty or negative rectangle: {self}")

    @property
    def num_blocks(self) -> int:
        """Blocks of all layers together."""
        return (self.layer_end - self.layer_start) * (self.block_end - self.block_start)


def split_into_messages(area: Rectangle, max_blocks: int) -> Iterator[Rectangle]:
    """Cut an area into messages of at most ``max_blocks`` blocks (of all layers together).

    Ordered by layer, so that each can leave while later layers are still being computed: several
    layers together where they are small, one layer in parts where it is large.
    """
    per_layer = area.block_end - area.block_start
    layers = max(1, max_blocks // per_layer)
    blocks = min(per_layer, max_blocks)
    for layer in range(area.layer_start, area.layer_end, layers):
        layer_end = min(layer + layers, area.layer_end)
        for block in range(area.block_start, area.block_end, blocks):
            yield Rectangle(layer, layer_end, block, min(block + blocks, area.block_end))
