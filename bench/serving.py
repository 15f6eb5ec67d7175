"""Measures a whole cluster on this machine: its hand-off, and the TTFT that its router adds.

hand-off      the request's first token (from the prefill worker) -> its second token (from the
              decode worker), both at the router, minus one decode step (the mean time between later
              tokens of the same stream). "tail" is the prefill's last layer -> last byte of KV
              sent. The rest of the hand-off is mostly the time by which the decode worker's first
              step is longer than a later step.
router adds   TTFT at a client of the router, minus TTFT at a client that calls the prefill worker
              directly. The calls take turns, with prompts of the same length that are in no prefix
              cache. "alone": the router's client asks for one token, so no KV is streamed.
              "streamed": it asks for 8 tokens, so the KV is streamed to the decode worker.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import grpc

import baton
from baton.v1 import inference_pb2 as pb
from bench.report import Report, summary
from cluster.cli.progress import Progress
from cluster.local.launch import Cluster
from core.config.schema import load_config
from core.messages import worker_pb2, worker_pb2_grpc
from core.rpc.credentials import CHANNEL_OPTIONS
from core.types import Pool


def fresh_prompt(tokens: int, rng: random.Random) -> list[int]:
    """Return random token ids, which are in no prefix cache."""
    return [rng.randrange(100, 40_000) for _ in range(tokens)]


def measure_hand_off(client: baton.Client, tokens: int, rounds: int, report: Report) -> None:
    """Run one request at a time. The times are those that the router reports."""
    rng = random.Random(tokens)
    handoff_ms, tail_ms, ttft_ms, step_ms = [], [], [], []
    for index in range(rounds + 1):
        answer = client.complete(
            token_ids=fresh_prompt(tokens, rng), temperature=0, max_tokens=24, ignore_eos=True
        )
        phases = answer.phases
        if phases.kv is None or phases.kv.outcome is not baton.KvOutcome.TRANSFERRED:
            raise RuntimeError(f"the KV was not transferred: {phases}")
        if index > 0:  # the first request is a warm-up
            one_step_ms = phases.decode_ms / (len(answer.token_ids) - 2)
            handoff_ms.append(phases.handoff_ms - one_step_ms)
            tail_ms.append(phases.kv.tail_ms)
            ttft_ms.append(phases.ttft_ms)
            step_ms.append(one_step_ms)
    report.add(
        measurement="hand-off",
        tokens=tokens,
        **summary("handoff", handoff_ms),
        **summary("tail", tail_ms),
        **summary("ttft", ttft_ms),
        **summary("decode_step", step_ms),
    )


def measure_router_overhead(
    client: baton.Client,
    worker: worker_pb2_grpc.PrefillWorkerStub,
    tokens: int,
    rounds: int,
    report: Report,
) -> None:
    """Compare the TTFT of a direct call to the prefill worker with the TTFT through the router."""
    rng = random.Random(7 * tokens)
    direct_ms: list[float] = []
    alone_ms: list[float] = []
    streamed_ms: list[float] = []
    for index in range(rounds + 1):
        request = worker_pb2.PrefillRequest(
            key=worker_pb2.TransferKey(request_id=f"bench-{tokens}-{index}", attempt=1),
            token_ids=fresh_prompt(tokens, rng),
            sampling=pb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
        )
        began_s = time.perf_counter()
        worker.Prefill(request, timeout=60)
        ttfts_s = [time.perf_counter() - began_s]
        for max_tokens in (1, 8):
            prompt = fresh_prompt(tokens, rng)
            began_s = time.perf_counter()
            stream = client.generate(
                token_ids=prompt, temperature=0, max_tokens=max_tokens, ignore_eos=True
            )
            next(stream)
            ttfts_s.append(time.perf_counter() - began_s)
            for _ in stream:
                pass
        if index > 0:
            for series, seconds in zip((direct_ms, alone_ms, streamed_ms), ttfts_s, strict=True):
                series.append(seconds * 1000)
    direct_p50_ms = statistics.median(direct_ms)
    report.add(
        measurement="router adds to TTFT",
        tokens=tokens,
        adds_alone_ms=round(statistics.median(alone_ms) - direct_p50_ms, 2),
        adds_streamed_ms=round(statistics.median(streamed_ms) - direct_p50_ms, 2),
        **summary("direct", direct_ms),
        **summary("alone", alone_ms),
        **summary("streamed", streamed_ms),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = Report(args.json)
    config = load_config(
        overrides={"cluster.name": "bench", "router.port": 0, "model.max_model_len": 4096}
    )
    with Progress(sys.stderr) as progress, Cluster(config, progress.step) as cluster:
        progress.done()
        (prefill,) = [worker for worker in cluster.workers() if worker.pool is Pool.PREFILL]
        with baton.Client(cluster.address, timeout_s=120) as client:
            for tokens in (32, 540, 1690):
                measure_hand_off(client, tokens, args.rounds if tokens < 1000 else 10, report)
            with grpc.secure_channel(
                prefill.address, cluster.credentials.for_channel(), CHANNEL_OPTIONS
            ) as channel:
                worker = worker_pb2_grpc.PrefillWorkerStub(channel)
                for tokens in (16, 128):
                    measure_router_overhead(client, worker, tokens, args.rounds, report)
    report.save()


if __name__ == "__main__":
    main()
