"""Only processes with the cluster's credentials can call each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from core.rpc.credentials import CHANNEL_OPTIONS, ClusterCredentials

pytestmark = pytest.mark.asyncio

OURS, THEIRS = ClusterCredentials.create(), ClusterCredentials.create()


@asynccontextmanager
async def server(credentials: ClusterCredentials) -> AsyncIterator[str]:
    """Serve health checks. Yields the address."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), server)
    port = server.add_secure_port("127.0.0.1:0", credentials.for_server())
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def check(channel: grpc.aio.Channel) -> grpc.StatusCode:
    async with channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=10
            )
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_a_member_is_served() -> None:
    async with server(OURS) as address:
        channel = grpc.aio.secure_channel(address, OURS.for_channel(), CHANNEL_OPTIONS)
        assert await check(channel) is grpc.StatusCode.OK


async def test_a_stranger_is_not_served() -> None:
    """Neither with other credentials, nor without a certificate, nor without TLS."""
    async with server(OURS) as address:
        only_trusts = grpc.ssl_channel_credentials(root_certificates=OURS.certificate)
        for channel in (
            grpc.aio.secure_channel(address, THEIRS.for_channel(), CHANNEL_OPTIONS),
            grpc.aio.secure_channel(address, only_trusts, CHANNEL_OPTIONS),
            grpc.aio.insecure_channel(address),
        ):
            assert await check(channel) is grpc.StatusCode.UNAVAILABLE


async def test_a_server_that_poses_as_a_worker_gets_no_call() -> None:
    async with server(THEIRS) as address:
        channel = grpc.aio.secure_channel(address, OURS.for_channel(), CHANNEL_OPTIONS)
        assert await check(channel) is grpc.StatusCode.UNAVAILABLE


async def test_secrets_are_not_shown() -> None:
    shown = repr(OURS)
    assert OURS.kv_secret not in shown
    assert "PRIVATE" not in shown
