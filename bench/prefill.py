"""What the KV stream costs the prefill: the same engine with and without it, side by side.

Three engines: a prefill engine without the connector and one with it, both bound to core 0, and
a decode engine on core 1 that receives. The two prefill engines answer the same kind of prompts in
turns, so that drift of the machine hits both alike.

    plain       without the connector
    held        with the connector, and nobody fetches the KV
    streamed    the decode engine gets the request at the same time, reserves and receives

``prefill_slowdown`` is streamed / plain, ``connector_slowdown`` is held / plain. Between the two
lies the KV itself and, on two cores, the decode engine's own work on the request.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from contextlib import aclosing
from pathlib import Path
from uuid import uuid4

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from baton.v1 import inference_pb2 as pb
from bench.report import Report, summary
from cluster.config import Config, load_config
from cluster.model import ResolvedModel, resolve_model
from cluster.types import Pool
from engine.protocol import EngineRequest, KvReceive, KvSend
from engine.vllm_engine import VllmEngine, engine_arguments, start_llm

_ONE_TOKEN = pb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
_TWO_TOKENS = pb.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random prompts that share no prefix, so that no cache helps."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, vocabulary) for _ in range(tokens)) for _ in range(count)]


async def time_plain(llm: AsyncLLM, ids: tuple[int, ...], name: str) -> float:
    """Milliseconds from the request to its first token, without the connector."""
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


async def time_held(prefill: VllmEngine, ids: tuple[int, ...], key: str) -> float:
    """Milliseconds to P's first token with a KV that is dropped unread."""
    began_s = time.perf_counter()
    async for _ in prefill.generate(EngineRequest(key, ids, _ONE_TOKEN, KvSend(True))):
        pass
    elapsed_ms = (time.perf_counter() - began_s) * 1000
    await prefill.release(key)
    return elapsed_ms


async def time_streamed(
    prefill: VllmEngine, decode: VllmEngine, receive: KvReceive, ids: tuple[int, ...], key: str
) -> tuple[float, float]:
    """Milliseconds to P's first token, and from there to D's second, with the KV stream."""
    began_s = time.perf_counter()

    async def read(engine: VllmEngine, request: EngineRequest) -> float:
        at_s = 0.0
        async for _ in engine.generate(request):
            at_s = time.perf_counter()
        return at_s

    first_s, second_s = await asyncio.gather(
        read(prefill, EngineRequest(key, ids, _ONE_TOKEN, KvSend(True))),
        read(decode, EngineRequest(key, ids, _TWO_TOKENS, receive)),
    )
    return (first_s - began_s) * 1000, (second_s - first_s) * 1000


async def measure(config: Config, model: ResolvedModel, args: argparse.Namespace) -> None:
    report = Report(args.json)
    incarnation = uuid4().hex
    prefill = VllmEngine(config, Pool.PREFILL, model, "0", "bench", f"{incarnation}-p")
    facts = await prefill.start()
    # Same environment, and so the same core, as the engine just started.
    plain = await asyncio.to_thread(start_llm, engine_arguments(config, Pool.PREFILL, model))
    decode = VllmEngine(config, Pool.DECODE, model, "1", "bench", f"{incarnation}-d")
    await decode.start()
    receive = KvReceive(f"{incarnation}-p", facts.kv_addresses, True)
    try:
        for tokens in args.tokens:
            plain_ms: list[float] = []
            held_ms: list[float] = []
            streamed_ms: list[float] = []
            second_ms: list[float] = []
            fresh = iter(prompts(3 * (args.rounds + 1), tokens, facts.vocab_size, seed=tokens))
            for index in range(args.rounds + 1):
                name = f"bench-{tokens}-{index}"
                plain_ms.append(await time_plain(plain, next(fresh), name))
                held_ms.append(await time_held(prefill, next(fresh), f"{name}#1"))
                first, second = await time_streamed(
                    prefill, decode, receive, next(fresh), f"{name}#2"
                )
                streamed_ms.append(first)
                second_ms.append(second)
            for series in (plain_ms, held_ms, streamed_ms, second_ms):
                del series[0]  # the first round warms up, and makes the pair
            base_ms = statistics.median(plain_ms)
            report.add(
                tokens=tokens,
                prefill_slowdown=round(statistics.median(streamed_ms) / base_ms, 4),
                connector_slowdown=round(statistics.median(held_ms) / base_ms, 4),
                **summary("plain", plain_ms),
                **summary("held", held_ms),
                **summary("streamed", streamed_ms),
                **summary("first_to_second_token", second_ms),
            )
    finally:
        await prefill.stop()
        await decode.stop()
        plain.shutdown()
    report.save()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prefill", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 540, 1690])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    config = load_config(overrides={"model.max_model_len": 4096})
    asyncio.run(measure(config, resolve_model(config.model, print), args))


if __name__ == "__main__":
    main()
