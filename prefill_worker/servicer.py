"""The gRPC service of a prefill worker: takes token ids and returns the first token."""

from __future__ import annotations

import grpc

from baton.v1 import inference_pb2
from core.errors import InternalError
from core.messages import worker_pb2, worker_pb2_grpc
from engine.protocol import Engine, EngineOutput, EngineRequest, KvSend
from worker.calls import check_deadline, closing, errors_to_status, transfer_id_of
from worker.intake import Intake
from worker.peers import Peers

_PrefillContext = grpc.aio.ServicerContext[worker_pb2.PrefillRequest, worker_pb2.PrefillResponse]
_ReleaseContext = grpc.aio.ServicerContext[worker_pb2.ReleaseRequest, worker_pb2.ReleaseResponse]


class PrefillServicer(worker_pb2_grpc.PrefillWorkerServicer):
    """Serves ``PrefillWorker`` of ``worker.proto``."""

    def __init__(self, engine: Engine, intake: Intake) -> None:
        self._engine = engine
        self._intake = intake

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: _PrefillContext
    ) -> worker_pb2.PrefillResponse:
        """Compute the prompt and answer with the first token."""
        async with errors_to_status(context, request.key.request_id):
            transfer_id = transfer_id_of(request.key)
            check_deadline(context)
            with self._intake.admit(transfer_id):
                output = await self._first_token(_engine_request(transfer_id, request))
        return _response(output, request)

    async def Release(
        self, request: worker_pb2.ReleaseRequest, context: _ReleaseContext
    ) -> worker_pb2.ReleaseResponse:
        """Drop KV blocks that no decode worker will fetch."""
        async with errors_to_status(context, request.key.request_id):
            await self._engine.release(transfer_id_of(request.key))
        return worker_pb2.ReleaseResponse()

    async def _first_token(self, request: EngineRequest) -> EngineOutput:
        """Return the first output of the engine's stream.

        Reads the stream to its end, because closing the stream earlier aborts the request and drops
        its KV blocks.

        Raises InternalError if the engine samples no token.
        """
        first: EngineOutput | None = None
        async with closing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                first = first or output
        if first is None or not first.token_ids:
            raise InternalError("the engine ended the prefill without a token")
        return first


def add_prefill_service(
    server: grpc.aio.Server, engine: Engine, intake: Intake, _peers: Peers
) -> None:
    """Register the PrefillWorker service on ``server``."""
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(PrefillServicer(engine, intake), server)


def _engine_request(transfer_id: str, request: worker_pb2.PrefillRequest) -> EngineRequest:
    sampling = inference_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    sampling.max_tokens = 1
    if sampling.min_tokens > 1:  # the decode worker applies the rest of min_tokens
        sampling.min_tokens = 1
    return EngineRequest(
        transfer_id=transfer_id,
        token_ids=tuple(request.token_ids),
        sampling=sampling,
        kv=KvSend(forwards_first_token=request.forwards_first_token) if request.transfer else None,
        tokens_so_far=request.tokens_so_far,
    )


def _response(
    output: EngineOutput, request: worker_pb2.PrefillRequest
) -> worker_pb2.PrefillResponse:
    response = worker_pb2.PrefillResponse(
        token_id=output.token_ids[0],
        cached_tokens=output.cached_tokens,
        queue_ms=output.queue_ms,
        prefill_ms=output.prefill_ms,
    )
    if output.logprobs:
        response.logprobs.CopyFrom(output.logprobs[0])
    if output.finish_reason == inference_pb2.FINISH_REASON_STOP or request.sampling.max_tokens == 1:
        # In all other cases the engine stopped only because _engine_request set max_tokens to 1.
        response.finish_reason = output.finish_reason
    return response
