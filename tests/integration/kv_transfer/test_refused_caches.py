"""A KV cache of vLLM is refused unless all of its layers share one full-attention spec."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kv_transfer.errors import IncompatibleError
from kv_transfer.vllm.worker_side import full_attention

SHAPE = {"block_size": 16, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
MLA = MLAAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=32)


def config(*specs: KVCacheSpec) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(8, [], groups)


def test_full_attention_is_streamed() -> None:
    assert full_attention(config(FULL)) is FULL


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        ([MLA], "MLAAttentionSpec"),
        ([WINDOW], "SlidingWindowSpec"),
        ([FULL, WINDOW], "FullAttentionSpec, SlidingWindowSpec"),
        ([FULL, FULL], "FullAttentionSpec, FullAttentionSpec"),
        ([], "none"),
    ],
)
def test_other_kinds_are_refused_by_name(specs: list[KVCacheSpec], names: str) -> None:
    with pytest.raises(IncompatibleError, match=rf"KV cache \({names}\) cannot be streamed"):
        full_attention(config(*specs))
