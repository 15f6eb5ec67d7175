"""One prefill and one decode engine of vLLM, used from one event loop without a router or Ray."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from baton.v1 import inference_pb2 as pb
from core.config.schema import load_config
from core.model.resolve import resolve_model
from core.types import Pool
from engine.protocol import EngineOutput, EngineRequest, KvReceive, KvSend
from engine.vllm.engine import VllmEngine
from tests.support.waiting import until

GREEDY = pb.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@dataclass
class Engines:
    """Both engines, and the names that requests use for them."""

    prefill: VllmEngine
    decode: VllmEngine
    receive: KvReceive  # names the prefill engine in requests to the decode engine
    decode_incarnation: str
    decode_addresses: tuple[str, ...]  # of KV control; empty without ``cluster.role_change``

    def swapped(self) -> Engines:
        """Return the same engines, each in the other's role. Needs ``cluster.role_change``."""
        receive = KvReceive(self.decode_incarnation, self.decode_addresses, True)
        return Engines(
            prefill=self.decode,
            decode=self.prefill,
            receive=receive,
            decode_incarnation=self.receive.incarnation,
            decode_addresses=self.receive.control_addresses,
        )

    @property
    def block_tokens(self) -> tuple[int, int]:
        """Tokens per KV block of the prefill and of the decode engine."""
        return _block_tokens(self.prefill), _block_tokens(self.decode)

    async def generate(
        self,
        engine: VllmEngine,
        key: str,
        prompt: list[int],
        kv: KvSend | KvReceive | None,
        sampling: pb.SamplingParams = GREEDY,
        so_far: int = 0,
    ) -> list[EngineOutput]:
        """Return all outputs of one request. A prefill (``KvSend``) generates one token.

        Args:
            so_far: how many tokens at the prompt's end are the output of an earlier attempt.
        """
        wanted = pb.SamplingParams()
        wanted.CopyFrom(sampling)
        if isinstance(kv, KvSend):
            wanted.max_tokens = 1
        request = EngineRequest(key, tuple(prompt), wanted, kv, so_far)
        return [output async for output in engine.generate(request)]

    async def streamed(
        self, prompt: list[int], sampling: pb.SamplingParams = GREEDY, so_far: int = 0
    ) -> tuple[list[int], pb.KvReport]:
        """Run a request on both engines. Return all tokens and the decode engine's report of the KV
        transfer. If the KV arrived, the first token comes from the prefill engine."""
        key = f"{uuid4().hex}#1"
        sent, received = await asyncio.gather(
            self.generate(self.prefill, key, prompt, KvSend(True), sampling, so_far),
            self.generate(self.decode, key, prompt, self.receive, sampling, so_far),
        )
        report = received[0].kv
        assert report is not None
        tokens = [token for output in received for token in output.token_ids]
        if received[0].first_index == 1:
            tokens = [*sent[0].token_ids, *tokens]
        return tokens, report

    async def aggregated(
        self, prompt: list[int], sampling: pb.SamplingParams = GREEDY, so_far: int = 0
    ) -> list[int]:
        """Run a request on the prefill engine alone. Return all tokens."""
        key = f"{uuid4().hex}#1"
        outputs = await self.generate(self.prefill, key, prompt, None, sampling, so_far)
        return [token for output in outputs for token in output.token_ids]

    async def wait_all_free(self) -> None:
        """Wait until all KV blocks of both engines are free."""
        for engine in (self.prefill, self.decode):
            await until(partial(_is_free, engine), what="all KV blocks are free")


def _block_tokens(engine: VllmEngine) -> int:
    assert engine._llm is not None
    return int(engine._llm.vllm_config.cache_config.block_size)


def _is_free(engine: VllmEngine) -> bool:
    load = engine.load()
    return load.kv_blocks_free == load.kv_blocks_total


@asynccontextmanager
async def two_engines(overrides: Mapping[str, Any], cores: Sequence[str]) -> AsyncIterator[Engines]:
    """Start both engines. Stop them when the block ends.

    Args:
        overrides: fields of the configuration.
        cores: the CPU binding of the prefill engine, then that of the decode engine.
    """
    environment = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    config = load_config(overrides=overrides)
    model = resolve_model(config.model, print)
    names = f"{uuid4().hex}-p", f"{uuid4().hex}-d"
    prefill = VllmEngine(
        config=config,
        pool=Pool.PREFILL,
        model=model,
        cpu_binding=cores[0],
        kv_secret="secret",
        incarnation=names[0],
    )
    decode = VllmEngine(
        config=config,
        pool=Pool.DECODE,
        model=model,
        cpu_binding=cores[1],
        kv_secret="secret",
        incarnation=names[1],
    )
    try:
        # One after the other: each engine takes the metrics of an earlier one out of the registry,
        # and those of the decode engine are tested.
        facts = await prefill.start()
        decode_facts = await decode.start()
        receive = KvReceive(names[0], facts.kv_addresses, True)
        yield Engines(prefill, decode, receive, names[1], decode_facts.kv_addresses)
    finally:
        await prefill.stop()
        await decode.stop()
        os.environ.clear()
        os.environ.update(environment)
