"""How ``VllmEngine`` starts vLLM and converts its outputs and errors. No vLLM engine runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from baton.v1 import inference_pb2
from core.config.schema import Config
from core.errors import InvalidArgumentError
from core.model.resolve import ResolvedModel
from core.types import Pool
from engine.protocol import Engine, EngineOutput, EngineRequest

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]

MAX_MODEL_LEN = 8


class ScriptedLlm:
    """Replaces ``AsyncLLM``: yields the outputs of a script and raises its errors."""

    def __init__(self, *script: object) -> None:
        self.script = script
        self.calls = 0

    async def generate(self, *_: object) -> AsyncIterator[Any]:
        self.calls += 1
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            yield step


def make(llm: ScriptedLlm) -> Engine:
    """Return an engine in the state after its start, with ``llm`` instead of vLLM."""
    from engine.vllm.engine import VllmEngine

    engine = VllmEngine(
        config=Config(),
        pool=Pool.DECODE,
        model=ResolvedModel("", "m"),
        cpu_binding=None,
        kv_secret="",
        incarnation="i",
    )
    engine._llm = llm
    engine._max_model_len = MAX_MODEL_LEN
    return engine


def vllm_output(token: int, logprobs: dict[int, tuple[int, float]] | None = None) -> Any:
    """Return an output of vLLM with one token. ``logprobs`` maps a token to (rank, logprob)."""
    entries = {
        id_: SimpleNamespace(rank=rank, logprob=logprob)
        for id_, (rank, logprob) in (logprobs or {}).items()
    }
    completion = SimpleNamespace(
        token_ids=[token], finish_reason="length", logprobs=[entries] if entries else None
    )
    return SimpleNamespace(outputs=[completion], metrics=None, num_cached_tokens=0)


async def read(engine: Engine, tokens: int = 3, **sampling: Any) -> list[EngineOutput]:
    request = EngineRequest(
        "r#1", (1,) * tokens, inference_pb2.SamplingParams(max_tokens=1, **sampling), None
    )
    return [output async for output in engine.generate(request)]


@pytest.mark.parametrize(
    ("tokens", "reason"), [(MAX_MODEL_LEN, "PROMPT_TOO_LONG"), (0, "EMPTY_PROMPT")]
)
async def test_a_prompt_that_does_not_fit_never_reaches_vllm(tokens: int, reason: str) -> None:
    llm = ScriptedLlm(vllm_output(5))
    with pytest.raises(InvalidArgumentError) as caught:
        await read(make(llm), tokens)
    assert caught.value.reason == reason
    assert llm.calls == 0
    (output,) = await read(make(llm), MAX_MODEL_LEN - 1)
    assert output.token_ids == (5,)


async def test_a_request_that_vllm_refuses_is_an_invalid_argument() -> None:
    from vllm.exceptions import VLLMValidationError

    for error in (VLLMValidationError("no such thing"), ValueError("no such thing")):
        engine = make(ScriptedLlm(error))
        with pytest.raises(InvalidArgumentError, match="no such thing"):
            await read(engine)
        assert engine.load().queued_tokens == 0


async def test_an_error_after_the_first_output_is_not_an_invalid_argument() -> None:
    with pytest.raises(ValueError, match="a defect"):
        await read(make(ScriptedLlm(vllm_output(5), ValueError("a defect"))))


@pytest.mark.parametrize(
    ("wanted", "top"), [(0, []), (1, [7]), (2, [7, 8])], ids=["none", "one", "two"]
)
async def test_the_chosen_token_is_in_the_top_list_only_if_its_rank_is_high_enough(
    wanted: int, top: list[int]
) -> None:
    ranks = {5: (9, -4.0), 7: (1, -0.5), 8: (2, -1.0)}
    listed = {5: ranks[5]} | {id_: ranks[id_] for id_ in top}
    (output,) = await read(make(ScriptedLlm(vllm_output(5, listed))), logprobs=wanted)
    (logprobs,) = output.logprobs
    assert logprobs.logprob == -4.0
    assert [each.token_id for each in logprobs.top] == top


async def test_a_single_rank_runs_in_the_engine_cores_process_and_is_bound_to_its_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM keeps Baton's executor class. Baton sets the OpenMP variables before vLLM starts."""
    import os

    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from core.model.resolve import resolve_model
    from engine.vllm.engine import engine_arguments, start_llm

    seen: dict[str, Any] = {}

    def started(config: Any, **_: object) -> str:
        seen["executor"] = config.parallel_config.distributed_executor_backend
        seen["v2"] = config.use_v2_model_runner
        seen.update(
            {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GOMP_CPU_AFFINITY")}
        )
        return "llm"

    monkeypatch.setattr(AsyncLLM, "from_vllm_config", started)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "1")
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    config = Config()
    arguments = engine_arguments(config, Pool.PREFILL, resolve_model(config.model, print))
    assert start_llm(arguments) == "llm"
    assert not seen.pop("v2"), "engine.vllm.sampling needs the V1 model runner"
    assert seen == {"executor": UniProcExecutor, "OMP_NUM_THREADS": "1", "GOMP_CPU_AFFINITY": "1"}
    assert "GOMP_CPU_AFFINITY" not in os.environ, "only the engine core's process needs it"


async def test_pairs_are_made_in_the_current_role_and_again_after_a_change() -> None:
    calls: list[tuple[Any, ...]] = []

    class Ranks(ScriptedLlm):
        async def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[list[str]]:
            calls.append((name, *args))
            return [["p1", "d1"], ["p1"]]  # of two ranks

    engine = make(Ranks())
    prewarm, p1, d1 = ("kv_prewarm", ("tcp://p1",), "p1"), {"p1": ("tcp://p1",)}, {"d1": ()}
    asked: dict[Pool, tuple[Any, ...]] = {pool: ("kv_paired_with", pool.value) for pool in Pool}
    assert await engine.pair_up(p1, Pool.DECODE) == set()
    assert await engine.pair_up(p1, Pool.DECODE) == set()
    assert calls == [prewarm, asked[Pool.DECODE], asked[Pool.DECODE]], "asked for once"
    calls.clear()
    assert await engine.pair_up(d1, Pool.PREFILL) == {"d1"}, "a rank lacks the pair"
    assert calls == [asked[Pool.PREFILL]], "a prefill worker waits for the decode workers"
    calls.clear()
    await engine.pair_up(p1, Pool.DECODE)
    await engine.pair_up({}, Pool.DECODE)
    await engine.pair_up(p1, Pool.DECODE)
    assert [call for call in calls if call[0] == "kv_prewarm"] == [prewarm, prewarm]
