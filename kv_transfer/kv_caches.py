"""Gather from and scatter into an engine's KV caches.

Each layer's cache is a tensor ``[blocks, kv_heads, block_tokens, content]`` whose strides give its
layout. A ``UnitView`` gives access to the heads and units of one pair's plan, with the elements of
a unit in the same order on both sides. It cuts each unit into rows. All rows have the same length,
and each row is contiguous in memory, so one indexed copy per layer gathers a message. A whole
block is one row. A single token of a packed CPU block is many short rows.

On CPUs NumPy copies the rows. torch starts a team of threads for each thread that copies, and the
teams compete with the engine for its cores. torch is also slower for most row sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from core import memory
from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import HeadRange, LayerBlockRange, PairPlan

_DROPPED_BYTES = 4 * 2**20  # checked at a time: some blocks are written when an engine starts
_Rows = npt.NDArray[np.int64]

# Element types by size in bytes. Rows are copied as these types, which does not change the bits.
_WORDS = {8: torch.float64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class KvCaches:
    """The caches of all layers of one rank, in the order in which the model computes them.

    The caller owns the tensors; they must outlive this object. The blocks must not be given to
    another request during ``gather`` and ``scatter``.

    Args:
        positions: int64 ``[block_tokens, content]``, the place of each element within one
            head's share of a block. None if the strides give the place. A CPU attention kernel
            may pack the elements in another order.

    Raises:
        IncompatibleError: the layers differ in shape, strides or dtype, are not 4-D, or have
            blocks that are not contiguous.
    """

    def __init__(
        self, layers: Sequence[torch.Tensor], positions: torch.Tensor | None = None
    ) -> None:
        first = layers[0]
        for layer in layers:
            if (
                layer.dim() != 4
                or (layer.shape, layer.dtype) != (first.shape, first.dtype)
                or layer.stride() != first.stride()
            ):
                raise IncompatibleError(
                    "KV caches must be 4-D, with the same shape, type and strides in all layers: "
                    f"{tuple(first.shape)} {first.dtype} {first.stride()} and "
                    f"{tuple(layer.shape)} {layer.dtype} {layer.stride()}"
                )
        _, heads, tokens, content = first.shape
        # A block is one run of bytes in memory order, with heads or tokens as the outer dimension.
        self._heads_first = first.stride(1) >= first.stride(2)
        inside = first[0] if self._heads_first else first[0].transpose(0, 1)
        if not inside.is_contiguous():
            raise IncompatibleError(f"blocks with strides {first.stride()} are not contiguous")
        if positions is None:
            token = torch.arange(tokens).unsqueeze(1) * first.stride(2)
            positions = token + torch.arange(content)
        head = torch.arange(heads).view(-1, 1, 1) * first.stride(1)
        self._elements = head + positions  # [heads, tokens, content] -> place in the block
        self._layers = layers
        self.device = first.device
        self.dtype = first.dtype

    def drop_zeros(self) -> None:
        """Give memory of CPU caches that was never written back to the system.

        vLLM fills new caches with zeros, which takes their memory long before requests do. Nobody
        may write to the caches during this call.
        """
        if self.device.type != "cpu":
            return
        storages = [layer.untyped_storage() for layer in self._layers]
        for storage in {
            each.data_ptr(): each for each in storages
        }.values():  # layers may share one
            values = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            if values.nbytes % 8 == 0:
                values = values.view(np.uint64)  # several times as fast
            for part in np.array_split(values, max(1, values.nbytes // _DROPPED_BYTES)):
                if not part.any():
                    memory.drop_zeros(part.ctypes.data, part.nbytes)

    def view(self, plan: PairPlan, held: HeadRange) -> UnitView:
        """Return the units of a plan in these caches; ``held`` are the heads of this rank."""
        head = plan.heads.start - held.start
        _, heads, tokens, content = self._layers[0].shape
        elements = self._elements
        if plan.whole_blocks:  # in memory order, which needs no positions
            shape = (heads, tokens, content) if self._heads_first else (tokens, heads, content)
            elements = torch.arange(elements.numel()).view(shape)
            if not self._heads_first:
                elements = elements.transpose(0, 1)
        elements = elements[head : head + len(plan.heads)]
        # [heads, tokens, content] -> [units of a block, elements of a unit]
        by_unit = elements.unflatten(1, (-1, plan.unit_tokens)).transpose(0, 1)
        if plan.whole_blocks and not self._heads_first:
            by_unit = by_unit.transpose(1, 2)
        return UnitView(self._layers, by_unit.flatten(1))


class UnitView:
    """Units in one rank's caches.

    Args:
        layers: the caches ``[blocks, ...]`` of all layers, of equal shape and strides.
        elements: int64 ``[units of a block, elements of a unit]``: the place in a block of each
            element of a unit, in the order of the wire.
    """

    def __init__(self, layers: Sequence[torch.Tensor], elements: torch.Tensor) -> None:
        first = layers[0]
        self._num_blocks = first.shape[0]
        self._units_per_block, self.unit_elements = elements.shape
        self.device, self.dtype = first.device, first.dtype
        run = _run_length(elements, first.stride(0)) if self.unit_elements else 1
        aligned_to = [run, *(layer.storage_offset() for layer in layers)]
        word_bytes = math.gcd(8, *(n * first.element_size() for n in aligned_to))
        word = _WORDS[word_bytes]
        self._run_words = run * first.element_size() // word_bytes
        block_elements = first[0].numel()
        rows = ((first.shape[0] - 1) * first.stride(0) + block_elements) // run
        # NumPy copies rows of one word faster if the array is 1-D.
        shape = (rows,) if self._run_words == 1 else (rows, self._run_words)
        self._layers = [
            layer.as_strided((rows * run,), (1,)).view(word).view(shape) for layer in layers
        ]
        self._word = word
        self._rows_per_block = first.stride(0) // run
        # [units of a block, rows of a unit]
        self._rows: _Rows = (elements[:, ::run] // run).numpy()

    def staging(self, max_units: int, count: int) -> list[torch.Tensor]:
        """Allocate ``count`` buffers for messages of at most ``max_units`` units."""
        elements = max_units * self.unit_elements
        return [torch.empty(elements, dtype=self.dtype, device=self.device) for _ in range(count)]

    def gather(
        self, block_range: LayerBlockRange, block_ids: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Copy a block range of a request's KV into ``out``.

        Args:
            block_ids: int64, on the CPU: the request's blocks from token 0 on.
            out: contiguous, 1-D, the cache's dtype and device, exactly as long as the range.
        """
        rows = self._rows_of(block_range, block_ids)
        if self.device.type == "cpu":
            for layer, share in self._by_layer(block_range, out):
                # With the default mode, NumPy fills a buffer of its own before ``out``. "clip"
                # clips no index, because ``_rows_of`` has checked the block ids.
                np.take(layer.numpy(), rows, axis=0, out=share.numpy(), mode="clip")
            return
        index = torch.from_numpy(rows).to(self.device)
        for layer, share in self._by_layer(block_range, out):
            torch.index_select(layer, 0, index, out=share)

    def scatter(
        self, block_range: LayerBlockRange, block_ids: torch.Tensor, source: torch.Tensor
    ) -> None:
        """Copy the message ``source`` into a request's blocks. See ``gather`` for the arguments."""
        rows = self._rows_of(block_range, block_ids)
        if self.device.type == "cpu":
            for layer, share in self._by_layer(block_range, source):
                layer.numpy()[rows] = share.numpy()
            return
        index = torch.from_numpy(rows).to(self.device)
        for layer, share in self._by_layer(block_range, source):
            layer.index_copy_(0, index, share)

    def _rows_of(self, block_range: LayerBlockRange, block_ids: torch.Tensor) -> _Rows:
        """Return the rows of one layer that a range covers, in the order of the wire.

        Raises:
            IndexError: a block is outside of the cache.
        """
        units = np.arange(block_range.unit_start, block_range.unit_end)
        blocks = block_ids.numpy()[units // self._units_per_block]
        if blocks.max() >= self._num_blocks:
            raise IndexError(f"block {blocks.max()} of {self._num_blocks}")
        inside = self._rows[units % self._units_per_block]
        rows: _Rows = (blocks[:, None] * self._rows_per_block + inside).ravel()
        return rows

    def _by_layer(
        self, block_range: LayerBlockRange, buffer: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pair the rows of each layer with the layer's share of the buffer."""
        layers = self._layers[block_range.layer_start : block_range.layer_end]
        shares = buffer.view(self._word).view(len(layers), -1, *layers[0].shape[1:])
        return zip(layers, shares, strict=True)


def _run_length(elements: torch.Tensor, block_stride: int) -> int:
    """Return the greatest run length into which all units can be cut.

    Each run is contiguous in memory. A run's offset in its block is a multiple of the run length.
    """
    places = elements.flatten()
    breaks = (places.diff() != 1).nonzero().flatten() + 1  # indices at which a new run begins
    unit_elements = elements.shape[1]
    begins = places[torch.cat([torch.zeros(1, dtype=torch.int64), breaks])]
    return math.gcd(block_stride, unit_elements, *breaks.tolist(), *begins.tolist())
