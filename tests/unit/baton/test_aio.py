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
from tests.unit.baton.scripted import (
    WAIT_S,
    ScriptedServer,
    answer,
    endless,
    fail,
    say,
    serve,
)
from tests.unit.baton.test_client import free_port


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run it in a loop of its own, in debug mode, and check that it leaves no task."""

    async def checked() -> None:
        await main
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:  # tasks that grpc is just finishing
            await asyncio.wait(others, timeout=WAIT_S)
        assert not any(not task.done() for task in others)

    asyncio.run(checked(), debug=True)


async def ended(server: ScriptedServer) -> bool:
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
    assert 20 < server.deadline_s < 31  # gRPC rounds it


def test_timeouts_that_are_endless_or_no_length_of_time() -> None:
    async def main() -> None:
        async with AsyncClient(server.address, timeout_s=30) as client:
            assert (await client.complete("a", timeout_s=math.inf)).text == "a"
            with pytest.raises(InvalidArgumentError, match="timeout_s is nan"):
                client.generate("a", timeout_s=math.nan)

    with serve(say("a")) as server:
        run(main())
    assert server.deadline_s is not None
    assert server.deadline_s > 1e9  # how gRPC's server says that there is none
    assert len(server.requests) == 1


def test_responses_that_wait_are_not_lost_when_the_server_is_done() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.generate("a")
            first = await anext(stream)
            assert await ended(server)
            rest = [each async for each in stream]
        assert "".join(each.text for each in [first, *rest]) == "x" * 500

    with serve(say(*"x" * 500)) as server:
        run(main())


def test_streams_run_side_by_side() -> None:
    """The first stream can only go on once the second one is being read."""
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


def test_leaving_the_loop_cancels() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            async for response in client.generate("a"):
                assert response.text == "a"
                break
            assert await ended(server)

    with serve(endless) as server:
        run(main())


def test_an_exception_in_the_loop_cancels() -> None:
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


def test_aclose_cancels_and_frees_a_reader_that_waits() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client, client.generate("a") as stream:
            await anext(stream)
            await anext(stream)
            reader = asyncio.create_task(next_of(stream))
            await asyncio.sleep(0)
            await stream.aclose()
            with pytest.raises(CancelledError, match="closed"):
                await reader
            assert await ended(server)

    with serve(endless) as server:
        run(main())


async def next_of(stream: Any) -> Response:
    response: Response = await anext(stream)
    return response


def test_cancelling_the_task_cancels_the_request() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.generate("a")
            await anext(stream)
            await anext(stream)
            reader = asyncio.create_task(next_of(stream))
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert await ended(server)

    with serve(endless) as server:
        run(main())


def test_a_timeout_around_the_loop_is_a_timeout() -> None:
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


def test_cancelled_by_the_router_is_not_a_cancelled_task() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(CancelledError, match="shutting down"):
                await client.complete("a")

    with serve(fail(grpc.StatusCode.CANCELLED, "shutting down", None)) as server:
        run(main())


def test_the_status_and_its_detail_are_the_error() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(CapacityError, match=r"^full$") as caught:
                await client.complete("a")
        error = caught.value
        assert (error.reason, error.retry_after_s, error.request_id) == ("OVERLOADED", 2.0, "r-7")

    detail = pb.ErrorDetail(reason="OVERLOADED", request_id="r-7", retry_after_ms=2000)
    with serve(fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", detail)) as server:
        run(main())


def test_a_gap_is_an_error_and_cancels() -> None:
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


def test_nobody_listens() -> None:
    async def main() -> None:
        address = f"127.0.0.1:{free_port()}"
        async with AsyncClient(address) as client:
            with pytest.raises(UnavailableError, match=f"no connection to .* at {address}"):
                await client.complete("a")
            with pytest.raises(UnavailableError, match="no connection"):
                await client.health()

    run(main())


def test_with_tls_nothing_is_said_in_the_clear() -> None:
    async def main() -> None:
        async with AsyncClient(server.address, tls=grpc.ssl_channel_credentials()) as client:
            with pytest.raises(UnavailableError, match="no connection"):
                await client.complete("a", timeout_s=WAIT_S)

    with serve(say("a")) as server:
        run(main())
    assert server.requests == []


def test_health_and_bad_input() -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            assert await client.health(timeout_s=WAIT_S)
            with pytest.raises(InvalidArgumentError, match="exactly one"):
                client.generate("a", token_ids=[1])
        assert server.requests == []

    with serve(say("a")) as server:
        run(main())


def test_a_stream_that_outlives_its_loop_is_harmless() -> None:
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
