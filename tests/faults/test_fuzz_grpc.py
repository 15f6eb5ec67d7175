"""Hostile clients attack the gRPC servers of the router and of the workers.

Each hostile call ends in a status that says whose fault the error is. Meanwhile, the streams of
other clients get exactly their tokens. Afterwards no request runs, no KV block is in use, no
additional file is open, and the log has no traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from baton.errors import ERROR_DETAIL_KEY
from baton.v1 import inference_pb2
from core.config.schema import Config
from core.messages import worker_pb2, worker_pb2_grpc
from core.rpc.credentials import ClusterCredentials, open_channel
from core.rpc.status import from_rpc_error
from core.state.registry import MemoryRegistry
from core.types import Pool
from decode_worker.servicer import add_decode_service
from engine.fake import FakeEngine, FakeLatency, next_tokens
from engine.protocol import Engine
from prefill_worker.servicer import add_prefill_service
from router.server import SERVICE
from tests.support.fake_workers import FakeDecode, FakePrefill, answer_tokens
from tests.support.hostile import (
    WITHIN_S,
    OpenFiles,
    Strangers,
    another_protocol,
    damaged,
    dice,
    garbage,
    hostile_call,
    hostile_text,
    huge_length,
    random_frames,
    scramble,
    truncated_preface,
)
from tests.support.router_harness import RouterHarness, token_ids
from tests.support.waiting import until
from worker.intake import Intake
from worker.peers import Peers
from worker.replica import WorkerReplica

pytestmark = pytest.mark.asyncio

Code = grpc.StatusCode
EXPECTED_CODES = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.ALREADY_EXISTS,
    Code.RESOURCE_EXHAUSTED,
    Code.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED,
    Code.CANCELLED,
}
CONNECTIONS = 150
CALLS = 400
PARALLEL_CALLS = 8
PROMPT = (5, 6, 7)
LONG_TOKENS = 400  # length of the stream that runs during the attack
MAX_LOG_LINES = 10
CONTEXT_TOKENS = 512
MAX_MESSAGE_BYTES = 2**20
HEALTH = "grpc.health.v1.Health"


@dataclass
class Server:
    """One server under attack, and how a well-behaved client uses it."""

    port: int
    check_stream: Callable[[], Awaitable[None]]  # runs a short stream and checks its tokens
    open_stream: Callable[[], Any]  # starts a stream of LONG_TOKENS
    tokens_of: Callable[[list[Any]], list[int]]  # returns the tokens of a stream's responses
    expected: list[int]  # tokens of the stream that ``open_stream`` starts
    methods: dict[str, type[Message]]  # request type by the method's full name
    wait_idle: Callable[[], Awaitable[None]]
    codes: Counter[Code] = field(default_factory=Counter)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextlib.asynccontextmanager
async def router() -> AsyncIterator[Server]:
    harness = RouterHarness(
        prefill=[FakePrefill()],
        decode=[FakeDecode()],
        context_tokens=CONTEXT_TOKENS,
        router={"max_message_bytes": MAX_MESSAGE_BYTES},
    )
    async with harness:

        async def check_stream() -> None:
            responses = await harness.generate(PROMPT, max_tokens=12)
            assert token_ids(responses) == answer_tokens(PROMPT, 12)

        def open_stream() -> Any:
            ids = inference_pb2.TokenIds(ids=PROMPT)
            return harness.call(token_ids=ids, sampling={"max_tokens": LONG_TOKENS})

        async def wait_idle() -> None:
            assert harness.server.handler is not None
            async with asyncio.timeout(WITHIN_S):
                await harness.server.handler.drained()
            workers = (*harness.prefill, *harness.decode)
            await until(
                lambda: not any(w.running for w in workers), what="no worker runs a request"
            )

        services = inference_pb2.DESCRIPTOR.services_by_name
        yield Server(
            port=harness.port,
            check_stream=check_stream,
            open_stream=open_stream,
            tokens_of=token_ids,
            expected=answer_tokens(PROMPT, LONG_TOKENS),
            methods=_methods(services.values()),
            wait_idle=wait_idle,
        )


@contextlib.asynccontextmanager
async def worker(credentials: ClusterCredentials | None = None) -> AsyncIterator[Server]:
    """The server of a ``WorkerReplica``, with the services of both pools.

    Without credentials, what hostile clients send gets through to the services.
    """
    config = Config.model_validate(
        {
            "model": {"max_model_len": CONTEXT_TOKENS},
            "router": {"max_message_bytes": MAX_MESSAGE_BYTES, "registry_poll_s": 0.01},
        }
    )
    engine = FakeEngine(config, Pool.DECODE, latency=FakeLatency(0, 0, 20))

    def add(server: grpc.aio.Server, engine: Engine, intake: Intake, peers: Peers) -> None:
        add_prefill_service(server, engine, intake, peers)
        add_decode_service(server, engine, intake, peers)

    replica = WorkerReplica(
        config=config,
        pool=Pool.DECODE,
        model="m",
        engine=engine,
        registry=MemoryRegistry(lease_s=3600),
        services={Pool.DECODE: add},
        incarnation="i",
        credentials=credentials,
    )
    record = await replica.start()
    numbers = iter(range(10**6))
    try:
        async with open_channel(record.address, credentials) as channel:
            stub: Any = worker_pb2_grpc.DecodeWorkerStub(channel)

            def decode(tokens: int) -> Any:
                key = worker_pb2.TransferKey(request_id=f"good-{next(numbers)}", attempt=1)
                sampling = inference_pb2.SamplingParams(max_tokens=tokens)
                return stub.Decode(
                    worker_pb2.DecodeRequest(key=key, token_ids=PROMPT, sampling=sampling)
                )

            async def check_stream() -> None:
                responses = [response async for response in decode(12)]
                assert _token_ids(responses) == list(next_tokens(PROMPT, 12))

            async def wait_idle() -> None:
                def is_idle() -> bool:
                    load = engine.load()
                    free = load.kv_blocks_free == load.kv_blocks_total
                    return free and not load.running and not load.queue_depth

                await until(is_idle, what="all KV blocks are free and nothing runs")

            services = worker_pb2.DESCRIPTOR.services_by_name
            yield Server(
                port=int(record.address.rpartition(":")[2]),
                check_stream=check_stream,
                open_stream=lambda: decode(LONG_TOKENS),
                tokens_of=_token_ids,
                expected=list(next_tokens(PROMPT, LONG_TOKENS)),
                methods=_methods(services.values()),
                wait_idle=wait_idle,
            )
    finally:
        await replica.stop(1)


SERVERS = {"router": router, "worker": worker}
WITH_TLS = {"worker with TLS": lambda: worker(ClusterCredentials.create())}


def _token_ids(responses: list[Any]) -> list[int]:
    return [token_id for response in responses for token_id in response.token_ids]


def _methods(services: Iterable[Any]) -> dict[str, type[Message]]:
    return {
        f"/{method.full_name.rpartition('.')[0]}/{method.name}": method.input_type._concrete_class
        for service in services
        for method in service.methods
    }


@contextlib.asynccontextmanager
async def undisturbed(
    server: Server, caplog: pytest.LogCaptureFixture, *, ignored_logger: str = ""
) -> AsyncIterator[None]:
    """Check that the block does not disturb other clients and leaves nothing behind.

    Args:
        ignored_logger: name of a logger that may log tracebacks.
    """
    await server.check_stream()
    await _open_lasting_files(server)
    files = OpenFiles()
    stream = aiter(server.open_stream())
    responses = [await anext(stream)]
    finished = asyncio.Event()

    async def run_others() -> int:
        count = 0
        while not finished.is_set():
            await server.check_stream()
            count += 1
        return count

    caplog.clear()
    others = asyncio.create_task(run_others())
    try:
        yield
    finally:
        finished.set()
        count = await others
    assert count > 0
    responses += [response async for response in stream]
    assert server.tokens_of(responses) == server.expected
    await server.check_stream()
    await server.wait_idle()
    await files.until_as_at_first()
    records = [record for record in caplog.records if record.name != ignored_logger]
    assert not [record.getMessage() for record in records if record.exc_info]
    lines = [record for record in records if record.levelno >= logging.WARNING]
    assert len(lines) <= MAX_LOG_LINES


async def _open_lasting_files(server: Server) -> None:
    """Make gRPC open the files that it opens once and never closes."""
    async with grpc.aio.insecure_channel(server.target) as channel:
        await _call_hostile(server, channel, "/x/y", b"", allowed={Code.UNIMPLEMENTED})


async def _call_hostile(
    server: Server, channel: grpc.aio.Channel, method: str, request: bytes, *,
    allowed: Iterable[Code] = (), timeout_s: float = WITHIN_S, metadata: Any = None,
    cancel_early: bool = False,
) -> None:  # fmt: skip
    """Call ``method`` and check that the status is an expected one. An error must carry Baton's
    error detail, unless gRPC itself may have caused the error."""
    unary_stream: Any = channel.unary_stream(method)  # sends and returns bytes
    call = unary_stream(request, timeout=timeout_s, metadata=metadata)
    code, error = Code.OK, None
    # Whether the call is sure to reach Baton's code. gRPC itself or its health service may end
    # other calls.
    ours = method in server.methods and len(request) <= MAX_MESSAGE_BYTES and not metadata
    try:
        async for _ in call:
            if cancel_early:
                call.cancel()
    except grpc.aio.AioRpcError as caught:
        code, error = caught.code(), caught
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        code = Code.CANCELLED
    server.codes[code] += 1
    what = f"{method} {request[:200]!r}… ended in {code}: {error}"
    assert code in {*EXPECTED_CODES, *allowed}, what
    if error is not None and ours:
        assert ERROR_DETAIL_KEY in dict(error.trailing_metadata() or ()), what
        assert from_rpc_error(error, "w").reason.isupper(), what


async def _run_in_parallel(calls: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Make all calls, ``PARALLEL_CALLS`` at a time."""
    remaining = iter(calls)

    async def make_calls() -> None:
        for call in remaining:
            await call()

    async with asyncio.TaskGroup() as group:
        for _ in range(PARALLEL_CALLS):
            group.create_task(make_calls())


@pytest.mark.parametrize("name", SERVERS | WITH_TLS)
async def test_bytes_that_are_not_grpc(name: str, caplog: pytest.LogCaptureFixture) -> None:
    rng = dice(f"bytes {name}")
    async with (SERVERS | WITH_TLS)[name]() as server, undisturbed(server, caplog):
        method = rng.choice(sorted(server.methods))
        kinds = [
            garbage, truncated_preface, random_frames, huge_length, hostile_call(method.encode()),
            another_protocol,
        ]  # fmt: skip
        strangers = Strangers("127.0.0.1", server.port, rng)
        await strangers.storm(kinds, CONNECTIONS)
        strangers.leave()


@pytest.mark.parametrize("name", SERVERS)
async def test_a_path_that_is_not_text(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """In grpcio 1.84, such a call ends the server. We require an older grpcio, in which only the
    call ends and an error is logged."""
    rng = dice(f"path {name}")
    async with (
        SERVERS[name]() as server,
        undisturbed(server, caplog, ignored_logger="grpc._cython.cygrpc"),
    ):
        strangers = Strangers("127.0.0.1", server.port, rng)
        await strangers.storm([hostile_call(b"/\xff\xfe/Generate", sound=True)], 3)
        strangers.leave()


@pytest.mark.parametrize("name", SERVERS)
async def test_calls_with_random_messages_methods_and_metadata(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rng = dice(f"calls {name}")

    async def call(server: Server, channel: grpc.aio.Channel) -> None:
        ours = sorted(server.methods)
        request = rng.randbytes(rng.choice([0, 1, 5, 100, 10_000]))
        match rng.choice(["message", "message", "method", "health", "size", "metadata"]):
            case "message":
                await _call_hostile(server, channel, rng.choice(ours), request)
            case "method":
                service = rng.choice([SERVICE, "baton.v1.Nothing", hostile_text(rng)[:50]])
                method = f"/{service}/{rng.choice(['Generate2', '', 'x' * 300])}"
                method = method.encode("ascii", "replace").decode().replace("\0", "0")
                method = "".join(char if char.isprintable() else "?" for char in method)
                await _call_hostile(server, channel, method, request, allowed={Code.UNIMPLEMENTED})
            case "health":
                method = rng.choice([f"/{HEALTH}/Check", f"/{HEALTH}/Watch"])
                # A Watch call that can be parsed runs until its deadline.
                await _call_hostile(server, channel, method, request, timeout_s=0.2)
            case "size":
                await _call_hostile(server, channel, rng.choice(ours), bytes(MAX_MESSAGE_BYTES + 1))
            case "metadata":
                size = rng.choice([10, 7000, 20_000, 100_000])
                metadata = (("x-bin", rng.randbytes(size)), ("grpc-x", "y" * (size // 20)))
                await _call_hostile(server, channel, rng.choice(ours), request, metadata=metadata)

    async with (
        SERVERS[name]() as server,
        undisturbed(server, caplog),
        grpc.aio.insecure_channel(server.target) as channel,
    ):
        await _run_in_parallel(lambda: call(server, channel) for _ in range(CALLS))
    print(server.codes)
    assert server.codes[Code.INVALID_ARGUMENT]
    assert server.codes[Code.UNIMPLEMENTED]
    assert server.codes[Code.RESOURCE_EXHAUSTED]


def _prompt_of(message: Any) -> Any:
    return getattr(message.token_ids, "ids", message.token_ids)


def _plausible(kind: type[Message], rng: random.Random) -> Message:
    """Return a random request of type ``kind``. The server accepts it, unless it is a Resume."""
    message = kind()
    names = message.DESCRIPTOR.fields_by_name
    if "key" in names:
        message.key.request_id, message.key.attempt = f"r{rng.getrandbits(60)}", 1  # type: ignore[attr-defined]
    if "token_ids" in names:
        _prompt_of(message).extend(rng.randrange(200) for _ in range(rng.choice([1, 3, 100])))
    if "sampling" in names:
        message.sampling.max_tokens = rng.choice([1, 2, 30])  # type: ignore[attr-defined]
    return message


@pytest.mark.parametrize("name", SERVERS)
async def test_requests_with_hostile_fields(name: str, caplog: pytest.LogCaptureFixture) -> None:
    rng = dice(f"fields {name}")

    async def call(server: Server, channel: grpc.aio.Channel) -> None:
        method, kind = rng.choice(sorted(server.methods.items()))
        message = _plausible(kind, rng) if rng.random() < 0.7 else kind()
        scramble(message, rng, rng.choice([0.05, 0.1, 0.3, 0.7]))
        request = message.SerializeToString()
        if rng.random() < 0.2:
            request = damaged(request, rng)
        await _call_hostile(server, channel, method, request, cancel_early=rng.random() < 0.2)

    async def huge(server: Server, channel: grpc.aio.Channel) -> None:
        """Call each method that takes token ids. The request is nearly as large as allowed."""
        for method, kind in server.methods.items():
            message = _plausible(kind, rng)
            if "token_ids" in message.DESCRIPTOR.fields_by_name:
                _prompt_of(message).extend([1] * 1_000_000)
                await _call_hostile(server, channel, method, message.SerializeToString())

    async with (
        SERVERS[name]() as server,
        undisturbed(server, caplog),
        grpc.aio.insecure_channel(server.target) as channel,
    ):
        calls = [lambda: call(server, channel)] * CALLS + [lambda: huge(server, channel)]
        await _run_in_parallel(calls)
    print(server.codes)
    assert server.codes[Code.OK]
    assert server.codes[Code.INVALID_ARGUMENT]
