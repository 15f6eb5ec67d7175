"""Gather on one cache and scatter into another moves exactly the named blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import Rectangle
from kv_transfer.pages import KvPages

BLOCKS, HEADS, TOKENS, CONTENT, LAYERS = 9, 2, 4, 6, 3


def caches(layout: str, fill: bool) -> list[torch.Tensor]:
    """Layers of logical shape [B, H, N, C]; "NHC" has tokens outermost in memory."""
    layers = []
    for index in range(LAYERS):
        shape = (BLOCKS, HEADS, TOKENS, CONTENT)
        if layout == "NHC":
            shape = (BLOCKS, TOKENS, HEADS, CONTENT)
        size = BLOCKS * HEADS * TOKENS * CONTENT
        data = torch.arange(size, dtype=torch.float32) + 1000 * index if fill else torch.zeros(size)
        layer = data.view(shape)
        layers.append(layer.transpose(1, 2) if layout == "NHC" else layer)
    return layers


@settings(deadline=None)
@given(
    data=st.data(),
    layout=st.sampled_from(["HNC", "NHC"]),
    layer_start=st.integers(0, LAYERS - 1),
    length=st.integers(1, BLOCKS),
)
def test_named_blocks_move_and_no_others(
    data: st.DataObject, layout: str, layer_start: int, length: int
) -> None:
    source_ids = data.draw(st.permutations(range(BLOCKS)))[:length]
    target_ids = data.draw(st.permutations(range(BLOCKS)))[:length]
    block_start = data.draw(st.integers(0, length - 1))
    area = Rectangle(layer_start, LAYERS, block_start, length)
    source, target = caches(layout, fill=True), caches(layout, fill=False)
    message = torch.empty(area.num_blocks * HEADS * TOKENS * CONTENT)

    KvPages(source).gather(area, torch.tensor(source_ids), message)
    KvPages(target).scatter(area, torch.tensor(target_ids), message)

    for layer in range(LAYERS):
        expected = torch.zeros_like(target[layer])
        if layer >= layer_start:
            for index in range(block_start, length):
                expected[target_ids[index]] = source[layer][source_ids[index]]
        assert torch.equal(target[layer], expected)


def test_caches_that_do_not_lie_block_by_block_are_refused() -> None:
    interleaved = torch.zeros(BLOCKS, HEADS, TOKENS, CONTENT * 2)[..., ::2]
    with pytest.raises(IncompatibleError, match="not contiguous"):
        KvPages([interleaved])
    one, other = torch.zeros(2, 1, 4, 2), torch.zeros(3, 1, 4, 2)
    with pytest.raises(IncompatibleError, match="unlike shape"):
        KvPages([one, other])
