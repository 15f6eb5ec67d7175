"""A TCP link with weather: connections that pass through can be slowed, held up and cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_CHUNK_BYTES = 8 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


class Link:
    """Carries connections from a port of its own to one target; for one event loop."""

    def __init__(self, target: tuple[str, int], *, once: bool = False) -> None:
        """``once``: the first connection is the last."""
        self.delay_s = 0.0  # each piece of data arrives so much later
        self.bytes_per_s = float("inf")
        self._target = target
        self._once = once
        self._calm = asyncio.Event()
        self._calm.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> int:
        """The port that leads to the target."""
        self._server = await asyncio.start_server(self._carry, host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def connections(self) -> int:
        return len(self._connections)

    def hold(self) -> None:
        """Carry nothing from now on; connections stay open."""
        self._calm.clear()

    def clear(self) -> None:
        """Fine weather again; what was held is carried."""
        self.delay_s, self.bytes_per_s = 0.0, float("inf")
        self._calm.set()

    def cut(self, at_most: int | None = None) -> int:
        """Reset open connections at both ends, or some of them; returns how many."""
        connections = list(self._connections)[:at_most]
        for connection in connections:
            connection.cancel()
        return len(connections)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _carry(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        this = asyncio.current_task()
        assert this is not None
        assert self._server is not None
        self._connections.add(this)
        if self._once:
            self._server.close()
        ends = [near_out]
        try:
            far, far_out = await asyncio.open_connection(*self._target)
            ends.append(far_out)
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._pump(near, far_out))
                directions.create_task(self._pump(far, near_out))
        except asyncio.CancelledError:
            for end in ends:
                _reset(end)
        except OSError:
            pass  # nobody listens at the target
        finally:
            self._connections.discard(this)
            for end in ends:
                end.close()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Until the source ends; then so does the target, which ends the other direction."""
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                await self._calm.wait()
                if pace_s := self.delay_s + len(data) / self.bytes_per_s:
                    await time_passes(pace_s)
                target.write(data)
                await target.drain()
        target.close()


def _reset(end: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        raw: socket.socket = end.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.transport.abort()


async def time_passes(seconds: float) -> None:
    """The weather itself, and whatever else a load does at its own pace: no wait for something."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.get_running_loop().create_future()
