"""A router with fake workers and a small tokeniser, all in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from baton.v1 import inference_pb2, inference_pb2_grpc
from core.config.schema import Config
from core.state.journal import JournalStore
from core.state.registry import MemoryRegistry
from router.server import RouterServer
from router.text.codec import ChatTurn, ModelFacts, TextCodec
from tests.support.fake_workers import MODEL, WAIT_S, FakeDecode, FakePrefill

CONTEXT_TOKENS = 64
SPECIAL = ("<|end|>", "<|user|>")
LINES = (
    "the quick brown fox jumps over the lazy dog",
    "the answer is the answer, and the question is the question",
    "größer, schöner, weiter: naïve café — 你好，世界 😀🎉",
)


@functools.cache
def make_tokenizer() -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokeniser. Every byte and some words of ``LINES`` are tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def render_chat(turns: Sequence[ChatTurn]) -> str:
    return "".join(f"<|user|>{turn.role}: {turn.content}" for turn in turns)


def make_codec(context_tokens: int = CONTEXT_TOKENS) -> TextCodec:
    tokenizer = make_tokenizer()
    facts = ModelFacts(MODEL, context_tokens, tokenizer.get_vocab_size())
    return TextCodec(facts, tokenizer, render_chat)


class RouterHarness:
    """``async with`` starts all servers and, at the end of the block, stops them. If the block
    raised no error, the harness then checks that no task is left.

    Args:
        router: fields of the section ``router``, which override the harness's defaults.
        journal: the journal's store, which all routers of the harness share.
        silence_s: ``cluster.connection_silence_s``.
    """

    def __init__(
        self,
        *,
        prefill: Sequence[FakePrefill] = (),
        decode: Sequence[FakeDecode] = (),
        router: Mapping[str, Any] | None = None,
        context_tokens: int = CONTEXT_TOKENS,
        journal: JournalStore | None = None,
        silence_s: float = 10,
    ) -> None:
        self.prefill = list(prefill)
        self.decode = list(decode)
        self.config = Config.model_validate(
            {
                "cluster": {"connection_silence_s": silence_s},
                "router": {
                    "port": 0,
                    "registry_poll_s": 0.01,
                    "failover_timeout_s": 0.01,  # tests of longer waits run in virtual time
                    **(router or {}),
                },
                "redis": {"renew_s": 0.01},
            }
        )
        self.registry = MemoryRegistry(lease_s=3600)
        self.codec = make_codec(context_tokens)
        self.journal = journal
        self.server = RouterServer(self.config, self.registry, self.codec, journal)
        self.port = 0

    async def __aenter__(self) -> Self:
        self._tasks_before = asyncio.all_tasks()
        for worker in (*self.prefill, *self.decode):
            await worker.start()
            await self.registry.put(worker.record)
        self.port = await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.channel.close()
        await self.server.stop(grace_s=0)
        for worker in (*self.prefill, *self.decode):
            await worker.stop()
        if error is None:
            await self._assert_no_tasks_left()

    async def _assert_no_tasks_left(self) -> None:
        left = asyncio.all_tasks() - self._tasks_before - {_current_task()}
        if left:  # gRPC's own tasks end a little later
            _, left = await asyncio.wait(left, timeout=WAIT_S)
        assert not left, f"tasks left behind: {left}"

    def call(self, *, timeout: float | None = 30, **fields: Any) -> Any:
        """Start one Generate call."""
        return self.stub.Generate(inference_pb2.GenerateRequest(**fields), timeout=timeout)

    @contextlib.asynccontextmanager
    async def another_router(self) -> AsyncIterator[Any]:
        """Run a second router of the same cluster. Yields its stub."""
        server = RouterServer(self.config, self.registry, make_codec(), self.journal)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
            yield inference_pb2_grpc.InferenceStub(channel)
        await server.stop(grace_s=0)

    async def refresh_workers(self) -> None:
        """Make the router read the registry now."""
        assert self.server.workers is not None
        await self.server.workers.refresh()

    async def generate(
        self, prompt: Sequence[int] = (1, 2, 3), **sampling: Any
    ) -> list[inference_pb2.GenerateResponse]:
        """Return all responses to a prompt of token ids."""
        call = self.call(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=inference_pb2.SamplingParams(**sampling),
        )
        return [response async for response in call]


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def token_ids(responses: Sequence[inference_pb2.GenerateResponse]) -> list[int]:
    """Return all tokens of an answer. Check that no sequence number is missing."""
    assert [response.sequence for response in responses] == list(range(len(responses)))
    return [token_id for response in responses for token_id in response.token_ids]
