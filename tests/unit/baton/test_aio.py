"""The asyncio client against a scripted server."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import grpc
import pytest

from baton import (
    AsyncClient,
    CancelledError,
    CapacityError,
    FinishReason,
    InternalError,
    InvalidArgumentError,
    Response,
    UnavailableError,
)
from baton.v1 import inference_pb2 as pb
from cluster.local.ports import free_port
from tests.unit.baton.scripted import (
    WAIT_S,
    ScriptedServer,
    answer,
    endless,
    fail,
    say,
    serve,
)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` in a new event loop in debug mode. Check that no task is left."""

    async def checked() -> None:
        await main
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:  # gRPC may still be finishing some tasks
            await asyncio.wait(others, timeout=WAIT_S)
        assert all(task.done() for task in others)

    asyncio.run(checked(), debug=True)


async def ended(server: ScriptedServer) -> bool:
    """Wait until a call has ended. Return False if none ends within WAIT_S."""
    return await asyncio.to_thread(server.ended.wait, WAIT_S)


def test_a_stream() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            responses = [each async for each in client.generate("Hi", max_tokens=2)]
            completion = await client.complete(token_ids=[1, 2], timeout_s=30)
        assert [each.text for each in responses] == ["The", " capital"]
        assert responses[-1].finish_reason is FinishReason.STOP
        assert completion.text == "The capital"
        assert completion.phases.kv is not None
        assert completion.phases.kv.backend == "gloo"

    with serve(say("The", " capital")) as server:
        run(main())
    assert [each.WhichOneof("input") for each in server.requests] == ["prompt", "token_ids"]
    assert server.deadline_s is not None
    assert 20 < server.deadline_s < 31  # gRPC rounds the deadline


def test_infinite_and_nan_timeouts() -> None:
    async def main() -> None:
        async with AsyncClient(server.address, timeout_s=30) as client:
            assert (await client.complete("a", timeout_s=math.inf)).text == "a"
            with pytest.raises(InvalidArgumentError, match="timeout_s is nan"):
                client.generate("a", timeout_s=math.nan)

    with serve(say("a")) as server:
        run(main())
    assert server.deadline_s is not None
    assert server.deadline_s > 1e9  # if there is no deadline, gRPC's server reports a huge time
    assert len(server.requests) == 1


def test_buffered_responses_are_read_after_the_call_has_ended_at_the_server() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.generate("a")
            first = await anext(stream)
            assert await ended(server)
            rest = [each async for each in stream]
        assert "".join(each.text for each in [first, *rest]) == "x" * 500

    with serve(say(*"x" * 500)) as server:
        run(main())


def test_streams_run_concurrently() -> None:
    """The first stream waits at the server until the second request has arrived."""
    second_started = threading.Event()

    def script(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        if request.prompt == "second":
            second_started.set()
        elif not second_started.wait(WAIT_S):
            context.abort(grpc.StatusCode.INTERNAL, "not concurrent")
        yield from answer(request.prompt)

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            first, second = await asyncio.gather(
                client.complete("first"), client.complete("second")
            )
        assert (first.text, second.text) == ("first", "second")

    with serve(script) as server:
        run(main())


def test_leaving_the_loop_cancels_the_request() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            async for response in client.generate("a"):
                assert response.text == "a"
                break
            assert await ended(server)

    with serve(endless) as server:
        run(main())


def test_an_exception_in_the_loop_cancels_the_request() -> None:
    async def body(client: AsyncClient) -> None:
        async for _ in client.generate("a"):
            raise RuntimeError("mine")

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(RuntimeError, match="mine"):
                await body(client)
            assert await ended(server)

    with serve(endless) as server:
        run(main())


def test_aclose_cancels_the_request_and_ends_a_waiting_reader() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client, client.generate("a") as stream:
            await anext(stream)
            await anext(stream)
            reader = asyncio.create_task(next_response(stream))
            await asyncio.sleep(0)
            await stream.aclose()
            with pytest.raises(CancelledError, match="closed"):
                await reader
            assert await ended(server)

    with serve(endless) as server:
        run(main())


async def next_response(stream: Any) -> Response:
    response: Response = await anext(stream)
    return response


def test_cancelling_the_task_cancels_the_request() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.generate("a")
            await anext(stream)
            await anext(stream)
            reader = asyncio.create_task(next_response(stream))
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert await ended(server)

    with serve(endless) as server:
        run(main())


def test_asyncio_timeout_raises_timeout_error_and_cancels_the_request() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.complete("a")
            assert await ended(server)

    with serve(endless) as server:
        run(main())


def test_closing_the_client_ends_its_streams() -> None:
    async def main() -> None:
        client = AsyncClient(server.address)
        stream = client.generate("a")
        await anext(stream)
        await client.aclose()
        await client.aclose()
        assert await ended(server)
        with pytest.raises(ValueError, match="closed"):
            client.generate("a")

    with serve(endless) as server:
        run(main())


def test_cancellation_by_the_router_raises_batons_cancelled_error() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(CancelledError, match="shutting down"):
                await client.complete("a")

    detail = pb.ErrorDetail(reason="CANCELLED")
    with serve(fail(grpc.StatusCode.CANCELLED, "shutting down", detail)) as server:
        run(main())


def test_a_router_that_stops_is_unavailable() -> None:
    """gRPC cancels the calls that arrive just then, without Baton's detail."""

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(UnavailableError) as caught:
                await client.complete("a")
            assert caught.value.reason == "CONNECTION_FAILED"

    with serve(fail(grpc.StatusCode.CANCELLED, "CANCELLED", None)) as server:
        run(main())


def test_the_error_has_the_status_and_the_detail() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(CapacityError, match=r"^full$") as caught:
                await client.complete("a")
        error = caught.value
        assert (error.reason, error.retry_after_s, error.request_id) == ("OVERLOADED", 2.0, "r-7")

    detail = pb.ErrorDetail(reason="OVERLOADED", request_id="r-7", retry_after_ms=2000)
    with serve(fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", detail)) as server:
        run(main())


def test_a_sequence_gap_raises_and_cancels_the_request() -> None:
    def script(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(sequence=1)
        yield from endless(request, context)

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(InternalError, match="response 1 arrived where 0 was due"):
                await anext(client.generate("a"))
            assert await ended(server)

    with serve(script) as server:
        run(main())


def test_an_unreachable_router_raises_unavailable() -> None:
    async def main() -> None:
        address = f"127.0.0.1:{free_port('127.0.0.1')}"
        async with AsyncClient(address) as client:
            with pytest.raises(UnavailableError, match=f"no connection to .* at {address}"):
                await client.complete("a")
            with pytest.raises(UnavailableError, match="no connection"):
                await client.health()

    run(main())


def test_with_tls_nothing_is_sent_in_plaintext() -> None:
    async def main() -> None:
        async with AsyncClient(server.address, tls=grpc.ssl_channel_credentials()) as client:
            with pytest.raises(UnavailableError, match="no connection"):
                await client.complete("a", timeout_s=WAIT_S)

    with serve(say("a")) as server:
        run(main())
    assert server.requests == []


def test_health_and_invalid_input() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            assert await client.health(timeout_s=WAIT_S)
            with pytest.raises(InvalidArgumentError, match="exactly one"):
                client.generate("a", token_ids=[1])
        assert server.requests == []

    with serve(say("a")) as server:
        run(main())


def test_a_stream_can_be_deleted_after_its_event_loop_has_ended() -> None:
    kept: list[object] = []

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.generate("a")
            kept.append(stream)
            await anext(stream)

    with serve(endless) as server:
        run(main())
        kept.clear()
        assert server.ended.wait(WAIT_S)
