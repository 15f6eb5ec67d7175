"""Received blocks equal blocks that vLLM's CPU kernels write, for each order of the elements."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from vllm import _custom_ops as ops

from kv_transfer.geometry import (
    KvGeometry,
    LayerBlockRange,
    plan_pair,
    sources,
    split_into_messages,
)
from kv_transfer.kv_caches import KvCaches
from kv_transfer.vllm.cpu_packing import packed_positions
from tests.support.kv_shapes import geometry_of, ranks_of

pytestmark = pytest.mark.integration

LAYERS, HEADS, HEAD_SIZE = 2, 4, 32
TOKENS = 201  # not a multiple of any of the unit sizes
BLOCKS = 16


@dataclass
class Rank:
    """One rank's caches, written by vLLM's kernels."""

    geometry: KvGeometry
    isa: str
    blocks: list[int]  # ids of the blocks with the prompt's KV

    def __post_init__(self) -> None:
        own = self.geometry
        shape = BLOCKS, len(own.heads), own.block_tokens, own.content
        self.layers = [torch.zeros(shape, dtype=getattr(torch, own.dtype)) for _ in range(LAYERS)]
        positions = packed_positions(self.layers[0], self.isa)
        assert positions is not None
        self.kv_caches = KvCaches(self.layers, positions)

    def compute(self, kv: torch.Tensor, start: int = 0) -> None:
        """Write KV from token ``start`` on. Axes of ``kv``: layers, tokens, heads, K and V."""
        own = self.geometry
        token = torch.arange(start, kv.shape[1])
        block = torch.tensor(self.blocks)[token // own.block_tokens]
        slots = block * own.block_tokens + token % own.block_tokens
        held = kv[:, start:, own.heads.start : own.heads.end]
        for layer, mine in zip(self.layers, held, strict=True):
            cache = layer.view(BLOCKS, len(own.heads), 2 * own.block_tokens, HEAD_SIZE)
            key_cache, value_cache = cache.chunk(2, dim=2)
            key, value = (each.contiguous() for each in mine.chunk(2, dim=2))
            ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, self.isa)


def ranks(isa: str, dtype: str, block_tokens: int, tp: int) -> list[Rank]:
    try:
        packed_positions(torch.zeros(1, 1, 32, 2 * HEAD_SIZE, dtype=torch.bfloat16), isa)
    except RuntimeError as error:
        if isa == "amx" and "Unsupported CPU attention configuration" in str(error):
            pytest.skip("vLLM's kernels for this machine have no AMX")
        raise
    geometry = geometry_of(
        HEADS, tp, block_tokens, f"LBHNC/{isa}", layers=LAYERS, content=2 * HEAD_SIZE, dtype=dtype
    )
    rng = random.Random(f"{isa} {block_tokens}")
    return [
        Rank(rank, isa, rng.sample(range(BLOCKS), -(-TOKENS // block_tokens)))
        for rank in ranks_of(geometry)
    ]


def send(source: Rank, target: Rank, start: int) -> None:
    """Copy KV from token ``start`` on, in messages of at most three units.

    The number of tokens in a unit is the greatest common divisor of both block sizes.
    """
    plan = plan_pair(source.geometry, target.geometry)
    views = [rank.kv_caches.view(plan, rank.geometry.heads) for rank in (source, target)]
    block_range = LayerBlockRange(0, LAYERS, start // plan.unit_tokens, plan.units_of(TOKENS))
    for message in split_into_messages(block_range, 3):
        buffer = torch.empty(message.num_units * views[0].unit_elements, dtype=views[0].dtype)
        views[0].gather(message, torch.tensor(source.blocks), buffer)
        views[1].scatter(message, torch.tensor(target.blocks), buffer)


ALL = [("vec", "float32"), ("vec", "bfloat16"), ("vec", "float16"), ("vec16", "float32")]
ALL += [("vec16", "bfloat16"), ("vec16", "float16"), ("amx", "bfloat16"), ("amx", "float16")]


@pytest.mark.parametrize(
    ("prefill_tokens", "decode_tokens", "tp"),
    [(32, 64, (1, 1)), (128, 32, (2, 1)), (64, 96, (1, 2)), (128, 128, (1, 1))],
)
@pytest.mark.parametrize(
    ("prefill_isa", "decode_isa", "dtype"),
    [(isa, other, dtype) for isa, dtype in ALL for other, same in ALL if dtype == same],
)
def test_caches_are_as_if_the_kernel_had_written_them(
    prefill_isa: str, decode_isa: str, dtype: str, prefill_tokens: int, decode_tokens: int,
    tp: tuple[int, int],
) -> None:  # fmt: skip
    """A wrong element may spoil only one token's key. A test of generated text may not notice."""
    prefill = ranks(prefill_isa, dtype, prefill_tokens, tp[0])
    decode = ranks(decode_isa, dtype, decode_tokens, tp[1])
    expected = ranks(decode_isa, dtype, decode_tokens, tp[1])
    shape = LAYERS, TOKENS, HEADS, 2 * HEAD_SIZE
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(prefill[0].layers[0])
    start = decode_tokens  # the first block of D is a prefix hit
    for rank in prefill:
        rank.compute(kv)
    for rank, kernel in zip(decode, expected, strict=True):
        for source in sources(rank.geometry.tp_rank, tp[1], tp[0], HEADS):
            send(prefill[source], rank, start)
        kernel.compute(kv, start)
        for layer, want in zip(rank.layers, kernel.layers, strict=True):
            assert want.count_nonzero()
            assert torch.equal(layer, want)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8])
def test_quantised_caches_have_no_known_order(dtype: torch.dtype) -> None:
    """The kernel scales the elements, which hides their order. Such blocks are only sent whole."""
    assert packed_positions(torch.zeros(1, 1, 32, 2 * HEAD_SIZE, dtype=dtype), "vec") is None


@pytest.mark.parametrize("head_size", [32, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_place_holds_one_element(head_size: int, dtype: torch.dtype) -> None:
    """``packed_positions`` writes element numbers with two or three digits, by the shape."""
    cache = torch.zeros(1, 1, 128, 2 * head_size, dtype=dtype)
    positions = packed_positions(cache, "vec16")
    assert positions is not None
    assert positions.shape == (128, 2 * head_size)
    assert torch.equal(positions.flatten().sort().values, torch.arange(128 * 2 * head_size))
