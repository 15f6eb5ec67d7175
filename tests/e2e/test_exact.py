"""The cluster gives the same tokens as an aggregated engine. The prompt is not computed twice.

Below, P and D are the prefill and the decode worker. D computes at most one token of a prompt.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import baton
from cluster.cli.demo import REQUESTS
from core.config.schema import load_config
from core.model.resolve import resolve_model
from tests.e2e.conftest import CASES, MAX_TOKENS, SHARED_PREFIX, Case, RunningCluster
from tests.support.prompts import random_prompt

BLOCK_TOKENS = 128


def complete(
    cluster: RunningCluster, prompt: list[int], max_tokens: int = MAX_TOKENS
) -> baton.Completion:
    with cluster.client() as client:
        return client.complete(
            token_ids=prompt, temperature=0, max_tokens=max_tokens, ignore_eos=True, timeout_s=120
        )


@pytest.fixture(scope="session")
def block_bytes(config_file: Path) -> int:
    """Bytes of one KV block in all layers, from the model's configuration."""
    model = resolve_model(load_config(config_file).model, lambda _: None)
    shape = json.loads((Path(model.path) / "config.json").read_text())
    values = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return int(values * BLOCK_TOKENS * 4)  # 2: K and V; 4: bytes of a float32


def check_disaggregated(
    answer: baton.Completion, prompt: list[int], block_bytes: int
) -> baton.KvReport:
    """Check that P computed the prompt, and that D received the KV that D had not cached."""
    phases = answer.phases
    kv = phases.kv
    assert kv is not None
    assert kv.outcome is baton.KvOutcome.TRANSFERRED
    assert kv.backend == "gloo"
    assert phases.prefill_worker.startswith("prefill-")
    assert phases.decode_worker.startswith("decode-")
    assert phases.attempts == 1
    assert kv.computed_tokens <= 1, "the decode engine computed more than one token of the prompt"
    assert kv.tokens + kv.cached_tokens == len(prompt)
    blocks = -(-len(prompt) // BLOCK_TOKENS) - kv.cached_tokens // BLOCK_TOKENS
    assert kv.bytes == blocks * block_bytes
    return kv


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alone_and_cold(
    cluster: RunningCluster, reference: dict[str, list[int]], case: Case, block_bytes: int
) -> None:
    answer = complete(cluster, case.prompt)
    assert list(answer.token_ids) == reference[case.name]
    assert answer.finish_reason is baton.FinishReason.LENGTH
    assert answer.usage.prompt_tokens == len(case.prompt)
    assert answer.usage.completion_tokens == MAX_TOKENS
    kv = check_disaggregated(answer, case.prompt, block_bytes)
    assert kv.cached_tokens == 0


def test_repeated_with_prefix_hits_on_both_sides(
    cluster: RunningCluster, reference: dict[str, list[int]], block_bytes: int
) -> None:
    for case in CASES:
        complete(cluster, case.prompt, max_tokens=2)  # both workers have the prompt's KV after this
        answer = complete(cluster, case.prompt)
        assert list(answer.token_ids) == reference[case.name], case.name
        kv = check_disaggregated(answer, case.prompt, block_bytes)
        hit = (len(case.prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert kv.cached_tokens == hit, case.name
        assert answer.usage.cached_prompt_tokens == hit, case.name


def test_prefix_hit_on_prefill_only(cluster: RunningCluster, block_bytes: int) -> None:
    prompt = random_prompt(400, 50)
    first = complete(cluster, prompt, max_tokens=1)  # for one token, P answers alone
    assert first.phases.decode_worker == ""
    answer = complete(cluster, prompt)
    kv = check_disaggregated(answer, prompt, block_bytes)
    assert kv.cached_tokens == 0
    assert answer.usage.cached_prompt_tokens == 384
    assert answer.token_ids[0] == first.token_ids[0]
    again = complete(cluster, prompt)  # now P and D have the prompt cached
    assert again.token_ids == answer.token_ids


def test_longer_prefix_hit_on_decode_than_on_prefill(
    cluster: RunningCluster, block_bytes: int
) -> None:
    """In a second turn, D has the KV of its own answer and P does not."""
    prompt = random_prompt(250, 51)
    first = complete(cluster, prompt, max_tokens=140)
    second_prompt = [*prompt, *first.token_ids, 500, 501]
    answer = complete(cluster, second_prompt)
    kv = check_disaggregated(answer, second_prompt, block_bytes)
    assert kv.cached_tokens == 384
    assert answer.usage.cached_prompt_tokens == 128
    assert complete(cluster, second_prompt).token_ids == answer.token_ids


def test_eight_at_once(cluster: RunningCluster, reference: dict[str, list[int]]) -> None:
    cases = [case for case in CASES if case.name.startswith("batch")]
    assert len(cases) == 8
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda case: complete(cluster, case.prompt), cases))
    for case, answer in zip(cases, answers, strict=True):
        assert list(answer.token_ids) == reference[case.name], case.name


def test_eight_at_once_and_cold(cluster: RunningCluster) -> None:
    prompts = [random_prompt(90 + 50 * index, 70 + index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: complete(cluster, prompt), prompts))
    for prompt, answer in zip(prompts, together, strict=True):
        assert complete(cluster, prompt).token_ids == answer.token_ids


def test_a_cold_prefix_shared_by_prompts_at_once(
    cluster: RunningCluster, reference: dict[str, list[int]]
) -> None:
    """A prompt may hit blocks that another prompt of the same step still has to compute."""
    with ThreadPoolExecutor(len(SHARED_PREFIX)) as pool:
        answers = list(pool.map(lambda case: complete(cluster, case.prompt), SHARED_PREFIX))
    for case, answer in zip(SHARED_PREFIX, answers, strict=True):
        assert list(answer.token_ids) == reference[case.name], case.name


@pytest.mark.parametrize(
    "sampling",
    [
        baton.SamplingParams(logprobs=2),
        baton.SamplingParams(presence_penalty=1.2),
        baton.SamplingParams(min_tokens=5),
    ],
    ids=["logprobs", "penalty", "min_tokens"],
)
def test_sampling_that_needs_the_state_of_the_first_token(
    cluster: RunningCluster, sampling: baton.SamplingParams
) -> None:
    """D recomputes the last prompt token and samples the first token. The KV still comes from P."""
    prompt = random_prompt(200, 60)
    with cluster.client() as client:
        answer = client.complete(
            token_ids=prompt, temperature=0, max_tokens=8, ignore_eos=True, sampling=sampling
        )
        plain = client.complete(token_ids=prompt, temperature=0, max_tokens=8, ignore_eos=True)
    kv = answer.phases.kv
    assert kv is not None
    assert kv.outcome is baton.KvOutcome.TRANSFERRED
    assert kv.computed_tokens == 1
    assert len(answer.token_ids) == 8
    if sampling.logprobs:
        assert answer.token_ids == plain.token_ids
        assert len(answer.logprobs) == 8
        assert all(len(entry.top) >= 2 for entry in answer.logprobs)


def test_a_seed_makes_sampling_repeatable(cluster: RunningCluster) -> None:
    with cluster.client() as client:
        answers = [
            client.complete("Once upon a time", temperature=1, seed=7, max_tokens=16)
            for _ in range(2)
        ]
    assert answers[0].token_ids == answers[1].token_ids


def test_chat_and_stop_strings(cluster: RunningCluster) -> None:
    message = baton.ChatMessage("user", "What is the capital of France?")
    with cluster.client() as client:
        answer = client.complete(messages=[message], temperature=0, max_tokens=32)
        assert answer.text == "The capital of France is Paris."
        assert answer.finish_reason is baton.FinishReason.STOP
        stopped = client.complete(messages=[message], temperature=0, max_tokens=32, stop=" of Fr")
        assert stopped.text == "The capital"
        assert stopped.finish_reason is baton.FinishReason.STOP


def test_no_rounding_error_changes_the_demos_answer(cluster: RunningCluster) -> None:
    """Each of its tokens is at least e times as probable as any other."""
    with cluster.client() as client:
        answer = client.complete(**REQUESTS["paris"].fields | {"logprobs": 2})
    assert answer.text == "The capital of France is Paris."
    for token in answer.logprobs:
        first, second = (each.logprob for each in token.top)
        assert first - second > 1
