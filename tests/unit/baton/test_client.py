"""The blocking client against a scripted server."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton import (
    AlreadyExistsError,
    BatonError,
    ChatMessage,
    Client,
    DeadlineError,
    FinishReason,
    InternalError,
    InvalidArgumentError,
    KvOutcome,
    NotFoundError,
    UnavailableError,
)
from baton._wire import HEALTH_REQUEST
from baton.v1 import inference_pb2 as pb
from cluster.local.ports import free_port
from tests.unit.baton.scripted import WAIT_S, answer, endless, fail, say, serve


def test_a_stream() -> None:
    with serve(say("The", " capital")) as server, Client(server.address) as client:
        responses = list(client.generate("Hi", max_tokens=2, timeout_s=30))
    assert [each.text for each in responses] == ["The", " capital"]
    assert [each.token_ids for each in responses] == [(100,), (101,)]
    first, last = responses
    assert (first.finish_reason, first.usage, first.phases) == (None, None, None)
    assert last.finish_reason is FinishReason.STOP
    assert last.usage is not None
    assert last.usage.prompt_tokens == 40
    assert last.phases is not None
    assert last.phases.decode_worker == "decode-9f00aa"
    assert last.phases.kv is not None
    assert (last.phases.kv.outcome, last.phases.kv.bytes) == (KvOutcome.TRANSFERRED, 921_600)
    assert server.requests == [
        pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParams(max_tokens=2))
    ]
    assert server.deadline_s is not None
    assert 20 < server.deadline_s < 31  # gRPC rounds the deadline


def test_complete_joins_the_stream() -> None:
    with serve(say("Par", "", "is")) as server, Client(server.address) as client:
        completion = client.complete(messages=[ChatMessage("user", "Where?")])
    assert completion.text == "Paris"
    assert completion.token_ids == (100, 101, 102)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.usage.completion_tokens == 3
    assert completion.phases.prefill_worker == "prefill-ab12cd"
    assert completion.request_id == "r-1"


def test_logprobs() -> None:
    top = [pb.TopLogprob(token_id=100, logprob=-0.5), pb.TopLogprob(token_id=7, logprob=-1.5)]
    [response] = answer("a")
    response.logprobs.append(pb.TokenLogprobs(logprob=-0.5, top=top))

    def script(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        yield response

    with serve(script) as server, Client(server.address) as client:
        completion = client.complete("a", logprobs=2)
    [logprobs] = completion.logprobs
    assert logprobs.logprob == -0.5
    assert [(each.token_id, each.logprob) for each in logprobs.top] == [(100, -0.5), (7, -1.5)]


def test_leaving_the_loop_cancels_the_request() -> None:
    with serve(endless) as server, Client(server.address) as client:
        for response in client.generate("a"):
            assert response.text == "a"
            break
        assert server.ended.wait(WAIT_S)


def test_an_exception_in_the_loop_cancels_the_request() -> None:
    def body(client: Client) -> None:
        for _ in client.generate("a"):
            raise RuntimeError("mine")

    with serve(endless) as server, Client(server.address) as client:
        with pytest.raises(RuntimeError, match="mine"):
            body(client)
        assert server.ended.wait(WAIT_S)


def test_leaving_the_with_block_cancels_and_close_is_idempotent() -> None:
    with serve(endless) as server, Client(server.address) as client:
        with client.generate("a") as stream:
            next(stream)
            assert stream.request_id == "r-1"
        assert server.ended.wait(WAIT_S)
        stream.close()  # leaving the with block has already closed the stream


def test_deleting_an_unread_stream_cancels_the_request() -> None:
    with serve(endless) as server, Client(server.address) as client:
        stream = client.generate("a")
        assert server.started.wait(WAIT_S)
        del stream
        assert server.ended.wait(WAIT_S)


def test_closing_the_client_ends_its_streams() -> None:
    with serve(endless) as server:
        client = Client(server.address)
        stream = client.generate("a")
        next(stream)
        client.close()
        client.close()
        assert server.ended.wait(WAIT_S)


def test_a_sequence_gap_raises_and_cancels_the_request() -> None:
    def script(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(request_id="r-1", sequence=0)
        yield pb.GenerateResponse(request_id="r-1", sequence=2)
        yield from endless(request, context)

    with serve(script) as server, Client(server.address) as client:
        stream = client.generate("a")
        next(stream)
        with pytest.raises(InternalError, match="response 2 arrived where 1 was due") as caught:
            next(stream)
        assert caught.value.request_id == "r-1"
        assert server.ended.wait(WAIT_S)


def test_the_error_has_the_status_and_the_detail() -> None:
    detail = pb.ErrorDetail(reason="NO_WORKER", request_id="r-7", retry_after_ms=250)
    script = fail(grpc.StatusCode.UNAVAILABLE, "no prefill worker is alive", detail)
    with (
        serve(script) as server,
        Client(server.address) as client,
        pytest.raises(UnavailableError, match=r"^no prefill worker is alive$") as caught,
    ):
        client.complete("a")
    error = caught.value
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert (error.reason, error.retry_after_s, error.request_id) == ("NO_WORKER", 0.25, "r-7")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.ALREADY_EXISTS, AlreadyExistsError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError),
    ],
)
def test_an_error_without_a_detail(code: grpc.StatusCode, kind: type[BatonError]) -> None:
    with (
        serve(fail(code, "no", None)) as server,
        Client(server.address) as client,
        pytest.raises(kind, match=r"^no$") as caught,
    ):
        client.complete("a", request_id="mine")
    assert caught.value.request_id == "mine"


def test_a_deadline_raises_and_cancels_the_request() -> None:
    with serve(endless) as server, Client(server.address, timeout_s=0.3) as client:
        with pytest.raises(DeadlineError):
            client.complete("a")
        assert server.ended.wait(WAIT_S)


@pytest.mark.parametrize("timeout_s", [math.inf, 1e12, 1e8])
def test_an_infinite_timeout_sets_no_deadline(timeout_s: float) -> None:
    with serve(say("a")) as server, Client(server.address, timeout_s=30) as client:
        assert client.complete("a", timeout_s=timeout_s).text == "a"
        assert server.deadline_s is not None
        assert server.deadline_s > 1e9  # if there is no deadline, gRPC's server reports a huge time
        assert client.health(timeout_s=timeout_s)


@pytest.mark.parametrize("timeout_s", [math.nan, -1.0, -math.inf])
def test_a_nan_or_negative_timeout_raises(timeout_s: float) -> None:
    with serve(say("a")) as server, Client(server.address) as client:
        with pytest.raises(InvalidArgumentError, match="timeout_s is"):
            client.generate("a", timeout_s=timeout_s)
        with pytest.raises(InvalidArgumentError, match="timeout_s is"):
            client.health(timeout_s=timeout_s)
        assert server.requests == []


def test_an_unreachable_router_raises_unavailable() -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with Client(address) as client:
        with pytest.raises(UnavailableError, match=f"no connection to .* at {address}") as caught:
            client.complete("a")
        assert "refused" in str(caught.value)
        assert caught.value.reason == "CONNECTION_FAILED"
        with pytest.raises(UnavailableError, match="no connection"):
            client.health()


def test_health() -> None:
    with serve(say("a")) as server, Client(server.address) as client:
        assert client.health(timeout_s=WAIT_S)
        server.health.set(HEALTH_REQUEST.service, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert not client.health(timeout_s=WAIT_S)


def test_another_grpc_server_is_not_healthy() -> None:
    """Each of Ray's servers, for example, serves the name ""."""
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}") as client, pytest.raises(NotFoundError):
            client.health(timeout_s=WAIT_S)
    finally:
        server.stop(None)


def test_with_tls_nothing_is_sent_in_plaintext() -> None:
    with (
        serve(say("a")) as server,
        Client(server.address, tls=grpc.ssl_channel_credentials()) as client,
        pytest.raises(UnavailableError, match="no connection"),
    ):
        client.complete("a", timeout_s=WAIT_S)
    assert server.requests == []


def test_invalid_input_is_not_sent() -> None:
    with serve(say("a")) as server, Client(server.address, max_message_bytes=100) as client:
        with pytest.raises(InvalidArgumentError, match="exactly one"):
            client.generate()
        with pytest.raises(InvalidArgumentError, match="max_message_bytes"):
            client.generate("a" * 100)
        assert server.requests == []


def test_a_message_over_the_routers_limit_raises_invalid_argument() -> None:
    with (
        serve(say("a"), max_message_bytes=100) as server,
        Client(server.address) as client,
        pytest.raises(InvalidArgumentError, match="larger than max") as caught,
    ):
        client.complete("a" * 200)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


def test_threads_share_a_client_and_the_client_leaves_no_thread() -> None:
    texts: list[str] = []
    with serve(say("a", "b")) as server:
        before = set(threading.enumerate())
        with Client(server.address) as client:
            readers = [
                threading.Thread(target=lambda: texts.append(client.complete("x").text))
                for _ in range(4)
            ]
            for each in readers:
                each.start()
            for each in readers:
                each.join(WAIT_S)
        client_threads = [
            each
            for each in set(threading.enumerate()) - before
            if not each.name.startswith("ThreadPoolExecutor")  # the scripted server's threads
        ]
        for each in client_threads:
            each.join(WAIT_S)
        assert not any(each.is_alive() for each in client_threads)
    assert texts == ["ab"] * 4


def test_metadata_is_sent_with_each_call() -> None:
    seen: list[str | bytes] = []

    def script(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        seen.extend(value for key, value in context.invocation_metadata() if key == "x-tenant")
        yield from answer("a")

    with (
        serve(script) as server,
        Client(server.address, metadata=[("x-tenant", "blue")]) as client,
    ):
        client.complete("Hi", timeout_s=30)
    assert seen == ["blue"]
