"""A real gRPC server on a free loopback port. A script produces the responses of each call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton._wire import HEALTH_REQUEST
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

WAIT_S = 10.0  # limit of waits for events that are due at once; only a failing test reaches it

Script = Callable[[pb.GenerateRequest, grpc.ServicerContext], Iterator[pb.GenerateResponse]]
ResumeScript = Callable[[pb.ResumeRequest, grpc.ServicerContext], Iterator[pb.GenerateResponse]]


@dataclass
class ScriptedServer(inference_pb2_grpc.InferenceServicer):
    script: Script
    resume_script: ResumeScript | None = None
    address: str = ""
    health: health.HealthServicer = field(default_factory=health.HealthServicer)
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    resume_requests: list[pb.ResumeRequest] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)  # set when Generate begins
    ended: threading.Event = field(default_factory=threading.Event)  # set when Generate ends
    deadline_s: float | None = None  # time that the last Generate call had left when it began

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.deadline_s = context.time_remaining()
        context.add_callback(self.ended.set)
        self.started.set()
        yield from self.script(request, context)

    def Resume(
        self, request: pb.ResumeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.resume_requests.append(request)
        assert self.resume_script is not None
        yield from self.resume_script(request, context)


@contextmanager
def serve(
    script: Script,
    *,
    resume_script: ResumeScript | None = None,
    max_message_bytes: int = 4 << 20,
) -> Iterator[ScriptedServer]:
    """Run a server that answers Generate and Resume with these scripts."""
    servicer = ScriptedServer(script, resume_script)
    pool = futures.ThreadPoolExecutor(max_workers=8)
    server = grpc.server(pool, options=[("grpc.max_receive_message_length", max_message_bytes)])
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer.health, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    servicer.health.set(HEALTH_REQUEST.service, health_pb2.HealthCheckResponse.SERVING)
    server.start()
    try:
        yield servicer
    finally:
        server.stop(grace=None).wait(WAIT_S)
        pool.shutdown()


PHASES = pb.Phases(
    queue_ms=0.5,
    prefill_ms=61.0,
    ttft_ms=62.5,
    handoff_ms=35.0,
    decode_ms=240.0,
    tokens_per_s=29.1,
    kv=pb.KvReport(
        outcome=pb.KV_OUTCOME_TRANSFERRED,
        backend="gloo",
        bytes=921_600,
        messages=30,
        tokens=40,
        transfer_ms=12.25,
        cached_tokens=0,
        computed_tokens=1,
    ),
    prefill_worker="prefill-ab12cd",
    decode_worker="decode-9f00aa",
    attempts=1,
)


def answer(*texts: str, request_id: str = "r-1") -> list[pb.GenerateResponse]:
    """Return the responses of a whole stream, one token each. The last has usage and phases."""
    responses = [
        pb.GenerateResponse(request_id=request_id, sequence=i, text=text, token_ids=[100 + i])
        for i, text in enumerate(texts)
    ]
    responses[0].resume_token = "secret"
    responses[-1].finish_reason = pb.FINISH_REASON_STOP
    responses[-1].usage.CopyFrom(pb.Usage(prompt_tokens=40, completion_tokens=len(texts)))
    responses[-1].phases.CopyFrom(PHASES)
    return responses


def say(*texts: str) -> Script:
    """Return a script that streams ``answer(*texts)``."""
    return lambda request, context: iter(answer(*texts))


def fail(code: grpc.StatusCode, message: str, detail: pb.ErrorDetail | None) -> Script:
    """Return a script that ends the call with this status."""

    def script(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        if detail is not None:
            context.set_trailing_metadata((("baton-error-bin", detail.SerializeToString()),))
        context.abort(code, message)

    return script


def endless(
    request: pb.GenerateRequest, context: grpc.ServicerContext
) -> Iterator[pb.GenerateResponse]:
    """A script that sends two responses and then waits until the call ends."""
    yield pb.GenerateResponse(request_id="r-1", sequence=0, text="a", token_ids=[1])
    yield pb.GenerateResponse(request_id="r-1", sequence=1, text="b", token_ids=[2])
    ended = threading.Event()
    if context.add_callback(ended.set):
        ended.wait(WAIT_S)
