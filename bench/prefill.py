"""Measures how much the KV stream slows prefill in vLLM.

There are three engines. Two prefill engines, one without the KV connector and one with it (P), are
bound to core 0. A decode engine (D) is bound to core 1. Three kinds of request take turns, with
prompts of the same length, so that drift of the machine affects all kinds equally:

    plain       runs on the engine without the connector
    held        runs on P; D does not fetch the KV
    streamed    runs on P and D at the same time; D reserves and receives the KV

The results:

    prefill_slowdown    time to first token, streamed / plain
    connector_slowdown  time to first token, held / plain
    handoff_ms          the request's first token (from P) -> its second token (from D), minus one
                        decode step
    tail_ms             P's last layer computed -> last byte sent

The two slowdowns differ by the cost of sending the KV. On a machine with only two cores, D's work
on the request also slows P, and adds to this difference.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from baton.v1 import inference_pb2 as pb
from bench.report import Report, summary
from core.config.schema import load_config
from core.model.resolve import resolve_model
from core.types import Pool
from engine.protocol import EngineRequest, KvReceive, KvSend
from engine.vllm.engine import VllmEngine, engine_arguments, start_llm

_ONE_TOKEN = pb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
_EIGHT_TOKENS = pb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Return random prompts that share no prefix, so that every prompt misses the prefix cache."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, vocabulary) for _ in range(tokens)) for _ in range(count)]


async def plain_ttft_ms(llm: AsyncLLM, ids: tuple[int, ...], name: str) -> float:
    """Return the time to the first token of an engine without the connector."""
    began_s = time.perf_counter()
    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    async with aclosing(
        llm.generate({"type": "token", "prompt_token_ids": list(ids)}, params, name)
    ) as outputs:
        async for _ in outputs:
            pass
    return (time.perf_counter() - began_s) * 1000


async def held_ttft_ms(prefill: VllmEngine, ids: tuple[int, ...], key: str) -> float:
    """Return the time to P's first token. Then release the KV, which D did not fetch."""
    began_s = time.perf_counter()
    async for _ in prefill.generate(EngineRequest(key, ids, _ONE_TOKEN, KvSend(True))):
        pass
    elapsed_ms = (time.perf_counter() - began_s) * 1000
    await prefill.release(key)
    return elapsed_ms


@dataclass(frozen=True)
class StreamedTimes:
    """The times of one request through both engines."""

    first_ms: float  # request -> P's first token
    second_ms: float  # first token, from P -> second token, from D
    step_ms: float  # D's decode step: the median time between its tokens
    kv: pb.KvReport


async def run_streamed(
    prefill: VllmEngine, decode: VllmEngine, receive: KvReceive, ids: tuple[int, ...], key: str
) -> StreamedTimes:
    """Run one request on P and D. Raises RuntimeError if the KV was not transferred."""
    began_s = time.perf_counter()
    reports: list[pb.KvReport] = []

    async def read(engine: VllmEngine, request: EngineRequest) -> list[float]:
        at_s = []
        async for output in engine.generate(request):
            at_s.append(time.perf_counter())
            if output.kv is not None:
                reports.append(output.kv)
        return at_s

    first_s, later_s = await asyncio.gather(
        read(prefill, EngineRequest(key, ids, _ONE_TOKEN, KvSend(True))),
        read(decode, EngineRequest(key, ids, _EIGHT_TOKENS, receive)),
    )
    (kv,) = (report for report in reports if report.outcome != pb.KV_OUTCOME_LOCAL)
    if kv.outcome != pb.KV_OUTCOME_TRANSFERRED:
        raise RuntimeError(f"the KV was not transferred: {kv}")
    steps_s = [after - before for before, after in itertools.pairwise(later_s)]
    return StreamedTimes(
        first_ms=(first_s[0] - began_s) * 1000,
        second_ms=(later_s[0] - first_s[0]) * 1000,
        step_ms=statistics.median(steps_s) * 1000,
        kv=kv,
    )


async def measure(
    cases: list[tuple[int, int]], overrides: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """Yield a row for each case (tokens, rounds), with SmolLM2 on this machine's CPUs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    config = load_config(overrides=overrides)
    model = resolve_model(config.model, print)
    incarnation = uuid4().hex
    prefill = VllmEngine(
        config,
        Pool.PREFILL,
        model,
        cpu_binding="0",
        kv_secret="bench",
        incarnation=f"{incarnation}-p",
    )
    facts = await prefill.start()
    # P's start has set environment variables, which bind the plain engine to P's core, too.
    plain = await asyncio.to_thread(start_llm, engine_arguments(config, Pool.PREFILL, model))
    decode = VllmEngine(
        config,
        Pool.DECODE,
        model,
        cpu_binding="1",
        kv_secret="bench",
        incarnation=f"{incarnation}-d",
    )
    await decode.start()
    receive = KvReceive(f"{incarnation}-p", facts.kv_addresses, True)
    try:
        for tokens, rounds in cases:
            plain_ms: list[float] = []
            held_ms: list[float] = []
            streamed: list[StreamedTimes] = []
            fresh_prompts = iter(prompts(3 * (rounds + 1), tokens, facts.vocab_size, seed=tokens))
            for index in range(rounds + 1):
                name = f"bench-{tokens}-{index}"
                plain_ms.append(await plain_ttft_ms(plain, next(fresh_prompts), name))
                held_ms.append(await held_ttft_ms(prefill, next(fresh_prompts), f"{name}#1"))
                streamed.append(
                    await run_streamed(prefill, decode, receive, next(fresh_prompts), f"{name}#2")
                )
            # The first round is a warm-up. In it, P and D also connect.
            del plain_ms[0], held_ms[0], streamed[0]
            base_ms = statistics.median(plain_ms)
            first_ms = [one.first_ms for one in streamed]
            yield {
                "tokens": tokens,
                "prefill_slowdown": round(statistics.median(first_ms) / base_ms, 4),
                "connector_slowdown": round(statistics.median(held_ms) / base_ms, 4),
                "hidden_share": round(
                    sum(one.kv.hidden_bytes for one in streamed)
                    / sum(one.kv.bytes for one in streamed),
                    4,
                ),
                "tail_ms": round(statistics.median(one.kv.tail_ms for one in streamed), 2),
                **summary("handoff", [one.second_ms - one.step_ms for one in streamed]),
                **summary("plain", plain_ms),
                **summary("held", held_ms),
                **summary("streamed", first_ms),
                **summary("decode_step", [one.step_ms for one in streamed]),
            }
    finally:
        await prefill.stop()
        await decode.stop()
        plain.shutdown()


async def print_rows(args: argparse.Namespace) -> None:
    report = Report(args.json)
    async for row in measure([(tokens, args.rounds) for tokens in args.tokens], {}):
        report.add(**row)
    report.save()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prefill", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 540, 1690])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    asyncio.run(print_rows(parser.parse_args()))


if __name__ == "__main__":
    main()
