"""Whether the router may forward the prefill worker's first token at once. Pure.

The decode worker then continues from prompt + token as if both were the prompt. That is wrong if
sampling must know which tokens are output, or if the decode engine must have produced the token
itself; then the decode worker recomputes the last prompt token. A seed is no obstacle: its noise is
a function of the token's position.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class FirstTokenRule:
    forward: bool
    reason: str


def first_token_rule(sampling: inference_pb2.SamplingParams) -> FirstTokenRule:
    """The rule for one request. Only the engine can see that the first token ends the request."""
    if sampling.presence_penalty or sampling.frequency_penalty:
        return FirstTokenRule(False, "penalties count output tokens, not prompt tokens")
    if sampling.HasField("logprobs"):
        return FirstTokenRule(False, "logprobs come from the engine that continues")
    if sampling.min_tokens:
        return FirstTokenRule(False, "min_tokens counts output tokens")
    return FirstTokenRule(True, "sampling depends on no earlier output")
