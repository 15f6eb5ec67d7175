"""Which vLLM engine arguments a configuration may pass through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.config.engine_args import ENGINE_ARGS, VLLM_VERSION
from core.config.errors import nearest

_REPLICAS = "Baton scales a pool by its field replicas"
_TP_ONLY = "Baton splits a model over GPUs by the pool's field tensor_parallel_size only"
_TOKENS_ONLY = "workers see token ids only; the router uses the tokenizer of model.path"

# Set by Baton itself, or at odds with how it streams KV: name -> what to do instead.
RESERVED_ENGINE_ARGS: Mapping[str, str] = {
    "model": "set model.path",
    "model_weights": "set model.path",
    "served_model_name": "set model.served_name",
    "dtype": "set model.dtype",
    "max_model_len": "set model.max_model_len",
    "trust_remote_code": "set model.trust_remote_code",
    "tensor_parallel_size": "set the pool's field tensor_parallel_size",
    "kv_transfer_config": "Baton brings its own connector; see kv_transfer",
    "worker_extension_cls": "Baton brings its own, for the KV stream",
    "pipeline_parallel_size": _TP_ONLY,
    "prefill_context_parallel_size": _TP_ONLY,
    "decode_context_parallel_size": _TP_ONLY,
    "data_parallel_size": _REPLICAS,
    "data_parallel_size_local": _REPLICAS,
    "data_parallel_rank": _REPLICAS,
    "data_parallel_start_rank": _REPLICAS,
    "tokenizer": _TOKENS_ONLY,
    "skip_tokenizer_init": _TOKENS_ONLY,
    "runner": "Baton generates text only",
    "convert": "Baton generates text only",
}


def check_engine_args(args: Mapping[str, Any]) -> None:
    """Check names only; vLLM checks the values when the engine starts.

    Raises:
        ValueError: a name that vLLM does not have, or one that Baton sets itself.
    """
    for name in args:
        if name in RESERVED_ENGINE_ARGS:
            raise ValueError(f"{name} is not passed through: {RESERVED_ENGINE_ARGS[name]}")
        if name not in ENGINE_ARGS:
            known = nearest(name, sorted(ENGINE_ARGS - RESERVED_ENGINE_ARGS.keys()))
            raise ValueError(
                f"vLLM {VLLM_VERSION} has no engine argument {name}; "
                f"the nearest known name is {known}"
            )
