"""Gather from and scatter into an engine's paged KV cache.

Each layer's cache is a tensor ``[blocks, kv_heads, block_tokens, content]`` whose strides give its
layout. A ``PageView`` is such a cache as one pair's plan sees it: pages of some of the heads, in an
order on which both sides agree. That order becomes a list of rows, the longest runs that lie
together in memory, so that one ``index_select`` a layer gathers a message: a whole block is one
row, single tokens of a packed CPU block are many short ones.

On CPUs NumPy copies the rows: torch would do it with a team of threads for each thread that
copies, on the cores on which the engine computes, and is slower at most sizes of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kv_transfer.errors import IncompatibleError
from kv_transfer.geometry import HeadRange, PairPlan, Rectangle

_Rows = npt.NDArray[np.int64]

# By bytes; bits are moved, whatever they mean.
_WORDS = {8: torch.float64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class KvPages:
    """The caches of all layers of one rank, in the order in which the model computes them.

    The caller owns the tensors; they must outlive this object. Whoever gathers or scatters must
    hold the blocks.

    Args:
        positions: int64 ``[block_tokens, content]``: where each element lies in the part of a
            block that belongs to one head, if the attention kernel packs it otherwise than the
            strides say.
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
                    "KV caches of unlike shape or type per layer cannot be streamed: "
                    f"{tuple(first.shape)} {first.dtype} and {tuple(layer.shape)} {layer.dtype}"
                )
        _, heads, tokens, content = first.shape
        # In memory order a block is one run of bytes, whichever of heads and tokens is outermost.
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

    def view(self, plan: PairPlan, held: HeadRange) -> PageView:
        """The pages of a plan in this cache; ``held`` are the heads of this rank."""
        head = plan.heads.start - held.start
        _, heads, tokens, content = self._layers[0].shape
        elements = self._elements
        if plan.whole_blocks:  # in memory order, whatever it means
            shape = (heads, tokens, content) if self._heads_first else (tokens, heads, content)
            elements = torch.arange(elements.numel()).view(shape)
            if not self._heads_first:
                elements = elements.transpose(0, 1)
        elements = elements[head : head + len(plan.heads)]
        # [heads, tokens, content] -> [pages of a block, elements of a page]
        by_page = elements.unflatten(1, (-1, plan.page_tokens)).transpose(0, 1)
        if plan.whole_blocks and not self._heads_first:
            by_page = by_page.transpose(1, 2)
        return PageView(self._layers, by_page.flatten(1))


class PageView:
    """Pages in one rank's caches.

    Args:
        layers: of equal shape and strides, ``[blocks, ...]``.
        elements: int64 ``[pages of a block, elements of a page]``: where in a block each element
            of a page lies, in the order of the wire.
    """

    def __init__(self, layers: Sequence[torch.Tensor], elements: torch.Tensor) -> None:
        first = layers[0]
        self._num_blocks = first.shape[0]
        self._pages_per_block, self.page_elements = elements.shape
        self.device, self.dtype = first.device, first.dtype
        run = _run_length(elements, first.stride(0)) if self.page_elements else 1
        at = [run, *(layer.storage_offset() for layer in layers)]
        word_bytes = math.gcd(8, *(place * first.element_size() for place in at))
        word = _WORDS[word_bytes]
        self._run_words = run * first.element_size() // word_bytes
        block_elements = first[0].numel()
        rows = ((first.shape[0] - 1) * first.stride(0) + block_elements) // run
        # Rows of one word are a vector, which NumPy copies faster.
        shape = (rows,) if self._run_words == 1 else (rows, self._run_words)
        self._layers = [
            layer.as_strided((rows * run,), (1,)).view(word).view(shape) for layer in layers
        ]
        self._word = word
        self._rows_per_block = first.stride(0) // run
        # [pages of a block, rows of a page]
        self._rows: _Rows = (elements[:, ::run] // run).numpy()

    def staging(self, max_pages: int, count: int) -> list[torch.Tensor]:
        """Buffers for messages of at most ``max_pages``."""
        elements = max_pages * self.page_elements
        return [torch.empty(elements, dtype=self.dtype, device=self.device) for _ in range(count)]

    def gather(self, area: Rectangle, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Copy a rectangle of a request's KV into ``out``.

        Args:
            block_ids: int64, on the CPU: the request's blocks from token 0 on.
            out: contiguous, 1-D, the cache's dtype and device, exactly as long as the rectangle.
        """
        rows = self._rows_of(area, block_ids)
        if self.device.type == "cpu":
            for layer, part in self._parts(area, out):
                # Unless it may clip, NumPy fills a buffer of its own first; nothing is to clip.
                np.take(layer.numpy(), rows, axis=0, out=part.numpy(), mode="clip")
            return
        index = torch.from_numpy(rows).to(self.device)
        for layer, part in self._parts(area, out):
            torch.index_select(layer, 0, index, out=part)

    def scatter(self, area: Rectangle, block_ids: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a message into a request's blocks; arguments as in ``gather``."""
        rows = self._rows_of(area, block_ids)
        if self.device.type == "cpu":
            for layer, part in self._parts(area, source):
                layer.numpy()[rows] = part.numpy()
            return
        index = torch.from_numpy(rows).to(self.device)
        for layer, part in self._parts(area, source):
            layer.index_copy_(0, index, part)

    def _rows_of(self, area: Rectangle, block_ids: torch.Tensor) -> _Rows:
        """The rows of one layer that a rectangle covers, in the order of the wire.

        Raises:
            IndexError: a block is outside of the cache.
        """
        pages = np.arange(area.page_start, area.page_end)
        blocks = block_ids.numpy()[pages // self._pages_per_block]
        if blocks.max() >= self._num_blocks:
            raise IndexError(f"block {blocks.max()} of {self._num_blocks}")
        inside = self._rows[pages % self._pages_per_block]
        rows: _Rows = (blocks[:, None] * self._rows_per_block + inside).ravel()
        return rows

    def _parts(
        self, area: Rectangle, buffer: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's rows beside its part of the buffer."""
        layers = self._layers[area.layer_start : area.layer_end]
        parts = buffer.view(self._word).view(len(layers), -1, *layers[0].shape[1:])
        return zip(layers, parts, strict=True)


def _run_length(elements: torch.Tensor, block_stride: int) -> int:
    """The longest run into which all pages fall, each run a multiple of itself from its block."""
    places = elements.flatten()
    breaks = (places.diff() != 1).nonzero().flatten() + 1  # where a new run begins
    page = elements.shape[1]
    begins = places[torch.cat([torch.zeros(1, dtype=torch.int64), breaks])]
    return math.gcd(block_stride, page, *breaks.tolist(), *begins.tolist())
