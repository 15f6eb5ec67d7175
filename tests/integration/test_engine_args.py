"""The committed names of engine arguments match the installed vLLM."""

from __future__ import annotations

import dataclasses

import pytest

from core.config.engine_args import ENGINE_ARGS

pytestmark = pytest.mark.integration


def test_the_committed_names_match_vllm() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    fields = dataclasses.fields(AsyncEngineArgs)
    names = {field.name for field in fields if not field.name.startswith("_")}
    assert names == ENGINE_ARGS, "run `make engine-args`"
