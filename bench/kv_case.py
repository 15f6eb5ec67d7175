"""Defines cache geometries, options and cases that the measurements of the KV stream share."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import cached_property

import torch

from kv_transfer.geometry import KvGeometry
from kv_transfer.options import TransferOptions

MIB = 1 << 20
TIMEOUT_S = 120.0
GEOMETRIES = {
    # The block size is the default of vLLM's CPU build.
    "smollm2-135m": KvGeometry(
        model="smollm2-135m",
        dtype="bfloat16",
        num_layers=30,
        total_kv_heads=3,
        content=128,
        item_bytes=2,
        block_tokens=128,
        layout="LBHNC",
        positions_known=True,
        tp_size=1,
        tp_rank=0,
    ),
    # The block size is the default of vLLM's CUDA build.
    "llama-3-8b": KvGeometry(
        model="llama-3-8b",
        dtype="bfloat16",
        num_layers=32,
        total_kv_heads=8,
        content=256,
        item_bytes=2,
        block_tokens=16,
        layout="LBHNC",
        positions_known=True,
        tp_size=1,
        tp_rank=0,
    ),
}


def options(incarnation: str, message_bytes: int, staging_buffers: int) -> TransferOptions:
    return TransferOptions(
        host="127.0.0.1",
        incarnation=incarnation,
        secret="bench",
        message_bytes=message_bytes,
        staging_buffers=staging_buffers,
        pair_timeout_s=TIMEOUT_S,
        reserve_timeout_s=TIMEOUT_S,
        prefill_timeout_s=TIMEOUT_S,
        transfer_timeout_s=TIMEOUT_S,
        peer_lease_s=TIMEOUT_S,
        pair_idle_s=TIMEOUT_S,
        max_pairs=8,
        max_pending=64,
        cores=frozenset(os.sched_getaffinity(0)),
    )


def caches(geometry: KvGeometry, blocks: int) -> list[torch.Tensor]:
    """Allocate the caches of all layers, and write to them so that their memory is mapped."""
    shape = (blocks, geometry.total_kv_heads, geometry.block_tokens, geometry.content)
    dtype = getattr(torch, geometry.dtype)
    return [torch.full(shape, 0.5, dtype=dtype) for _ in range(geometry.num_layers)]


@dataclass(frozen=True)
class Case:
    """What to send: the KV of several prompts of equal length, all at the same time.

    Each prompt has ``tokens`` tokens and its own pair of a prefill rank and a decode rank. So
    ``pairs`` is also the number of prompts.
    """

    geometry: KvGeometry
    tokens: int
    pairs: int
    message_bytes: int
    staging_buffers: int

    @property
    def blocks(self) -> int:
        """The number of blocks of one prompt."""
        return -(-self.tokens // self.geometry.block_tokens)

    @property
    def num_bytes(self) -> int:
        """The size of the KV of all prompts."""
        return self.pairs * self.blocks * self.geometry.num_layers * self.geometry.block_bytes

    @cached_property  # computed in the warm-up, so no measured time includes it
    def block_ids(self) -> tuple[int, ...]:
        """The blocks of one prompt, in random order, as in a cache that has been in use."""
        return tuple(random.Random(0).sample(range(self.blocks), self.blocks))
