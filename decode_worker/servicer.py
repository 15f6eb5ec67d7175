"""The Decode service over gRPC: token ids in, a stream of token ids out."""

from __future__ import annotations

import logging
import math
import time

import grpc

from baton.v1 import inference_pb2
from core.errors import UnavailableError
from core.messages import worker_pb2, worker_pb2_grpc
from core.rpc.status import accept
from engine.protocol import Engine, EngineOutput, EngineRequest, KvReceive
from worker.calls import check_deadline, closing, errors_to_status, transfer_id_of
from worker.intake import Intake
from worker.peers import Peers

_WARN_INTERVAL_S = 60.0  # the cause may concern every request

_log = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[worker_pb2.DecodeRequest, worker_pb2.DecodeResponse]


class DecodeServicer(worker_pb2_grpc.DecodeWorkerServicer):
    """Serves ``DecodeWorker`` of ``worker.proto``."""

    def __init__(self, engine: Engine, intake: Intake, peers: Peers) -> None:
        self._engine = engine
        self._intake = intake
        self._peers = peers
        self._warn_after_s = -math.inf  # monotonic
        self._unwarned = 0  # prompts since the last warning

    async def Decode(self, request: worker_pb2.DecodeRequest, context: _Context) -> None:
        """Stream the tokens of one attempt as the engine samples them."""
        async with errors_to_status(context, request.key.request_id):
            transfer_id = transfer_id_of(request.key)
            check_deadline(context)
            with self._intake.admit(transfer_id):
                receive = await self._kv_receive(request)
                await accept(context)
                outputs = self._engine.generate(_engine_request(transfer_id, request, receive))
                async with closing(outputs):
                    async for output in outputs:
                        response = _response(output)
                        if request.HasField("kv_source") and receive is None and output.kv:
                            response.kv.outcome = inference_pb2.KV_OUTCOME_RECOMPUTED
                        await context.write(response)

    async def _kv_receive(self, request: worker_pb2.DecodeRequest) -> KvReceive | None:
        """Return where the KV comes from. None: the engine computes the prompt."""
        if not request.HasField("kv_source"):
            return None
        source = request.kv_source
        try:
            addresses = await self._peers.kv_addresses(source.incarnation)
        except UnavailableError as error:  # a slower answer is better than none
            self._warn(source.worker_id, error)
            return None
        return KvReceive(source.incarnation, addresses, source.forwards_first_token)

    def _warn(self, worker_id: str, error: UnavailableError) -> None:
        self._unwarned += 1
        now_s = time.monotonic()
        if now_s < self._warn_after_s:
            return
        _log.warning(
            "this worker computes prompts whose KV source is unknown: %d since the last warning, "
            "the latest named %s: %s",
            self._unwarned,
            worker_id,
            error,
        )
        self._warn_after_s = now_s + _WARN_INTERVAL_S
        self._unwarned = 0


def add_decode_service(
    server: grpc.aio.Server, engine: Engine, intake: Intake, peers: Peers
) -> None:
    """Register the Decode service on ``server``."""
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(
        DecodeServicer(engine, intake, peers), server
    )


def _engine_request(
    transfer_id: str, request: worker_pb2.DecodeRequest, receive: KvReceive | None
) -> EngineRequest:
    return EngineRequest(
        transfer_id=transfer_id,
        token_ids=tuple(request.token_ids),
        sampling=request.sampling,
        kv=receive,
        tokens_so_far=request.tokens_so_far,
    )


def _response(output: EngineOutput) -> worker_pb2.DecodeResponse:
    return worker_pb2.DecodeResponse(
        first_index=output.first_index,
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        finish_reason=output.finish_reason,
        kv=output.kv,
    )
