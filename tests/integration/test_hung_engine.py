"""The liveness probe finds a hung vLLM core.

It does so even if every request is shorter than the probe's timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import pytest_asyncio

from baton.v1 import inference_pb2 as pb
from core.config.schema import load_config
from core.errors import WorkerLostError
from core.model.resolve import resolve_model
from core.types import Pool
from engine.protocol import EngineRequest
from engine.vllm.engine import VllmEngine
from tests.support.live_cluster import ENGINE
from tests.support.tiny_model import make_tiny_model
from tests.support.waiting import until_awaited
from worker.liveness import LivenessProbe

pytestmark = [pytest.mark.integration, pytest.mark.asyncio, pytest.mark.timeout(120)]

TIMEOUT_S = 1.5
REQUEST_TIMEOUT_S = 0.2
ONE_TOKEN = pb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@pytest_asyncio.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VllmEngine]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    config = load_config(
        overrides={
            "model.path": str(make_tiny_model(tmp_path / "model")),
            "model.dtype": "float32",
            "model.max_model_len": 2048,
        }
    )
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
        await engine.start()
        yield engine
    finally:
        await engine.stop()


def engine_core() -> psutil.Process:
    children = psutil.Process().children(recursive=True)
    (core,) = [child for child in children if child.cmdline()[0].rstrip() == ENGINE]
    return core


async def answers_in_time(engine: VllmEngine) -> bool:
    """Return whether the engine answers a request within ``REQUEST_TIMEOUT_S``."""
    request = EngineRequest(f"{uuid4().hex}#1", (1, 2, 3), ONE_TOKEN, None)
    with suppress(TimeoutError):
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            return [output async for output in engine.generate(request)] != []
    return False


async def is_healthy(engine: VllmEngine, probe: LivenessProbe) -> bool:
    """Check the engine in the same way as a worker does."""
    try:
        await engine.check_health()
        await probe.check()
    except WorkerLostError:
        return False
    return True


async def test_a_stopped_core_is_found_although_every_request_is_short(
    engine: VllmEngine,
) -> None:
    clock = asyncio.get_running_loop().time
    probe = LivenessProbe(engine.ping, TIMEOUT_S)
    answered = 0
    started_s = clock()
    while clock() < started_s + 2 * TIMEOUT_S:
        answered += await answers_in_time(engine)
        assert await is_healthy(engine, probe)
    assert answered > 1

    async def is_found_hung() -> bool:
        assert not await answers_in_time(engine)
        return not await is_healthy(engine, probe)

    core = engine_core()
    core.suspend()
    try:
        stopped_s = clock()
        await until_awaited(is_found_hung, what="the engine is unhealthy", within_s=4 * TIMEOUT_S)
        assert clock() >= stopped_s + TIMEOUT_S - REQUEST_TIMEOUT_S
    finally:
        core.resume()
    await until_awaited(lambda: is_healthy(engine, probe), what="the engine is healthy again")
    await until_awaited(lambda: answers_in_time(engine), what="the engine answers again")
    await probe.close()
