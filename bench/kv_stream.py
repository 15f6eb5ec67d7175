"""The KV stream by itself, between two processes: how fast, how well hidden, what it costs.

A prefill process, bound to core 0, computes simulated prompts: for each layer of each chunk of 512
tokens some matrix products, then the hooks that vLLM would call. A decode process reserves and
receives, with one client and one cache for each pair.

    gbps              KV that is already computed, from the first header to the last manifest
    raw_gbps          as many bytes by ProcessGroup.send/recv alone, from and to contiguous memory,
                      in messages of the same size, as many at a time
    memcpy_gbps       one thread copies messages of that size (read + written counts once)
    hidden_share      share of the bytes that was sent before the last layer was computed
    prefill_slowdown  time of the prefill with the stream / without, in turns; 1.00 is none
    tail_ms           last layer computed -> manifest complete at decode
    handoff_ms        first token sampled -> the decode engine's thread has the result

For SmolLM2 and one pair, vLLM replaces the simulated prefill (unless ``--no-engines`` is given).
There ``handoff_ms`` is P's first token -> D's second, minus one decode step. The slowdown, the
hidden share and the tail are those of the real engines; see ``bench.prefill``.
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
    """Return the seconds in which one thread copies as many bytes, message by message."""
    source = torch.ones(64 * MIB // 8, dtype=torch.int64)
    target = torch.zeros_like(source).add_(1)  # maps its memory before the clock runs
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
        side.bulk_s()  # makes the pairs
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
    parser.add_argument("--budget-s", type=float, default=30, help="for the prefills of a case")
    parser.add_argument("--tokens-per-s", type=float, default=1000, help="of the prefill")
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
    """Measure real engines; rows by geometry, tokens and pairs."""
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
