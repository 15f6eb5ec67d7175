"""Makes hostile input for servers: bytes, HTTP/2 frames, and messages with hostile fields.

Also checks that a process closes its files and sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

import psutil
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.support.waiting import until, wait_until

SEED = int(os.environ.get("BATON_FUZZ_SEED", random.SystemRandom().randrange(10**6)))
WITHIN_S = 20.0  # longest wait for an action that takes milliseconds on an idle machine
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


def dice(name: str) -> random.Random:
    """Print ``SEED``, and return the random number generator of the test ``name``.

    To repeat a failure, set the environment variable BATON_FUZZ_SEED to the printed seed.
    """
    print(f"BATON_FUZZ_SEED={SEED}")
    return random.Random(f"{SEED} {name}")


# ---- bytes ---------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


def _frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    """Return an HTTP/2 frame. ``length`` replaces the payload's length in the frame's header."""
    length = len(payload) if length is None else length
    return length.to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _literal(text: bytes) -> bytes:
    """Encode ``text``, at most 126 bytes, as an HPACK string (RFC 7541, 5.2)."""
    return bytes([len(text)]) + text


def garbage(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 9, 24, 100, 5000]))


def truncated_preface(rng: random.Random) -> bytes:
    return PREFACE[: rng.randrange(len(PREFACE))]


def random_frames(rng: random.Random) -> bytes:
    frames = [PREFACE, _SETTINGS]
    for _ in range(rng.randrange(1, 40)):
        payload = rng.randbytes(rng.choice([0, 1, 4, 8, 100]))
        stream = rng.choice([0, 1, 2, 3, 2**31 - 1, rng.getrandbits(32)])
        frames.append(_frame(rng.randrange(12), rng.getrandbits(8), stream, payload))
    return b"".join(frames)


def huge_length(rng: random.Random) -> bytes:
    kind = rng.randrange(10)
    return PREFACE + _SETTINGS + _frame(kind, 0, 1, rng.randbytes(50), length=2**24 - 1)


def hostile_call(path: bytes, *, sound: bool = False) -> Callable[[random.Random], bytes]:
    """Return a function that makes hostile calls.

    If ``sound``, the call is valid gRPC with this ``path``, but its message is random bytes.
    """

    def call(rng: random.Random) -> bytes:
        def pick(valid: bytes, *hostile: bytes) -> bytes:
            return valid if sound else rng.choice([valid, valid, *hostile])

        headers = {
            b":method": pick(b"POST", b"GET", b""),
            b":scheme": pick(b"http", b"file"),
            b":path": pick(path, b"/", b"", b"x/\0"),
            b":authority": b"x",
            b"content-type": pick(b"application/grpc", b"text/html"),
            b"te": b"trailers",
            b"grpc-timeout": pick(b"1S", b"0n", b"-1S", b"99999999H", b"x"),
            b"grpc-encoding": pick(b"identity", b"gzip", b"zip bomb"),
            b"x" * rng.randrange(1, 60): b"y",
        }
        block = b"".join(b"\0" + _literal(n) + _literal(v) for n, v in headers.items())
        message = rng.randbytes(rng.choice([0, 10, 200]))
        length = len(message) if sound else rng.choice([len(message), 2**32 - 1, 0])
        compressed = 0 if sound else rng.choice([0, 1, 255])
        data = bytes([compressed]) + length.to_bytes(4) + message
        end = 1 if sound else rng.choice([0, 1])
        return PREFACE + _SETTINGS + _frame(1, 4, 1, block) + _frame(0, end, 1, data)

    return call


def another_protocol(rng: random.Random) -> bytes:
    return rng.choice([
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),  # TLS ClientHello
        b"*1\r\n$4\r\nPING\r\n",
    ])  # fmt: skip


class Strangers:
    """Hostile TCP connections to one port. Some are held open until ``leave``."""

    def __init__(self, host: str, port: int, rng: random.Random) -> None:
        self._address = host, port
        self._rng = rng
        self._held: list[socket.socket] = []

    def come(self, payload: bytes) -> None:
        """Connect and send ``payload``. Then, at random, close, reset or hold the connection, or
        half-close it and wait until the server closes it."""
        connection = socket.create_connection(self._address, WITHIN_S)
        with contextlib.suppress(OSError):  # the server may close it early
            connection.sendall(payload)
        match self._rng.choice(["close", "reset", "half-close", "half-close", "stay"]):
            case "stay" if len(self._held) < 50:
                self._held.append(connection)
                return
            case "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            case "half-close":
                with contextlib.suppress(OSError):  # reset by the server
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
        connection.close()

    def come_and_stay(self, payload: bytes) -> None:
        """Connect, send ``payload`` and hold the connection."""
        self._held.append(socket.create_connection(self._address, WITHIN_S))
        with contextlib.suppress(OSError):
            self._held[-1].sendall(payload)

    def leave(self) -> None:
        """Close the connections that are held."""
        for connection in self._held:
            connection.close()

    async def storm(self, kinds: Sequence[Callable[[random.Random], bytes]], count: int) -> None:
        """Run ``storm_here`` in a thread, because the server may run in this event loop."""
        await asyncio.to_thread(self.storm_here, kinds, count)

    def storm_here(self, kinds: Sequence[Callable[[random.Random], bytes]], count: int) -> None:
        """Make ``count`` connections, each with a payload of a random kind."""
        for _ in range(count):
            self.come(self._rng.choice(kinds)(self._rng))


# ---- messages ------------------------------------------------------------------------------

_INTS = {
    FieldDescriptor.CPPTYPE_INT32: (0, 1, -1, 7, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2, 3, 21, 300, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 99, -1, 2**31 - 1),
}
_FLOATS = (0.0, -0.0, 0.5, 1.0, 2.0, 1e-45, 3.4e38, -1.0, math.nan, math.inf, -math.inf)
_COUNTS = (0, 1, 2, 17, 65, 3000)


def hostile_text(rng: random.Random) -> str:
    return rng.choice([
        "", "\0", "user", "tcp://127.0.0.1:1", "../../etc/passwd", "%s%n{}{0}\r\nx: y",
        "".join(chr(rng.randrange(32)) for _ in range(9)), "\u202e\u2028\ufffe\ufeff",
        "".join(chr(rng.choice([0x7F, 0x80, 0xD7FF, 0xE000, 0x10FFFF])) for _ in range(9)),
        "😀" * rng.choice([1, 300, 6000]), "x" * rng.choice([129, 9000, 60_000]),
    ])  # fmt: skip


def scramble(message: Message, rng: random.Random, share: float = 0.5) -> None:
    """Set about ``share`` of the fields to hostile values. Do the same in nested messages.

    In the elements of repeated fields, the share is 0.8.
    """
    for field in message.DESCRIPTOR.fields:
        if rng.random() > share:
            continue
        if field.is_repeated:
            values = getattr(message, field.name)
            count = rng.choice(_COUNTS) if field.message_type is None else rng.choice(_COUNTS[:4])
            if field.message_type is not None:
                for _ in range(count):
                    scramble(values.add(), rng, 0.8)
            elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
                values.extend(hostile_text(rng)[:1000] for _ in range(min(count, 65)))
            else:
                values.extend(_scalar(field, rng) for _ in range(count))
        elif field.message_type is not None:
            nested = getattr(message, field.name)
            nested.SetInParent()
            scramble(nested, rng, share)
        else:
            setattr(message, field.name, _scalar(field, rng))


def _scalar(field: Any, rng: random.Random) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return hostile_text(rng)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice(_FLOATS)
    return rng.choice(_INTS[field.cpp_type])


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` with some bytes replaced. The new bytes can be invalid UTF-8."""
    damage = bytearray(data or b"\0")
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(damage))
        piece = rng.choice([rng.randbytes(1), b"\xed\xa0\x80", b"\xff" * 9])
        damage[at : at + len(piece)] = piece
    return bytes(damage)


# ---- leaks ---------------------------------------------------------------------------------


class OpenFiles:
    """Checks that this process closes the files and sockets that it opens."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._at_first = self._process.num_fds()

    def _are_closed(self) -> bool:
        return bool(self._process.num_fds() <= self._at_first)

    def _describe(self) -> str:
        opened = self._process.num_fds() - self._at_first
        return f"{opened} files too many are open; sockets: {self._process.net_connections()}"

    async def until_as_at_first(self) -> None:
        """Wait until no more files are open than when this object was made."""
        try:
            await until(self._are_closed, what="all new files are closed", within_s=WITHIN_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self._describe()}") from None

    def wait_as_at_first(self) -> None:
        """Do the same as ``until_as_at_first``, in a test without an event loop."""
        try:
            wait_until(self._are_closed, what="all new files are closed", within_s=WITHIN_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self._describe()}") from None
