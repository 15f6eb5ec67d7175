"""The journal's store. From it, a router continues the requests of a dead router.

    baton:{cluster}:journal:{request id}         string: writer, resume token, then the content;
                                                 expires ttl_s after the last change
    baton:{cluster}:journal-lease:{request id}   the writer; exists while the writer serves the
                                                 request; expires lease_s after the last change
    baton:{cluster}:journal-expiry               sorted set: request ids by the time of expiry
    baton:{cluster}:journal-complete             the same, of complete requests only
    baton:{cluster}:journal-bytes                hash: the memory of each entry, and the total

An entry can be taken only with its token. The writer in an entry is a fence. A router that was
paused while another one took the request finds the other writer there and writes nothing. Every
change is safe to repeat, as ``RedisClient`` requires.

The entries of one cluster share a budget of memory. A change that does not fit first drops the
entries of complete requests, the oldest first. If it still does not fit, its own entry is dropped.
"""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.errors import UnavailableError
from core.state.redis import RedisClient

WRITER_CHARS = 32  # length of a writer's id; a fixed length separates it from what follows
TOKEN_CHARS = 32  # length of a resume token, likewise

# Upper bound on the memory of an entry's keys and of its places in the three indexes, in bytes.
_ENTRY_BYTES = 1536
# A server reserves up to twice the length of a string that grows, and its allocator a quarter more.
_CONTENT_FACTOR = 2.5
_TAKES_AT_A_TIME = 3  # fewer than the connections of a client, so that further ones wait


def memory_bytes(content_bytes: int) -> int:
    """Return an upper bound on a server's memory for an entry with so much content."""
    return _ENTRY_BYTES + math.ceil(_CONTENT_FACTOR * content_bytes)


class Written(enum.IntEnum):
    """The result of a change."""

    DONE = 1
    TAKEN = 0  # another writer has taken the request
    GONE = -1  # the store has no such entry, or lacks content before the change
    FULL = -2  # the entry did not fit into the budget and was dropped


class Mode(enum.Enum):
    """What a change does to the content of an entry."""

    BEGIN = "begin"  # starts an entry; replaces one that no writer serves
    RESTORE = "restore"  # writes the whole content again, after the store may have lost it
    APPEND = "append"  # adds to the content


class After(enum.Enum):
    """Who may take the entry after a change."""

    SERVED = "served"  # nobody: the change renews the writer's lease
    RELEASED = "released"  # any writer
    COMPLETE = "complete"  # any writer, but the request has ended, so the entry is dropped first


@dataclass(frozen=True, slots=True)
class Change:
    """One writer's change to one request's entry."""

    request_id: str
    writer: str  # new each time that a router begins to serve a request; WRITER_CHARS long
    token: str  # the request's resume token; TOKEN_CHARS long
    data: bytes = b""
    offset: int = 0  # where ``data`` begins in the content
    mode: Mode = Mode.APPEND
    after: After = After.SERVED


class JournalStore(Protocol):
    """All methods except ``close`` raise UnavailableError when the store does not answer."""

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        """Apply the changes in order. Return the result of each."""

    async def take(self, request_id: str, writer: str, token: str) -> bytes | Written:
        """Make ``writer`` the writer of an entry and return the entry's content.

        Returns TAKEN if another writer serves the request, and GONE if there is no entry with this
        token.
        """

    async def close(self) -> None:
        """Disconnect. Idempotent."""


# KEYS: expiry, complete, bytes, then entry and lease of each change. ARGV: lease in ms, ttl in ms,
# budget in bytes, then request id, writer, token, mode, after, offset and data of each change.
# Returns a value of Written for each change.
_WRITE = f"""
local expiry, complete, bytes = KEYS[1], KEYS[2], KEYS[3]
local lease_ms, ttl_ms, budget = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local header = {WRITER_CHARS + TOKEN_CHARS}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function account(id, size)
  local change = size - tonumber(redis.call('HGET', bytes, id) or 0)
  if size == 0 then redis.call('HDEL', bytes, id) else redis.call('HSET', bytes, id, size) end
  return redis.call('HINCRBY', bytes, '', change)
end
local function forget(id)
  redis.call('ZREM', expiry, id)
  redis.call('ZREM', complete, id)
  return account(id, 0)
end
local function write(entry, lease, id, writer, token, mode, after, offset, data)
  local known = redis.call('GETRANGE', entry, 0, {WRITER_CHARS - 1})
  local known_token = redis.call('GETRANGE', entry, {WRITER_CHARS}, header - 1)
  local length = redis.call('STRLEN', entry) - header
  if mode == 'begin' then
    local serving = redis.call('GET', lease)
    if serving and serving ~= writer then return {Written.TAKEN.value} end
    -- Another router has resumed this very request, and this change comes late.
    if known ~= writer and known_token == token then return {Written.TAKEN.value} end
  elseif known ~= '' and known ~= writer then return {Written.TAKEN.value}
  elseif mode == 'append' and (known == '' or offset > length) then return {Written.GONE.value} end

  if known ~= writer then length = 0 end
  redis.call('ZREM', complete, id)
  local size = math.ceil({_CONTENT_FACTOR} * math.max(length, offset + #data))
  local total = account(id, {_ENTRY_BYTES} + size)
  while total > budget do
    local oldest = redis.call('ZRANGE', complete, 0, 0)[1]
    if not oldest then
      redis.call('DEL', entry, lease)
      forget(id)
      return {Written.FULL.value}
    end
    redis.call('DEL', string.sub(entry, 1, #entry - #id) .. oldest)
    total = forget(oldest)
  end

  -- The content of one writer only grows, so a repeated change never makes it shorter.
  if known == writer then redis.call('SETRANGE', entry, header + offset, data)
  else redis.call('SET', entry, writer .. token .. data) end
  redis.call('PEXPIRE', entry, ttl_ms)
  redis.call('ZADD', expiry, now + ttl_ms, id)
  if after == 'complete' then redis.call('ZADD', complete, now + ttl_ms, id) end
  if after == 'served' then redis.call('SET', lease, writer, 'PX', lease_ms)
  else redis.call('DEL', lease) end
  return {Written.DONE.value}
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', expiry, '-inf', now, 'LIMIT', 0, 1000)) do
  forget(id)
end
local answers = {{}}
for i = 1, (#KEYS - 3) / 2 do
  local key, arg = 2 + 2 * i, 7 * i - 3
  answers[i] = write(KEYS[key], KEYS[key + 1], ARGV[arg], ARGV[arg + 1], ARGV[arg + 2],
                     ARGV[arg + 3], ARGV[arg + 4], tonumber(ARGV[arg + 5]), ARGV[arg + 6])
end
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], 2 * ttl_ms) end
return answers
"""
# KEYS: entry, lease, complete. ARGV: request id, writer, lease in ms, token. Returns the content,
# or a value of Written. The time of expiry stays the same.
_TAKE = f"""
local token = redis.call('GETRANGE', KEYS[1], {WRITER_CHARS}, {WRITER_CHARS + TOKEN_CHARS - 1})
if token == '' or token ~= ARGV[4] then return {Written.GONE.value} end
local serving = redis.call('GET', KEYS[2])
if serving and serving ~= ARGV[2] then return {Written.TAKEN.value} end
redis.call('SETRANGE', KEYS[1], 0, ARGV[2])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return redis.call('GETRANGE', KEYS[1], {WRITER_CHARS + TOKEN_CHARS}, -1)
"""


@dataclass(slots=True)
class MemoryEntry:
    """An entry of a ``MemoryJournal``."""

    writer: str
    token: str
    content: bytearray = field(default_factory=bytearray)
    is_complete: bool = False


class MemoryJournal:
    """A journal store inside one process, for tests. Its entries do not expire.

    Args:
        lease_s: time after which a request without a change may be taken by another writer.
        budget_bytes: memory that all entries may take, counted as ``RedisJournal`` counts it.
        clock: returns seconds on any monotonic scale.
    """

    def __init__(
        self,
        *,
        lease_s: float,
        budget_bytes: int = 2**30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_s = lease_s
        self._budget_bytes = budget_bytes
        self._clock = clock
        self.entries: dict[str, MemoryEntry] = {}  # by request id; the latest change last
        self._leases: dict[str, tuple[str, float]] = {}  # request id -> (writer, end of lease)
        self.available = True  # False: every call fails, as if the store did not answer

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        """See ``JournalStore``."""
        self._check()
        return [self._write(change) for change in changes]

    async def take(self, request_id: str, writer: str, token: str) -> bytes | Written:
        """See ``JournalStore``."""
        self._check()
        entry = self.entries.get(request_id)
        if entry is None or entry.token != token:
            return Written.GONE
        if self._serving(request_id) not in (None, writer):
            return Written.TAKEN
        entry.writer, entry.is_complete = writer, False
        self._leases[request_id] = writer, self._clock() + self._lease_s
        return bytes(entry.content)

    async def close(self) -> None:
        """See ``JournalStore``."""

    def forget(self) -> None:
        """Drop all entries and leases, as a restarted store does."""
        self.entries.clear()
        self._leases.clear()

    def _write(self, change: Change) -> Written:
        key = change.request_id
        entry = self.entries.get(key)
        if change.mode is Mode.BEGIN:
            if self._serving(key) not in (None, change.writer):
                return Written.TAKEN
            if entry is not None and entry.writer != change.writer and entry.token == change.token:
                return Written.TAKEN
        elif entry is not None and entry.writer != change.writer:
            return Written.TAKEN
        elif change.mode is Mode.APPEND and (entry is None or change.offset > len(entry.content)):
            return Written.GONE
        if entry is None or entry.writer != change.writer:
            entry = MemoryEntry(change.writer, change.token)
        entry.content[change.offset : change.offset + len(change.data)] = change.data
        entry.is_complete = False
        self.entries.pop(key, None)
        self.entries[key] = entry
        while self._memory_bytes() > self._budget_bytes:
            complete = (name for name, each in self.entries.items() if each.is_complete)
            if (oldest := next(complete, None)) is None:
                self.entries.pop(key)
                self._leases.pop(key, None)
                return Written.FULL
            self.entries.pop(oldest)
        entry.is_complete = change.after is After.COMPLETE
        if change.after is After.SERVED:
            self._leases[key] = change.writer, self._clock() + self._lease_s
        else:
            self._leases.pop(key, None)
        return Written.DONE

    def _memory_bytes(self) -> int:
        return sum(memory_bytes(len(entry.content)) for entry in self.entries.values())

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
        budget_bytes: memory of the server that all entries of the cluster may take.
        socket_timeout_s: bound on one wait for the store, see ``RedisClient``.
    """

    def __init__(
        self,
        url: str,
        *,
        cluster: str,
        lease_s: float,
        ttl_s: float,
        budget_bytes: int,
        socket_timeout_s: float,
    ) -> None:
        self._client = RedisClient(url, socket_timeout_s=socket_timeout_s)
        # Apart, so that many resumes at the same time take no connection from the writes.
        self._take_client = RedisClient(url, socket_timeout_s=socket_timeout_s)
        self._take_slots = asyncio.Semaphore(_TAKES_AT_A_TIME)
        self._prefix = f"baton:{cluster}:journal"
        self._lease_ms = round(lease_s * 1000)
        self._ttl_ms = round(ttl_s * 1000)
        self._budget_bytes = budget_bytes

    async def write(self, changes: Sequence[Change]) -> list[Written]:
        """See ``JournalStore``."""
        keys = [f"{self._prefix}-{name}" for name in ("expiry", "complete", "bytes")]
        arguments: list[str | bytes | int] = [self._lease_ms, self._ttl_ms, self._budget_bytes]
        for change in changes:
            keys += self._keys(change.request_id)
            arguments += (change.request_id, change.writer, change.token)
            arguments += (change.mode.value, change.after.value, change.offset, change.data)
        (answers,) = await self._client.execute(("EVAL", _WRITE, len(keys), *keys, *arguments))
        return [Written(answer) for answer in answers]

    async def take(self, request_id: str, writer: str, token: str) -> bytes | Written:
        """See ``JournalStore``."""
        keys = *self._keys(request_id), f"{self._prefix}-complete"
        async with self._take_slots:
            (answer,) = await self._take_client.execute(
                ("EVAL", _TAKE, 3, *keys, request_id, writer, self._lease_ms, token)
            )
        return Written(answer) if isinstance(answer, int) else bytes(answer)

    async def close(self) -> None:
        """See ``JournalStore``."""
        await self._client.close()
        await self._take_client.close()

    def _keys(self, request_id: str) -> tuple[str, str]:
        return f"{self._prefix}:{request_id}", f"{self._prefix}-lease:{request_id}"
