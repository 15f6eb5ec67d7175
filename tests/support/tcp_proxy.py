"""A TCP proxy whose connections can be slowed, held and cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_CHUNK_BYTES = 8 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


class Link:
    """Forwards connections from its own port to one target. Belongs to one event loop."""

    def __init__(self, target: tuple[str, int], *, once: bool = False) -> None:
        """With ``once``, the link accepts only one connection."""
        self.delay_s = 0.0  # wait before each chunk of data is forwarded
        self.bytes_per_s = float("inf")
        self._target = target
        self._once = once
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> int:
        """Listen on a free port and return the port."""
        self._server = await asyncio.start_server(self._carry, host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def connections(self) -> int:
        return len(self._connections)

    def hold(self) -> None:
        """Stop forwarding data. Connections stay open."""
        self._flowing.clear()

    def clear(self) -> None:
        """Stop holding and slowing data. Only a chunk whose delay has begun stays delayed."""
        self.delay_s, self.bytes_per_s = 0.0, float("inf")
        self._flowing.set()

    def cut(self, at_most: int | None = None) -> int:
        """Reset open connections at both ends: all, or at most ``at_most``. Return their number."""
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
            pass  # the target does not listen
        finally:
            self._connections.discard(this)
            for end in ends:
                end.close()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Copy until the source ends, then close the target. This also ends the other direction."""
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                await self._flowing.wait()
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
    """Wait for a delay or for the pace of a load. Do not use this to wait for a condition."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.get_running_loop().create_future()
