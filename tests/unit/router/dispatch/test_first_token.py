from __future__ import annotations

from typing import Any

import pytest

from baton.v1 import inference_pb2
from router.dispatch.first_token import first_token_rule


@pytest.mark.parametrize(
    ("sampling", "forward"),
    [
        ({}, True),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, True),
        ({"stop": ["x"], "stop_token_ids": [1], "ignore_eos": True, "max_tokens": 9}, True),
        ({"repetition_penalty": 1.0, "presence_penalty": 0, "min_tokens": 0}, True),
        ({"seed": 0}, True),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"repetition_penalty": 1.1}, True),  # this penalty counts prompt and output tokens alike
        ({"logprobs": 0}, False),
        ({"min_tokens": 1}, False),
    ],
)
def test_the_first_token_is_forwarded_unless_sampling_depends_on_output(
    sampling: dict[str, Any], forward: bool
) -> None:
    rule = first_token_rule(inference_pb2.SamplingParams(**sampling))
    assert rule.forward is forward
    assert rule.reason
