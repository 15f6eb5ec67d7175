"""Converts Baton's requests to vLLM's parameters, and vLLM's outputs to Baton's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from baton.v1 import inference_pb2 as pb
from core.errors import WorkerLostError
from engine.protocol import EngineOutput, EngineRequest, KvReceive, KvSend
from engine.vllm.sampling import continued
from kv_transfer.vllm.metrics import ReceiveReport

_FINISH_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    None: pb.FINISH_REASON_UNSPECIFIED,
}


def sampling_params(request: EngineRequest) -> SamplingParams:
    """Return vLLM's parameters for ``request``, including those of the KV transfer.

    Fields that are not set take the defaults that the protocol documents. These are vLLM's
    defaults, except for ``max_tokens``. The router has checked the ranges. Stop strings are left
    out, because the router handles them.
    """
    given = {field.name: value for field, value in request.sampling.ListFields()}
    given.pop("stop", None)
    given["stop_token_ids"] = list(given.get("stop_token_ids", ()))
    given.setdefault("max_tokens", None)
    params = SamplingParams(
        **given,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": kv} if (kv := _kv_params(request)) else None,
    )
    if torch.cuda.is_available():
        return params  # vLLM's V2 model runner samples continued requests correctly
    return continued(params, len(request.token_ids) - request.tokens_so_far, request.tokens_so_far)


def _kv_params(request: EngineRequest) -> dict[str, Any] | None:
    match request.kv:
        case KvSend(forwards_first_token):
            return {
                "baton": "send",
                "transfer_id": request.transfer_id,
                "forwards_first_token": forwards_first_token,
            }
        case KvReceive(incarnation, addresses, forwards_first_token):
            return {
                "baton": "receive",
                "transfer_id": request.transfer_id,
                "forwards_first_token": forwards_first_token,
                "incarnation": incarnation,
                "addresses": list(addresses),
            }
    return None


def kv_report(
    request: EngineRequest, received: ReceiveReport | None, output: RequestOutput
) -> pb.KvReport:
    """Return how the engine got the prompt's KV.

    ``received`` is None if the request has no ``KvReceive``.
    """
    cached = output.num_cached_tokens or 0
    if received is None:
        return pb.KvReport(
            outcome=pb.KV_OUTCOME_LOCAL,
            cached_tokens=cached,
            computed_tokens=len(request.token_ids) - cached,
        )
    return pb.KvReport(
        outcome=pb.KV_OUTCOME_TRANSFERRED if received.complete else pb.KV_OUTCOME_RECOMPUTED,
        backend=received.backend,
        bytes=received.num_bytes,
        messages=received.messages,
        tokens=received.tokens,
        transfer_ms=received.transfer_ms,
        hidden_bytes=received.hidden_bytes,
        tail_ms=received.tail_ms,
        stall_ms=received.stall_ms,
        retries=received.retries,
        cached_tokens=received.cached_tokens,
        computed_tokens=received.computed_tokens,
    )


def engine_output(
    request: EngineRequest,
    output: RequestOutput,
    index: int,
    kv: pb.KvReport | None,
    *,
    first: bool,
) -> EngineOutput:
    """Convert one output of vLLM.

    Args:
        index: position of the first token of ``output`` in the request's output.
        kv: the report if this is the request's first output, else None.
        first: whether this is the request's first output.

    Raises:
        WorkerLostError: vLLM ended the request for a reason other than "stop" or "length".
    """
    (completion,) = output.outputs
    if completion.finish_reason not in _FINISH_REASONS:
        raise WorkerLostError(
            f"the engine ended {request.transfer_id} with the reason {completion.finish_reason}"
        )
    metrics = output.metrics
    timed = first and metrics is not None and metrics.scheduled_ts > 0
    return EngineOutput(
        first_index=index,
        token_ids=tuple(completion.token_ids),
        logprobs=_logprobs(completion, request.sampling.logprobs),
        finish_reason=_FINISH_REASONS[completion.finish_reason],
        kv=kv,
        cached_tokens=(output.num_cached_tokens or 0) if first else 0,
        queue_ms=(metrics.scheduled_ts - metrics.queued_ts) * 1000 if timed else 0.0,
        prefill_ms=(metrics.first_token_ts - metrics.scheduled_ts) * 1000 if timed else 0.0,
    )


def _logprobs(completion: CompletionOutput, wanted: int) -> tuple[pb.TokenLogprobs, ...]:
    if not completion.logprobs:
        return ()
    return tuple(
        _token_logprobs(token, alternatives, wanted)
        for token, alternatives in zip(completion.token_ids, completion.logprobs, strict=True)
    )


def _token_logprobs(token: int, alternatives: Mapping[int, Any], wanted: int) -> pb.TokenLogprobs:
    """Return the logprobs of ``token`` and of the ``wanted`` most probable tokens.

    vLLM always lists the chosen token, even if it is not among the ``wanted`` most probable ones.
    Ranks in vLLM start at 1.
    """
    top = sorted(alternatives.items(), key=lambda item: item[1].rank or math.inf)
    return pb.TokenLogprobs(
        logprob=alternatives[token].logprob,
        top=[
            pb.TopLogprob(token_id=id_, logprob=entry.logprob)
            for id_, entry in top
            if (entry.rank or math.inf) <= wanted
        ],
    )
