"""Sampling that one engine can continue where another engine stopped.

vLLM's V1 model runner, which runs on CPUs, keeps two pieces of state per request that the tokens
do not carry: the state of the seeded random generator, and which tokens are output (the penalties
depend on this). After a failover, or after the prefill worker's first token, the engine's prompt
ends with output tokens.
Without this module, V1 then draws the noise of the first output token again, and its penalties
treat these output tokens as prompt.

This module computes the noise and the penalties from what the request carries. The noise is a
function of the seed and the position in the output, as in vLLM's V2 model runner. All tokens after
the application's prompt count as output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from vllm import SamplingParams
from vllm.model_executor.layers.utils import apply_penalties
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

LOGITS_PROCESSOR = "engine.vllm.sampling:ContinuedSampling"
_ARGUMENT = "baton_sampling"  # key in SamplingParams.extra_args

# (prompt token ids, output token ids so far, logits [vocab_size], float32) -> logits
_RowProcessor = Callable[[list[int], list[int], torch.Tensor], torch.Tensor]


def continued(params: SamplingParams, prompt_tokens: int, tokens_so_far: int) -> SamplingParams:
    """Return parameters that move seeded noise and penalties to ``ContinuedSampling``.

    Returns ``params`` itself if vLLM samples this request correctly without
    ``ContinuedSampling``. Never changes ``params``.

    Args:
        prompt_tokens: number of tokens in the application's prompt.
        tokens_so_far: number of output tokens that follow the application's prompt in the
            engine's prompt.
    """
    seeded = params.seed is not None and params.temperature > 0
    penalised = bool(params.presence_penalty or params.frequency_penalty)
    if not (seeded or (penalised and tokens_so_far)):
        return params
    names = ["presence_penalty", "frequency_penalty", "repetition_penalty"]
    names += ["seed", "temperature", "min_p", "top_k", "top_p"] if seeded else []
    ours = {name: getattr(params, name) for name in names}
    left = params.clone()
    left.presence_penalty = left.frequency_penalty = 0.0
    left.repetition_penalty = 1.0
    if seeded:
        left.seed = None
        left.temperature, left.min_p, left.top_k, left.top_p = 0.0, 0.0, 0, 1.0
    left.extra_args = {
        **(params.extra_args or {}),
        _ARGUMENT: {"prompt_tokens": prompt_tokens, **ours},
    }
    return left


class ContinuedSampling(AdapterLogitsProcessor):
    """The logits processor for vLLM's V1 model runner.

    Acts only on requests whose parameters ``continued`` has changed.
    """

    def is_argmax_invariant(self) -> bool:
        """Return False, because vLLM's greedy sampling must not skip this processor."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> _RowProcessor | None:
        """Return the processor of one request, or None if vLLM samples it without help."""
        ours = (params.extra_args or {}).get(_ARGUMENT)
        return None if ours is None else _row_processor(**ours)


def _row_processor(
    *,
    prompt_tokens: int,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
    seed: int | None = None,
    **filters: Any,
) -> _RowProcessor:
    penalties = (presence_penalty, frequency_penalty, repetition_penalty)

    def process(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        written = prompt[prompt_tokens:] + output
        row = logits.unsqueeze(0)  # [1, vocab_size]
        if penalties != (0.0, 0.0, 1.0):
            tokens = (torch.tensor([part]).long() for part in (prompt[:prompt_tokens], written))
            row = apply_penalties(row, *tokens, *(torch.tensor([value]) for value in penalties))
        if seed is not None:
            row = _force(_sample(row, seed, len(written), **filters), row)
        return row.squeeze(0)

    return process


def _sample(
    row: torch.Tensor,
    seed: int,
    position: int,
    *,
    temperature: float,
    min_p: float,
    top_k: int,
    top_p: float,
) -> int:
    """Sample a token id from ``row`` with vLLM's steps in vLLM's order, but with our own noise.

    ``row`` is float32 logits [1, vocab_size] and stays unchanged. ``position`` is the token's
    position in the output.

    With exponential noise e_i, the largest p_i / e_i is at i with probability p_i. This is the
    exponential race: the Gumbel-max trick (Gumbel 1954) without logarithms.
    """
    row = row / temperature
    if min_p > 0:
        probabilities = row.softmax(-1)
        row = row.masked_fill(probabilities < min_p * probabilities.amax(-1, True), -torch.inf)
    row = apply_top_k_top_p(
        row,
        torch.tensor([top_k]) if 0 < top_k < row.shape[-1] else None,
        torch.tensor([top_p]) if top_p < 1 else None,
    )
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    noise = torch.empty_like(row).exponential_(generator=generator)
    return int((row.softmax(-1) / noise).argmax())


def _force(token: int, row: torch.Tensor) -> torch.Tensor:
    """Overwrite ``row`` so that a greedy sampler takes ``token``."""
    row = row.fill_(-torch.inf)
    row[0, token] = 0.0
    return row
