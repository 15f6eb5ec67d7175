"""Decides whether the router may forward the prefill worker's first token. Pure.

If the router forwards it, the decode worker continues from prompt + token as if both were the
prompt. This is wrong if sampling must know which tokens are output, or if the decode engine must
produce the first token itself. In these cases the decode worker recomputes the last prompt position
and samples the first token. A seed does not prevent forwarding, because seeded noise depends only
on the seed and the token's position in the output.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class FirstTokenRule:
    forward: bool
    reason: str


def first_token_rule(sampling: inference_pb2.SamplingParams) -> FirstTokenRule:
    """The rule for one request.

    The rule ignores that the first token may end the request, because only the engine can see this.
    """
    if sampling.presence_penalty or sampling.frequency_penalty:
        return FirstTokenRule(False, "penalties count output tokens, not prompt tokens")
    if sampling.HasField("logprobs"):
        return FirstTokenRule(False, "logprobs come from the engine that continues")
    if sampling.min_tokens:
        return FirstTokenRule(False, "min_tokens counts output tokens")
    return FirstTokenRule(True, "sampling depends on no earlier output")
