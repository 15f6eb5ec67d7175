"""Measures how fast block units are gathered and scattered.

A plain copy of the same number of bytes is the reference. Blocks are in random order, as in an
engine that has run for a while. On a GPU, all copies stay on the device, and CUDA events measure
the times. ``gbps`` means gigabytes per second. ``kv_transfer.geometry`` defines block units.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.kv_case import GEOMETRIES, MIB
from bench.report import Report
from kv_transfer.geometry import LayerBlockRange, plan_pair, split_into_messages
from kv_transfer.kv_caches import KvCaches

_TOTAL_BYTES = 512 * MIB  # of KV; larger than the L3 of most CPUs and the L2 of most GPUs


def seconds(device: torch.device, run: Callable[[], None]) -> float:
    """Return the seconds that one run takes. On a GPU, CUDA events measure them."""
    if device.type == "cpu":
        began_s = time.perf_counter()
        run()
        return time.perf_counter() - began_s
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def measure(
    name: str, block_tokens: int, message_bytes: int, device: torch.device, report: Report
) -> None:
    geometry = replace(GEOMETRIES[name], block_tokens=block_tokens)
    blocks = _TOTAL_BYTES // geometry.num_layers // geometry.block_bytes
    shape = (blocks, geometry.total_kv_heads, block_tokens, geometry.content)
    dtype = getattr(torch, geometry.dtype)
    layers = [
        torch.full(shape, 0.5, dtype=dtype, device=device) for _ in range(geometry.num_layers)
    ]
    plan = plan_pair(geometry, geometry)
    view = KvCaches(layers).view(plan, geometry.heads)
    everything = LayerBlockRange(0, geometry.num_layers, 0, blocks)
    messages = list(split_into_messages(everything, plan.max_units(message_bytes)))
    buffer = torch.empty(
        plan.max_units(message_bytes) * view.unit_elements, dtype=dtype, device=device
    )
    shares = [buffer[: message.num_units * view.unit_elements] for message in messages]
    ids = torch.randperm(blocks)
    num_bytes = everything.num_units * plan.unit_bytes
    flat = [layer.view(-1) for layer in layers]

    def gather() -> None:
        for message, share in zip(messages, shares, strict=True):
            view.gather(message, ids, share)

    def scatter() -> None:
        for message, share in zip(messages, shares, strict=True):
            view.scatter(message, ids, share)

    def copy() -> None:
        half = flat[0].numel() // 2
        for layer in flat:
            layer[:half].copy_(layer[half : 2 * half])
            layer[half : 2 * half].copy_(layer[:half])

    gbps = {}
    for what, run in (("gather", gather), ("scatter", scatter), ("copy", copy)):
        run()
        gbps[what] = num_bytes / statistics.median(seconds(device, run) for _ in range(7)) / 1e9
    report.add(
        geometry=name,
        block_tokens=block_tokens,
        device=str(device),
        message_bytes=message_bytes,
        **{f"{what}_gbps": round(value, 2) for what, value in gbps.items()},
        gather_of_copy=round(gbps["gather"] / gbps["copy"], 3),
        scatter_of_copy=round(gbps["scatter"] / gbps["copy"], 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kv_copy", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--message-bytes", type=int, default=4 * MIB)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(args.json)
    for name in GEOMETRIES:
        for block_tokens in (16, 128):
            measure(name, block_tokens, args.message_bytes, torch.device(args.device), report)
    report.save()


if __name__ == "__main__":
    main()
