"""A call that is late."""

from __future__ import annotations

import grpc


class Expired:
    """gRPC's context of a call that lay unread until its deadline had passed."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None

    def time_remaining(self) -> float:
        return 0.0

    async def abort(self, code: grpc.StatusCode, *_: object) -> None:
        self.code = code
        raise grpc.aio.AbortError
