"""Typed calls to one worker process over one channel."""

from __future__ import annotations

from typing import cast

import grpc

from core.messages import worker_pb2, worker_pb2_grpc
from core.rpc.credentials import ClusterCredentials, open_channel
from core.rpc.options import channel_options

IDLE = grpc.ChannelConnectivity.IDLE
CONNECTING = grpc.ChannelConnectivity.CONNECTING
READY = grpc.ChannelConnectivity.READY

PrefillCall = grpc.aio.UnaryUnaryCall[worker_pb2.PrefillRequest, worker_pb2.PrefillResponse]
DecodeCall = grpc.aio.UnaryStreamCall[worker_pb2.DecodeRequest, worker_pb2.DecodeResponse]

MAX_RECONNECT_BACKOFF_MS = 1000  # a worker that is back is noticed within about a second


class WorkerClient:
    """Owns the channel to ``address`` ("host:port"). The channel connects when it is first used.

    Args:
        credentials: of the cluster; None connects without TLS, for tests with simulated workers.
        connect_timeout_s: a connection attempt that takes longer counts as refused.
        silence_s: a connection on which no data arrives for this long counts as broken.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: ClusterCredentials | None,
        connect_timeout_s: float,
        max_message_bytes: int,
        silence_s: float,
    ) -> None:
        connect_timeout_ms = max(1, round(connect_timeout_s * 1000))
        options = (
            # In spite of its name, this is also gRPC core's limit for one connection attempt.
            ("grpc.min_reconnect_backoff_ms", connect_timeout_ms),
            ("grpc.initial_reconnect_backoff_ms", min(100, connect_timeout_ms)),
            ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
            *channel_options(max_message_bytes, silence_s),
            ("grpc.enable_http_proxy", 0),  # no worker is behind a proxy
            # Channels to the same address share no connection: each incarnation has its own.
            ("grpc.use_local_subchannel_pool", 1),
        )
        self._channel = open_channel(address, credentials, options)
        self._prefill = worker_pb2_grpc.PrefillWorkerStub(self._channel)
        self._decode = worker_pb2_grpc.DecodeWorkerStub(self._channel)

    async def connected(self) -> bool:
        """Connect if the channel is not connected. Returns False if the worker is unreachable now.

        Takes at most ``connect_timeout_s``. Check this before a call. If it returns False, no
        request was sent. If a call fails, it is unknown whether the worker received the request.
        """
        while (state := self._channel.get_state(try_to_connect=True)) in (IDLE, CONNECTING):
            await self._channel.wait_for_state_change(state)
        return state is READY

    def prefill(self, request: worker_pb2.PrefillRequest, timeout_s: float) -> PrefillCall:
        return cast(PrefillCall, self._prefill.Prefill(request, timeout=timeout_s))

    def decode(self, request: worker_pb2.DecodeRequest, timeout_s: float) -> DecodeCall:
        return cast(DecodeCall, self._decode.Decode(request, timeout=timeout_s))

    async def release(self, key: worker_pb2.TransferKey, timeout_s: float) -> None:
        """Tell a prefill worker to drop the KV of one attempt.

        Raises:
            grpc.aio.AioRpcError: the call failed.
        """
        await self._prefill.Release(worker_pb2.ReleaseRequest(key=key), timeout=timeout_s)

    async def close(self) -> None:
        await self._channel.close()
