"""A gRPC call whose deadline has passed."""

from __future__ import annotations

import grpc


class Expired:
    """The context of a call whose deadline has passed before its handler starts."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None

    def time_remaining(self) -> float:
        return 0.0

    async def abort(self, code: grpc.StatusCode, *_: object) -> None:
        self.code = code
        raise grpc.aio.AbortError
