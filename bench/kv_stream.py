"""Measures the KV stream between two processes: its bandwidth, and how much it slows prefill.

A prefill process simulates prefill on the first core: for each layer of each chunk of 512 tokens,
it computes some matrix products and calls the hooks that vLLM would call. A decode process reserves
and receives the KV, with one client and one cache for each pair. All bandwidths are in gigabytes
per second.

    gbps              the stream when all KV is already computed: reservations -> last result
    raw_gbps          ProcessGroup.send/recv alone, from and to contiguous memory: the same number
                      of bytes, in messages of the same size, with the same number in flight
    memcpy_gbps       one thread copies messages of this size (each byte counts once)
    hidden_share      share of the bytes that are sent before the last layer is computed
    prefill_slowdown  prefill time with the stream / prefill time without it. Prefills with and
                      without the stream take turns
    tail_ms           last layer computed -> the decode process has the result
    handoff_ms        first token sampled -> the decode process has the result

For SmolLM2 with one pair, the last four values come from real vLLM engines, as ``bench.prefill``
defines them. ``--no-engines`` turns this off.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.kv_case import GEOMETRIES, MIB, Case
from bench.kv_ends import DecodeSide
from bench.report import Report, quantile


def memcpy_s(case: Case) -> float:
    """Return the seconds that one thread takes to copy the case's bytes, message by message."""
    source = torch.ones(64 * MIB // 8, dtype=torch.int64)
    target = torch.zeros_like(source).add_(1)  # writes to it, so that its memory is mapped
    words = case.message_bytes // 8
    began_s = time.monotonic()
    done = 0
    while done < case.num_bytes:
        at = done // 8 % (source.numel() - words + 1)
        target[at : at + words].copy_(source[at : at + words])
        done += case.message_bytes
    return time.monotonic() - began_s


def measure(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a case with a simulated prefill."""
    side = DecodeSide(case)
    try:
        bulk_s, raw_s, copy_s = [], [], []
        plain_s, streamed_s = [], []
        tail_ms: list[float] = []
        handoff_ms: list[float] = []
        hidden = total = 0
        side.bulk_s()  # warm-up; makes the pairs
        for _ in range(args.rounds):
            bulk_s.append(side.bulk_s())
            raw_s.append(side.raw_s())
            copy_s.append(memcpy_s(case))
        side.call("calibrate", args.tokens_per_s)
        seconds = 2 * case.tokens * case.pairs / args.tokens_per_s
        for _ in range(max(3, min(args.rounds, round(args.budget_s / seconds)))):
            plain_s.append(side.call("plain"))
            side.reserve(transfer_ids := side.new_transfer_ids())
            side.begin_prefill(transfer_ids)
            found, at_s = side.results()
            began, computed, sampled = side.end_prefill()
            streamed_s.append(computed - began)
            tail_ms += [(at - computed) * 1000 for at in at_s]
            handoff_ms += [(at - sampled) * 1000 for at in at_s]
            hidden += sum(result.hidden_bytes for result in found)
            total += sum(result.num_bytes for result in found)
    finally:
        side.stop()

    def gbps(seconds: list[float]) -> float:
        return round(case.num_bytes / statistics.median(seconds) / 1e9, 3)

    return {
        "geometry": name,
        "tokens": case.tokens,
        "pairs": case.pairs,
        "mib": round(case.num_bytes / MIB, 1),
        "message_bytes": case.message_bytes,
        "gbps": gbps(bulk_s),
        "raw_gbps": gbps(raw_s),
        "memcpy_gbps": gbps(copy_s),
        "of_raw": round(statistics.median(raw_s) / statistics.median(bulk_s), 3),
        "hidden_share": round(hidden / total, 4),
        "prefill_slowdown": round(statistics.median(streamed_s) / statistics.median(plain_s), 4),
        "tail_ms": round(statistics.median(tail_ms), 2),
        "handoff_ms_p50": round(statistics.median(handoff_ms), 2),
        "handoff_ms_p99": round(quantile(handoff_ms, 0.99), 2),
        "rounds": len(streamed_s),
        "prefill": "simulated",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kv_stream", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES))
    parser.add_argument("--message-bytes", type=int, default=2 * MIB)
    parser.add_argument("--staging-buffers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--budget-s", type=float, default=30, help="for a case's prefills; at least 3 rounds run"
    )
    parser.add_argument("--tokens-per-s", type=float, default=1000, help="simulated prefill speed")
    parser.add_argument("--engines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = Report(args.json)
    engines = asyncio.run(measure_engines(args)) if args.engines else {}
    for name in args.geometry:
        for tokens in args.tokens:
            for pairs in args.pairs:
                case = Case(
                    GEOMETRIES[name], tokens, pairs, args.message_bytes, args.staging_buffers
                )
                real = engines.get((name, tokens, pairs), {})
                report.add(**measure(name, case, args) | real)
    report.save()


async def measure_engines(args: argparse.Namespace) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Measure real engines. Return the rows by (geometry, tokens, pairs)."""
    from bench import prefill  # imports vLLM, which takes seconds

    if "smollm2-135m" not in args.geometry or 1 not in args.pairs:
        return {}
    cases = [  # the model's context must also hold the answer
        (min(tokens, 8192 - 16), max(3, min(args.rounds, 20_000 // tokens)))
        for tokens in args.tokens
    ]
    overrides = {
        "kv_transfer.message_bytes": args.message_bytes,
        "kv_transfer.staging_buffers": args.staging_buffers,
    }
    rows = [row async for row in prefill.measure(cases, overrides)]
    return {
        ("smollm2-135m", tokens, 1): row | {"tokens": tokens, "prefill": "vllm", "rounds": rounds}
        for tokens, (_, rounds), row in zip(args.tokens, cases, rows, strict=True)
    }


if __name__ == "__main__":
    main()
