"""One prefill and one decode engine of vLLM with a tiny random model, without a router or Ray."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from baton.v1 import inference_pb2 as pb
from core.config.schema import load_config
from core.errors import ConfigError
from core.model.resolve import resolve_model
from core.types import Pool
from engine.protocol import KvSend
from engine.vllm.engine import VllmEngine
from tests.support.prompts import random_prompt
from tests.support.tiny_model import KV_BYTES_PER_TOKEN, LAYERS, make_tiny_model
from tests.support.two_engines import Engines, two_engines
from tests.support.waiting import until_awaited

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
]


@dataclass(frozen=True)
class Shape:
    """The setup of the model and of both engines. Each pair of values is (prefill, decode)."""

    tp: tuple[int, int] = (1, 1)
    block_tokens: tuple[int, int] = (64, 64)  # per KV block
    layer_types: tuple[str, ...] = ()  # one per layer; if empty, all layers have full attention

    def __str__(self) -> str:
        name = "tp{}to{}-block{}to{}".format(*self.tp, *self.block_tokens)
        return "-".join([name, *self.layer_types])


SHAPES = [
    Shape(),
    Shape(tp=(1, 2), block_tokens=(128, 32)),
    Shape(tp=(2, 1), block_tokens=(32, 128)),
    Shape(layer_types=("sliding_attention", "full_attention")),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=SHAPES, ids=str)
async def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engines]:
    shape: Shape = request.param
    folder = make_tiny_model(
        tmp_path_factory.mktemp("tiny") / "model", layer_types=shape.layer_types
    )
    arguments = [
        {"max_num_batched_tokens": 192, "block_size": tokens} for tokens in shape.block_tokens
    ]
    overrides = {
        "model.path": str(folder),
        "model.dtype": "float32",
        "model.max_model_len": 2048,
        "prefill.engine": arguments[0],
        "decode.engine": arguments[1],
        "prefill.tensor_parallel_size": shape.tp[0],
        "decode.tensor_parallel_size": shape.tp[1],
    }
    cores = ["0|1" if tp == 2 else core for tp, core in zip(shape.tp, "01", strict=True)]
    async with two_engines(overrides, cores) as engines:
        yield engines


async def test_both_engines_make_pairs_before_a_request(engines: Engines) -> None:
    prefill = {engines.receive.incarnation: engines.receive.control_addresses}
    decode = {engines.decode_incarnation: ()}
    assert await engines.prefill.pair_up(decode, Pool.PREFILL), (
        "pairs exist before decode has asked for them"
    )

    async def are_paired() -> bool:
        return not (
            await engines.decode.pair_up(prefill, Pool.DECODE)
            or await engines.prefill.pair_up(decode, Pool.PREFILL)
        )

    await until_awaited(are_paired, what="all ranks are paired")


async def test_a_transfer_is_counted_in_the_metrics(engines: Engines) -> None:
    def count(name: str) -> float:
        return sum(
            sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name == f"vllm:baton_kv_{name}"
        )

    names = ("transfers_total", "bytes_total", "hidden_bytes_total", "tail_seconds_count")
    before = [count(name) for name in names]
    _, report = await engines.streamed(random_prompt(300, 77))
    grown = [count(name) - was for name, was in zip(names, before, strict=True)]
    assert grown == [1, report.bytes, report.hidden_bytes, 1]
    assert 0 <= report.hidden_bytes <= report.bytes
    assert report.retries == 0


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 192, 193, 700])
async def test_streamed_tokens_are_the_aggregated_ones(engines: Engines, tokens: int) -> None:
    prompt = random_prompt(tokens, tokens)
    got, report = await engines.streamed(prompt)
    assert report.outcome == pb.KV_OUTCOME_TRANSFERRED
    assert report.computed_tokens <= 1
    page = math.gcd(*engines.block_tokens)
    assert report.bytes == -(-tokens // page) * page * KV_BYTES_PER_TOKEN
    assert got == await engines.aggregated(prompt)
    await engines.wait_all_free()


async def test_many_at_once_with_a_shared_cold_prefix(engines: Engines) -> None:
    prefix = random_prompt(5 * 64, 1)
    prompts = [prefix + random_prompt(3 + 9 * index, 2 + index) for index in range(12)]
    answers = await asyncio.gather(*(engines.streamed(prompt) for prompt in prompts))
    for prompt, (got, report) in zip(prompts, answers, strict=True):
        assert report.outcome == pb.KV_OUTCOME_TRANSFERRED
        assert got == await engines.aggregated(prompt)
    await engines.wait_all_free()


async def test_a_transfer_that_fails_is_recomputed_to_the_same_tokens(engines: Engines) -> None:
    prompt = random_prompt(500, 3)
    key = f"{uuid4().hex}#1"
    await engines.prefill.release(key)  # as if the router had cancelled the prefill
    received = await engines.generate(engines.decode, key, prompt, engines.receive)
    assert received[0].kv is not None
    assert received[0].kv.outcome == pb.KV_OUTCOME_RECOMPUTED
    tokens = [token for output in received for token in output.token_ids]
    assert tokens == await engines.aggregated(prompt)
    await engines.wait_all_free()


@pytest.mark.parametrize(
    "sampling",
    [
        {"seed": 7},
        {"seed": -3, "top_k": 900, "presence_penalty": 1.5, "repetition_penalty": 1.2},
    ],
    ids=["seed", "seed and penalties"],
)
async def test_an_answer_goes_on_where_another_engine_stopped(
    engines: Engines, sampling: dict[str, Any]
) -> None:
    """An answer stays the same if the other engine or a new request continues it."""
    params = pb.SamplingParams(max_tokens=20, ignore_eos=True, **sampling)
    prompt = random_prompt(90, 9)
    whole = await engines.aggregated(prompt, params)
    assert (await engines.streamed(prompt, params))[0] == whole
    for cut in (1, 12):
        params.max_tokens = 20 - cut
        rest = await engines.aggregated(prompt + whole[:cut], params, so_far=cut)
        assert whole[:cut] + rest == whole
        unaware = await engines.aggregated(prompt + whole[:cut], params)
        assert unaware != rest, "so_far made no difference"
    await engines.wait_all_free()


async def test_a_release_that_overtakes_the_prefill_leaks_nothing(engines: Engines) -> None:
    for index in range(8):
        key = f"{uuid4().hex}#1"
        await engines.prefill.release(key)
        await engines.generate(engines.prefill, key, random_prompt(200, 50 + index), KvSend(True))
    await engines.wait_all_free()


async def test_a_cancel_at_any_time_frees_all_blocks(engines: Engines) -> None:
    """Each cancel comes at a random time, up to 0.3 s after the start.

    The request is then queued, in prefill, in transfer, in decode or done.
    """
    rng = random.Random(4)
    for index in range(15):
        key, prompt = f"{uuid4().hex}#1", random_prompt(400, 100 + index)
        tasks = [
            asyncio.create_task(engines.generate(engines.prefill, key, prompt, KvSend(True))),
            asyncio.create_task(engines.generate(engines.decode, key, prompt, engines.receive)),
        ]
        await asyncio.wait(tasks, timeout=rng.random() * 0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engines.prefill.release(key)  # as the router does with KV that was not fetched
    await engines.wait_all_free()
    prompt = random_prompt(300, 5)
    got, report = await engines.streamed(prompt)
    assert report.outcome == pb.KV_OUTCOME_TRANSFERRED
    assert got == await engines.aggregated(prompt)


async def test_a_model_whose_kv_cannot_be_streamed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = make_tiny_model(tmp_path / "model", layer_types=["sliding_attention"] * LAYERS)
    config = load_config(overrides={"model.path": str(folder), "model.dtype": "float32"})
    model = resolve_model(config.model, print)
    engine = VllmEngine(
        config=config,
        pool=Pool.PREFILL,
        model=model,
        cpu_binding="0",
        kv_secret="secret",
        incarnation=uuid4().hex,
    )
    try:
        with pytest.raises(ConfigError, match=r"SlidingWindowSpec\) cannot be streamed"):
            await engine.start()
    finally:
        await engine.stop()
