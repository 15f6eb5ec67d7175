"""Both clients resume a stream after its router died or shut down."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from baton import AsyncClient, BatonError, Client, UnavailableError
from baton.v1 import inference_pb2 as pb
from tests.unit.baton.scripted import ResumeScript, Script, ScriptedServer, answer, fail, serve

TEXTS = ("a", "b", "c", "d")
DRAINING = pb.ErrorDetail(reason="ROUTER_DRAINING", retry_after_ms=1000)
BUSY = pb.ErrorDetail(reason="REQUEST_IN_FLIGHT", retry_after_ms=10)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def breaks_after(count: int, detail: pb.ErrorDetail | None = DRAINING) -> Script:
    def script(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        yield from answer(*TEXTS)[:count]
        yield from fail(UNAVAILABLE, "gone", detail)(request, context)

    return script


def send_rest(
    request: pb.ResumeRequest, context: grpc.ServicerContext
) -> Iterator[pb.GenerateResponse]:
    yield from answer(*TEXTS)[request.last_sequence + 1 :]


def in_turn(*scripts: ResumeScript) -> ResumeScript:
    turns = iter(scripts)
    return lambda request, context: next(turns)(request, context)


def refuses(code: grpc.StatusCode, detail: pb.ErrorDetail | None) -> ResumeScript:
    return lambda request, context: fail(code, "no", detail)(pb.GenerateRequest(), context)


def breaks_again(
    request: pb.ResumeRequest, context: grpc.ServicerContext
) -> Iterator[pb.GenerateResponse]:
    yield answer(*TEXTS)[request.last_sequence + 1]
    yield from fail(UNAVAILABLE, "gone", None)(pb.GenerateRequest(), context)


def read(kind: str, server: ScriptedServer, resume_timeout_s: float = 10) -> str:
    """Read a stream with the blocking or the asyncio client. Return the whole text."""
    if kind == "sync":
        with Client(server.address, resume_timeout_s=resume_timeout_s) as client:
            return client.complete("Hi", timeout_s=20).text

    async def read_async() -> str:
        async with AsyncClient(server.address, resume_timeout_s=resume_timeout_s) as client:
            return (await client.complete("Hi", timeout_s=20)).text

    return asyncio.run(read_async())


@pytest.mark.parametrize("kind", ["sync", "aio"])
@pytest.mark.parametrize("detail", [None, DRAINING], ids=["died", "draining"])
def test_a_broken_stream_is_resumed(kind: str, detail: pb.ErrorDetail | None) -> None:
    with serve(breaks_after(2, detail), resume_script=send_rest) as server:
        assert read(kind, server) == "abcd"
    (request,) = server.resume_requests
    assert request == pb.ResumeRequest(request_id="r-1", last_sequence=1, resume_token="secret")


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_each_interruption_is_reported_with_the_time_that_is_left(kind: str) -> None:
    reported: list[tuple[str, float]] = []

    def note(error: BatonError, seconds: float) -> None:
        reported.append((error.reason, seconds))

    busy = refuses(grpc.StatusCode.ALREADY_EXISTS, BUSY)
    with serve(
        breaks_after(1, None), resume_script=in_turn(breaks_again, busy, send_rest)
    ) as server:
        if kind == "sync":
            with Client(server.address, resume_timeout_s=7, on_interruption=note) as client:
                assert client.complete("Hi", timeout_s=20).text == "abcd"
        else:

            async def read_async() -> None:
                options: Any = {"resume_timeout_s": 7, "on_interruption": note}
                async with AsyncClient(server.address, **options) as client:
                    assert (await client.complete("Hi", timeout_s=20)).text == "abcd"

            asyncio.run(read_async())
    assert reported == [("CONNECTION_FAILED", 7.0), ("CONNECTION_FAILED", 7.0)]


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_resume_retries_while_busy_and_after_another_break(kind: str) -> None:
    busy = refuses(grpc.StatusCode.ALREADY_EXISTS, BUSY)
    with serve(
        breaks_after(1), resume_script=in_turn(busy, busy, breaks_again, send_rest)
    ) as server:
        assert read(kind, server) == "abcd"
    assert [each.last_sequence for each in server.resume_requests] == [0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_a_stream_that_cannot_be_resumed_raises_the_error_that_broke_it(kind: str) -> None:
    unknown = refuses(grpc.StatusCode.NOT_FOUND, pb.ErrorDetail(reason="NOT_RESUMABLE"))
    with (
        serve(breaks_after(2), resume_script=unknown) as server,
        pytest.raises(UnavailableError, match="gone") as caught,
    ):
        read(kind, server)
    assert caught.value.reason == "ROUTER_DRAINING"
    assert len(server.resume_requests) == 1


@pytest.mark.parametrize("kind", ["sync", "aio"])
@pytest.mark.parametrize(
    ("script", "resume_timeout_s"),
    [
        (breaks_after(2), 0),
        (breaks_after(0), 10),  # the caller can send the request again and loses nothing
        (breaks_after(2, pb.ErrorDetail(reason="NO_DECODE_WORKER")), 10),  # the router is alive
    ],
    ids=["disabled", "nothing received", "answered"],
)
def test_other_errors_are_not_resumed(kind: str, script: Script, resume_timeout_s: float) -> None:
    with serve(script, resume_script=send_rest) as server, pytest.raises(BatonError, match="gone"):
        read(kind, server, resume_timeout_s)
    assert not server.resume_requests
