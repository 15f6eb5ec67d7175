"""Which bytes a message carries: every block of an area exactly once, within the size bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import KvGeometry, Rectangle, split_into_messages

GEOMETRY = KvGeometry("tiny", "bfloat16", "LBHNC", 30, 3, 128, 128, 2, 1, 0)


def test_block_bytes_of_smollm2() -> None:
    # 128 tokens x 3 heads x (64 K + 64 V) x 2 bytes
    assert GEOMETRY.block_bytes == 98_304
    assert [GEOMETRY.blocks_of(n) for n in (1, 127, 128, 129)] == [1, 1, 1, 2]


@given(
    layer_start=st.integers(0, 5),
    layers=st.integers(1, 40),
    block_start=st.integers(0, 5),
    blocks=st.integers(1, 40),
    max_blocks=st.integers(1, 200),
)
def test_messages_cover_an_area_exactly_once(
    layer_start: int, layers: int, block_start: int, blocks: int, max_blocks: int
) -> None:
    area = Rectangle(layer_start, layer_start + layers, block_start, block_start + blocks)
    seen: dict[tuple[int, int], int] = {}
    last_layer_end = 0
    for message in split_into_messages(area, max_blocks):
        assert message.num_blocks <= max_blocks
        assert message.layer_end >= last_layer_end, "a later message must not need fewer layers"
        last_layer_end = message.layer_end
        for layer in range(message.layer_start, message.layer_end):
            for block in range(message.block_start, message.block_end):
                seen[layer, block] = seen.get((layer, block), 0) + 1
    assert seen == {
        (layer, block): 1
        for layer in range(layer_start, layer_start + layers)
        for block in range(block_start, block_start + blocks)
    }


@pytest.mark.parametrize("corners", [(0, 0, 0, 1), (1, 1, 0, 1), (0, 1, 2, 1), (-1, 1, 0, 1)])
def test_empty_and_negative_rectangles_are_refused(corners: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="rectangle"):
        Rectangle(*corners)


def test_incompatible_caches_are_named_fact_by_fact() -> None:
    GEOMETRY.require_compatible(GEOMETRY)
    with pytest.raises(IncompatibleError, match=r"block_tokens is 128 here and 16 there") as caught:
        GEOMETRY.require_compatible(replace(GEOMETRY, block_tokens=16, dtype="float32"))
    assert "dtype is bfloat16 here and float32 there" in str(caught.value)
    assert "kv_heads" not in str(caught.value)
