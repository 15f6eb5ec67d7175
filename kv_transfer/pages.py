"""Gather from and scatter into an engine's paged KV cache.

Each layer's cache is a tensor ``[blocks, kv_heads, block_tokens, content]`` whose strides give its
layout. Blocks are copied whole and in memory order, see ``geometry``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import Rectangle


class KvPages:
    """The caches of all layers of one rank, in the order in which the model computes them.

    The caller owns the tensors; they must outlive this object. Whoever gathers or scatters must
    hold the blocks.
    """

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        first = layers[0]
        for layer in layers:
            if layer.dim() != 4 or layer.shape != first.shape or layer.stride() != first.stride():
                raise IncompatibleError(
                    "KV caches of unlike shape per layer cannot be streamed: "
                    f"{tuple(first.shape)} and {tuple(layer.shape)}"
                )
        # In memory order a block is one run of bytes, whichever of heads and tokens is outermost.
        heads_first = first.stride(1) >= first.stride(2)
        self._layers = [layer if heads_first else layer.transpose(1, 2) for layer in layers]
        if not self._layers[0][0].is_contiguous():
            raise IncompatibleError(f"blocks with strides {first.stride()} are not contiguous")
        self.device = first.device
        self.dtype = first.dtype

    def gather(self, area: Rectangle, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Copy a rectangle of a request's KV into ``out``.

        Args:
            block_ids: int64, on the CPU: the request's blocks from token 0 on.
            out: contiguous, 1-D, the cache's dtype and device, exactly as long as the rectangle.
        """
        ids = self._ids(area, block_ids)
        for layer, view in self._views(area, out):
            torch.index_select(layer, 0, ids, out=view)

    def scatter(self, area: Rectangle, block_ids: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a message into a request's blocks; arguments as in ``gather``."""
        ids = self._ids(area, block_ids)
        for layer, view in self._views(area, source):
            layer.index_copy_(0, ids, view)

    def _ids(self, area: Rectangle, block_ids: torch.Tensor) -> torch.Tensor:
        return block_ids[area.block_start : area.block_end].to(self.device)

    def _views(
        self, area: Rectangle, buffer: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's cache beside its part of the buffer, shaped as its blocks."""
        layers = self._layers[area.layer_start : area.layer_end]
        blocks = area.block_end - area.block_start
        parts = buffer.view(len(layers), blocks, *layers[0].shape[1:])
        return zip(layers, parts, strict=True)
