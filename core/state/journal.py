"""The journal of requests: what a router needs to go on where a dead one stopped.

    baton:{cluster}:journal:{request id}         hash: the request, its batches of tokens by number,
                                                 and who may write; expires ttl_s after the last one
    baton:{cluster}:journal:{request id}:lease   there while that router serves it

The writer's name in the hash is the fence: a router that was paused finds another one's there, and
writes nothing. Every change may run twice, as ``RedisClient`` demands.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.errors import UnavailableError
from core.state.redis import RedisClient

_REQUEST = b"request"
_WRITER = b"writer"


class Written(enum.IntEnum):
    """How a change ended."""

    DONE = 1
    TAKEN = 0  # another router has, or had, the request since
    GONE = -1  # the store has forgotten it


@dataclass(frozen=True, slots=True)
class Change:
    """One router's change to one request's entry; renews the lease."""

    request_id: str
    writer: str  # unique for each time that a router serves a request
    request: bytes | None = None  # begins an entry; TAKEN if another router serves this id
    batches: Mapping[int, bytes] = field(default_factory=dict)
    ends: bool = False  # gives the lease up; the entry stays for ttl_s


@dataclass(frozen=True, slots=True)
class Stored:
    """An entry: the request and its batches of tokens in order."""

    request: bytes
    batches: tuple[bytes, ...]


class JournalStore(Protocol):
    """Methods raise UnavailableError when the store does not answer."""

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        """Make the changes, in order."""

    async def take(self, request_id: str, writer: str) -> Stored | Written:
        """Become the writer. TAKEN if a router serves the request, GONE if there is no entry."""

    async def close(self) -> None:
        """Disconnect. Idempotent."""


# KEYS: entry, lease. ARGV: writer, lease and ttl in ms, request or "", ends, number, batch, ...
_WRITE = """
local entry, lease, writer = KEYS[1], KEYS[2], ARGV[1]
local serving = redis.call('GET', lease)
if ARGV[4] ~= '' then
  if serving and serving ~= writer then return 0 end
  redis.call('DEL', entry)
  redis.call('HSET', entry, 'writer', writer, 'request', ARGV[4])
else
  local known = redis.call('HGET', entry, 'writer')
  if not known then return -1 end
  if known ~= writer then return 0 end
end
for i = 6, #ARGV, 2 do redis.call('HSET', entry, ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', entry, ARGV[3])
if ARGV[5] == '1' then redis.call('DEL', lease)
else redis.call('SET', lease, writer, 'PX', ARGV[2]) end
return 1
"""
# KEYS: entry, lease. ARGV: writer, lease and ttl in ms.
_TAKE = """
local serving = redis.call('GET', KEYS[2])
if serving and serving ~= ARGV[1] then return 0 end
if redis.call('EXISTS', KEYS[1]) == 0 then return -1 end
redis.call('HSET', KEYS[1], 'writer', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return redis.call('HGETALL', KEYS[1])
"""


class MemoryJournal:
    """A store inside one process, for tests.

    Args:
        clock: seconds on any monotonic scale. Entries do not expire.
    """

    def __init__(self, *, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._entries: dict[str, tuple[str, bytes, dict[int, bytes]]] = {}  # writer first
        self._leases: dict[str, tuple[str, float]] = {}  # writer, end
        self.available = True  # False: every call fails, as when the store went away

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        """See ``JournalStore``."""
        self._check()
        return [self._write(change) for change in changes]

    async def take(self, request_id: str, writer: str) -> Stored | Written:
        """See ``JournalStore``."""
        self._check()
        if self._serving(request_id) not in (None, writer):
            return Written.TAKEN
        if request_id not in self._entries:
            return Written.GONE
        _, request, batches = self._entries[request_id]
        self._entries[request_id] = writer, request, batches
        self._leases[request_id] = writer, self._clock() + self._lease_s
        return Stored(request, tuple(batches[number] for number in sorted(batches)))

    async def close(self) -> None:
        """See ``JournalStore``."""

    def forget(self) -> None:
        """As a store that was started anew."""
        self._entries.clear()
        self._leases.clear()

    def _write(self, change: Change) -> Written:
        key = change.request_id
        if change.request is not None:
            if self._serving(key) not in (None, change.writer):
                return Written.TAKEN
            self._entries[key] = change.writer, change.request, {}
        elif key not in self._entries:
            return Written.GONE
        elif self._entries[key][0] != change.writer:
            return Written.TAKEN
        self._entries[key][2].update(change.batches)
        if change.ends:
            self._leases.pop(key, None)
        else:
            self._leases[key] = change.writer, self._clock() + self._lease_s
        return Written.DONE

    def _serving(self, request_id: str) -> str | None:
        writer, end_s = self._leases.get(request_id, (None, 0.0))
        return writer if end_s > self._clock() else None

    def _check(self) -> None:
        if not self.available:
            raise UnavailableError(
                "the journal does not answer", reason="REGISTRY_UNAVAILABLE", retry_after_s=1.0
            )


class RedisJournal:
    """See ``JournalStore``.

    Args:
        lease_s: how long a router that says nothing more keeps a request.
        ttl_s: how long an entry outlives its last change.
    """

    def __init__(
        self, url: str, *, cluster: str, lease_s: float, ttl_s: float, socket_timeout_s: float
    ) -> None:
        self._client = RedisClient(url, socket_timeout_s=socket_timeout_s)
        self._prefix = f"baton:{cluster}:journal:"
        self._lease_ms = round(lease_s * 1000)
        self._ttl_ms = round(ttl_s * 1000)

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        """See ``JournalStore``."""
        answers = await self._client.execute(
            *(
                (
                    *("EVAL", _WRITE, 2, *self._keys(change.request_id)),
                    *(change.writer, self._lease_ms, self._ttl_ms),
                    *(change.request or b"", int(change.ends)),
                    *(part for batch in change.batches.items() for part in batch),
                )
                for change in changes
            )
        )
        return [Written(answer) for answer in answers]

    async def take(self, request_id: str, writer: str) -> Stored | Written:
        """See ``JournalStore``."""
        (answer,) = await self._client.execute(
            ("EVAL", _TAKE, 2, *self._keys(request_id), writer, self._lease_ms, self._ttl_ms)
        )
        if isinstance(answer, int):
            return Written(answer)
        fields = dict(zip(answer[::2], answer[1::2], strict=True))
        numbers = sorted(int(name) for name in fields.keys() - {_REQUEST, _WRITER})
        return Stored(fields[_REQUEST], tuple(fields[b"%d" % number] for number in numbers))

    async def close(self) -> None:
        """See ``JournalStore``."""
        await self._client.close()

    def _keys(self, request_id: str) -> tuple[str, str]:
        entry = self._prefix + request_id
        return entry, entry + ":lease"
