"""Runs one vLLM engine without a KV connector. A cluster must generate the same tokens.

    python -m tests.support.reference < job.json > answers.json

The engine runs in its own process, so that its memory is free before a cluster starts.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path


def greedy(config_file: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Return the greedy answers of an engine that is configured as in the decode pool.

    The engine runs one prompt at a time.

    ``config_file``: the cluster's configuration.
    """
    job = {"config": str(config_file), "prompts": prompts, "max_tokens": max_tokens}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.reference"],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return answers


async def _answer(job: dict[str, object]) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from core.config.schema import load_config
    from core.model.resolve import resolve_model
    from core.types import Pool
    from engine.vllm.engine import engine_arguments, start_llm

    config = load_config(Path(str(job["config"])))
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"
    arguments = engine_arguments(config, Pool.DECODE, resolve_model(config.model, lambda _: None))
    llm = start_llm(arguments)
    params = SamplingParams(
        temperature=0,
        max_tokens=int(str(job["max_tokens"])),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    answers = []
    prompts = job["prompts"]
    assert isinstance(prompts, list)
    for index, prompt in enumerate(prompts):
        outputs = llm.generate({"type": "token", "prompt_token_ids": prompt}, params, str(index))
        async with aclosing(outputs):
            answers.extend([list(output.outputs[0].token_ids) async for output in outputs])
    llm.shutdown()
    return answers


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_answer(json.load(sys.stdin)))))
