"""The vLLM engine arguments that a configuration may and may not pass through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.config.engine_args import ENGINE_ARGS, VLLM_VERSION
from core.config.errors import nearest

_REPLICAS = (
    "set prefill.replicas or decode.replicas; Baton scales a pool only by its number of replicas"
)
_TP = "set prefill.tensor_parallel_size or decode.tensor_parallel_size"
_TP_ONLY = f"{_TP}; Baton splits a model over GPUs only by tensor parallelism"
_TOKENS_ONLY = "workers get token ids only; the router uses the tokenizer of model.path"

# Arguments that Baton sets itself or does not support: name -> what to do instead.
RESERVED_ENGINE_ARGS: Mapping[str, str] = {
    "model": "set model.path",
    "model_weights": "set model.path",
    "served_model_name": "set model.served_name",
    "dtype": "set model.dtype",
    "max_model_len": "set model.max_model_len",
    "trust_remote_code": "set model.trust_remote_code",
    "tensor_parallel_size": _TP,
    "kv_transfer_config": "Baton uses its own connector; set the fields of kv_transfer",
    "worker_extension_cls": "Baton uses its own extension class for the KV stream",
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
    """Check the names of engine arguments. vLLM checks the values when the engine starts.

    Raises:
        ValueError: vLLM does not have an argument of that name, or Baton reserves it.
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
