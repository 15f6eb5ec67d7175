"""Sampling continues after tokens that another engine generated. No engine runs."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.model_executor.layers.utils import apply_penalties
from vllm.v1.sample.logits_processor import BatchUpdate

from engine.vllm.sampling import ContinuedSampling, continued

pytestmark = pytest.mark.integration

VOCAB = 50
PROMPT = [1, 2, 3, 4]
PENALTIES = {"presence_penalty": 0.9, "frequency_penalty": 0.7, "repetition_penalty": 1.3}


def model(tokens: list[int]) -> torch.Tensor:
    """Return logits [1, VOCAB] that are a function of all ``tokens``."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
    return 2 * torch.randn(1, VOCAB, generator=generator)


def processed(
    params: SamplingParams, so_far: list[int], output: list[int], logits: torch.Tensor
) -> torch.Tensor:
    """Return the logits that vLLM's sampler gets for a request that continues ``so_far``."""
    params = continued(params, len(PROMPT), len(so_far))
    processor = ContinuedSampling(None, torch.device("cpu"), False)
    added = [(0, params, PROMPT + so_far, output)]
    processor.update_state(BatchUpdate(batch_size=1, removed=[], added=added, moved=[]))
    return processor.apply(logits)


def answer(params: SamplingParams, count: int, so_far: list[int]) -> list[int]:
    """Return the first ``count`` tokens of an answer that one engine continues after ``so_far``."""
    output: list[int] = []
    while len(so_far) + len(output) < count:
        row = processed(params, so_far, output, model(PROMPT + so_far + output))
        output.append(int(row.argmax()))
    return so_far + output


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.01}, PENALTIES],
    ids=["plain", "filters", "penalties"],
)
def test_a_seeded_request_has_the_same_output_wherever_it_is_continued(
    sampling: dict[str, Any],
) -> None:
    params = SamplingParams(seed=7, **sampling)
    whole = answer(params, 40, [])
    assert len(set(whole)) > 5
    for cut in (1, 2, 17, 39):
        assert answer(params, 40, whole[:cut]) == whole
    assert answer(SamplingParams(seed=8, **sampling), 40, []) != whole
    assert answer(SamplingParams(seed=7 + 2**32, **sampling), 40, []) != whole


def test_each_position_has_different_noise() -> None:
    """All logits are equal here, so equal noise would repeat one token."""
    params, logits = SamplingParams(seed=3), torch.zeros(1, VOCAB)
    drawn = {
        int(processed(params, [], [5] * position, logits.clone()).argmax())
        for position in range(20)
    }
    assert len(drawn) > 10


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),  # p squared
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.9}, [0.5263, 0.3158, 0.1579, 0]),
        ({"min_p": 0.2}, [0.5263, 0.3158, 0.1579, 0]),  # keeps p of at least 0.2 × 0.5
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p"],
)
def test_tokens_have_the_requested_probabilities(
    sampling: dict[str, Any], expected: list[float]
) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    rounds = 2000
    drawn = Counter(
        int(processed(SamplingParams(seed=seed, **sampling), [], [], logits.clone()).argmax())
        for seed in range(rounds)
    )
    for token, probability in enumerate(expected):
        deviation = (rounds * probability * (1 - probability)) ** 0.5
        assert abs(drawn[token] - rounds * probability) <= 4 * deviation, token


@pytest.mark.parametrize("cut", [1, 10, 29])
def test_penalties_include_the_tokens_so_far(cut: int) -> None:
    rng = random.Random(cut)
    written = [rng.randrange(VOCAB) for _ in range(30)]
    logits = model(PROMPT + written)
    row = processed(
        SamplingParams(temperature=0, **PENALTIES), written[:cut], written[cut:], logits.clone()
    )
    prompt, output = torch.tensor([PROMPT]), torch.tensor([written])
    whole = apply_penalties(
        logits.clone(), prompt, output, *(torch.tensor([value]) for value in PENALTIES.values())
    )
    assert torch.equal(row, whole)
    assert not torch.equal(row, logits)


@pytest.mark.parametrize(
    ("sampling", "so_far"),
    [
        ({"temperature": 0}, 5),
        ({"temperature": 0, "seed": 1}, 5),
        ({"temperature": 1, "repetition_penalty": 1.2}, 5),  # counts prompt and output alike
        ({"temperature": 1, "presence_penalty": 1.0}, 0),
    ],
)
def test_parameters_stay_the_same_if_vllm_needs_no_help(
    sampling: dict[str, Any], so_far: int
) -> None:
    params = SamplingParams(**sampling)
    assert continued(params, 4, so_far) is params


def test_extra_args_are_kept_and_the_callers_parameters_do_not_change() -> None:
    params = SamplingParams(seed=1, max_tokens=9, extra_args={"kv_transfer_params": {"a": 1}})
    left = continued(params, 4, 0)
    assert params.seed == 1
    assert left.extra_args is not None
    assert left.extra_args["kv_transfer_params"] == {"a": 1}
    assert left.max_tokens == 9
