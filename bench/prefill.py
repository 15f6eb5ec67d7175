"""What the KV stream costs the prefill: the same engine with and without it, side by side.

Three engines: a prefill engine without the connector and one with it, both bound to core 0, and
a decode engine on core 1 that receives. The two prefill engines answer the same kind of prompts in
turns, so that drift of the machine hits both alike. While one works the other is stopped (SIGSTOP):
an idle engine of vLLM's spins on its core for a second.
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

import psutil
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from baton.v1 import inference_pb2 as pb
from bench.report import Report, summary
from cluster.config import Config, load_config
from cluster.model import ResolvedModel, resolve_model
from cluster.types import Pool
from engine.protocol import EngineRequest, KvReceive, KvSend
from engine.vllm_engine import VllmEngine, engine_arguments, let_ranks_go_first

_ONE_TOKEN = pb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
_TWO_TOKENS = pb.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random prompts that share no prefix, so that no cache helps."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, vocabulary) for _ in range(tokens)) for _ in range(count)]


class Resting:
    """Processes that one engine's start added, to be stopped while another engine is timed."""

    def __init__(self, before: set[psutil.Process]) -> None:
        self._processes = set(psutil.Process().children(recursive=True)) - before

    def __enter__(self) -> None:
        for process in self._processes:
            process.suspend()

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.resume()


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
    prefill_rests = Resting(set())
    before = set(psutil.Process().children(recursive=True))
    # Same environment, and so the same core, as the engine just started.
    plain = await asyncio.to_thread(
        AsyncLLM.from_engine_args,
        AsyncEngineArgs(**engine_arguments(config, Pool.PREFILL, model)),
    )
    let_ranks_go_first(plain)
    plain_rests = Resting(before)
    decode = VllmEngine(config, Pool.DECODE, model, "1", "bench", f"{incarnation}-d")
    await decode.start()
    receive = KvReceive(f"{incarnation}-p", facts.kv_addresses, True)
    try:
        for tokens in args.tokens:
            with_ms: list[float] = []
            without_ms: list[float] = []
            handoff_ms: list[float] = []
            rounds = prompts(2 * (args.rounds + 1), tokens, facts.vocab_size, seed=tokens)
            for index in range(args.rounds + 1):
                with prefill_rests:
                    plain_ms = await time_plain(plain, rounds[2 * index], f"plain-{tokens}-{index}")
                with plain_rests:
                    streamed_ms, second_ms = await time_streamed(
                        prefill, decode, receive, rounds[2 * index + 1], f"bench-{tokens}-{index}#1"
                    )
                if index > 0:  # the first round warms up, and makes the pair
                    without_ms.append(plain_ms)
                    with_ms.append(streamed_ms)
                    handoff_ms.append(second_ms)
            report.add(
                tokens=tokens,
                prefill_slowdown=round(
                    statistics.median(with_ms) / statistics.median(without_ms), 4
                ),
                **summary("prefill_plain", without_ms),
                **summary("prefill_streamed", with_ms),
                **summary("first_to_second_token", handoff_ms),
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
