"""The order in which vLLM's CPU attention kernels store the elements of a block.

They pack the attention keys of a block across its tokens, differently for each instruction set.
Instead of repeating their arithmetic, we ask them: the kernel that writes the cache gets the number
of each element, and the cache then shows where that element went.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops

_BASE = 128  # of the digits of an element's number; exact in each floating-point type


def packed_positions(cache: torch.Tensor, isa: str) -> torch.Tensor | None:
    """Return the place of each element in one head's share of a block.

    Args:
        cache: a layer's, ``[blocks, kv_heads, block_tokens, 2 * head_size]``; only its shape and
            type matter.
        isa: vLLM's name of the kernels, such as "vec" or "amx".

    Returns:
        int64 ``[block_tokens, 2 * head_size]``, K before V; None if the kernel changes the
        elements (quantised caches).
    """
    if not cache.dtype.is_floating_point or cache.dtype.itemsize < 2:
        return None
    _, _, tokens, content = cache.shape
    head_size = content // 2
    element = torch.arange(tokens * content).view(tokens, 1, content)
    found = torch.zeros(tokens * content, dtype=torch.int64)  # element by place
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
