"""Finds the order in which vLLM's CPU attention kernels store the elements of a block.

The kernels interleave the attention keys of a block's tokens, in an order that depends on the
instruction set. We do not repeat their arithmetic. Instead, we number the elements and let the
kernel store the numbers. Each place then contains the number of the element that belongs there.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops

# An element's number is written in digits of this base, one digit per call of the kernel. Each
# digit is exact in every floating-point type of 16 bits or more.
_BASE = 128


def packed_positions(cache: torch.Tensor, isa: str) -> torch.Tensor | None:
    """Return the place of each element in one head's share of a block.

    Args:
        cache: one layer's cache, ``[blocks, kv_heads, block_tokens, 2 * head_size]``. Only its
            shape and type matter.
        isa: vLLM's name of the instruction set, such as "vec" or "amx".

    Returns:
        int64 ``[block_tokens, 2 * head_size]``, K before V. None if the cache is quantised, or if
        the kernel changes the elements.
    """
    if not cache.dtype.is_floating_point or cache.dtype.itemsize < 2:
        return None
    _, _, tokens, content = cache.shape
    head_size = content // 2
    element = torch.arange(tokens * content).view(tokens, 1, content)
    found = torch.zeros(tokens * content, dtype=torch.int64)  # number of the element at each place
    scale = 1
    while scale < element.numel():
        digit = (element // scale % _BASE).to(cache.dtype)
        block = torch.zeros(1, 1, 2 * tokens, head_size, dtype=cache.dtype)
        keys, values = block.chunk(2, dim=2)  # vLLM's CPU backend splits a block in this way
        ops.cpu_attn_reshape_and_cache(
            digit[..., :head_size].contiguous(),
            digit[..., head_size:].contiguous(),
            keys,
            values,
            torch.arange(tokens),
            isa,
        )
        found += block.flatten().long() * scale
        scale *= _BASE
    places = found.argsort()
    if not torch.equal(found[places], torch.arange(found.numel())):
        return None
    return places.view(tokens, content)
