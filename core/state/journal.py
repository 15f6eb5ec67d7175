"""The journal's store. From it, a router continues the requests of a dead router.

    baton:{cluster}:journal:{request id}         hash: the request, its batches of tokens by number,
                                                 and the writer; expires ttl_s after the last change
    baton:{cluster}:journal:{request id}:lease   the writer; exists while the writer serves the
                                                 request; expires lease_s after the last change

The writer in the hash is a fence. A router that was paused while another one took the request finds
the other writer there and writes nothing. Every change is safe to repeat, as ``RedisClient``
requires.
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
    """The result of a change."""

    DONE = 1
    TAKEN = 0  # another writer has taken the request
    GONE = -1  # the store has no entry for the request any more


@dataclass(frozen=True, slots=True)
class Change:
    """One writer's change to one request's entry. It also renews the lease."""

    request_id: str
    writer: str  # new each time that a router begins to serve a request
    request: bytes | None = None  # starts a new entry, unless another writer holds the lease
    batches: Mapping[int, bytes] = field(default_factory=dict)  # encoded tokens, by batch number
    ends: bool = False  # releases the lease; the entry stays for ttl_s


@dataclass(frozen=True, slots=True)
class Stored:
    """An entry: the request and its batches of tokens, ordered by number."""

    request: bytes
    batches: tuple[bytes, ...]


class JournalStore(Protocol):
    """All methods except ``close`` raise UnavailableError when the store does not answer."""

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        """Apply the changes in order. Return the result of each."""

    async def take(self, request_id: str, writer: str) -> Stored | Written:
        """Make ``writer`` the writer of an entry and return the entry.

        Returns TAKEN if another writer serves the request, and GONE if the entry does not exist.
        """

    async def close(self) -> None:
        """Disconnect. Idempotent."""


# KEYS: entry, lease. ARGV: writer, lease in ms, ttl in ms, request or "", ends ("1" or "0"), then
# the number and the content of each batch. Returns a value of Written.
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
# KEYS: entry, lease. ARGV: writer, lease in ms, ttl in ms. Returns the hash or a value of Written.
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
    """A journal store inside one process, for tests. Its entries do not expire.

    Args:
        lease_s: time after which a request without a change may be taken by another writer.
        clock: returns seconds on any monotonic scale.
    """

    def __init__(self, *, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        # request id -> (writer, request, batches by number)
        self._entries: dict[str, tuple[str, bytes, dict[int, bytes]]] = {}
        self._leases: dict[str, tuple[str, float]] = {}  # request id -> (writer, end of lease)
        self.available = True  # False: every call fails, as if the store did not answer

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
        """Drop all entries and leases, as a restarted store does."""
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
    """The journal store of one cluster in Redis or Valkey.

    Args:
        url: address of the store, see ``RedisClient``.
        cluster: name of the cluster, which is part of every key.
        lease_s: time after which a request without a change may be taken by another writer.
        ttl_s: lifetime of an entry after its last change.
        socket_timeout_s: bound on one wait for the store, see ``RedisClient``.
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
