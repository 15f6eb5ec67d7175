"""What the autoscaler keeps in Redis: its policy, its memory, and what it shows.

    baton:{cluster}:policy           text that ``baton policy apply`` sent; empty: it was removed
    baton:{cluster}:autoscale:state  the autoscaler's memory, so that a restart causes no jump
    baton:{cluster}:autoscale:view   its latest decision, for ``status`` and ``explain``

The autoscaler renews the first two while it runs. They expire ``_KEPT_S`` after the cluster's end;
the start of a new cluster removes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.state.redis import RedisClient

_KEPT_S = 7 * 24 * 3600  # longer than an autoscaler may be away
# Replaces the policy, unless it has changed since it was read.
_SWAP = """
local now = redis.call('GET', KEYS[1])
if now == ARGV[1] or (not now and ARGV[1] == ARGV[4]) then
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
end
"""
_NONE = "-"  # no policy text


@dataclass(frozen=True, slots=True)
class Kept:
    """What the autoscaler goes on with. Each part is None if it is not there."""

    policy: str | None
    state: bytes | None


class AutoscaleStore:
    """The autoscaler's keys of one cluster, in Redis or Valkey.

    All methods except ``close`` raise UnavailableError when the store does not answer.

    Args:
        url: address of the store, see ``RedisClient``.
        cluster: name of the cluster, which is part of every key.
        view_s: lifetime of a view that is not renewed.
        socket_timeout_s: bound on one wait for the store, see ``RedisClient``.
    """

    def __init__(self, url: str, *, cluster: str, view_s: float, socket_timeout_s: float) -> None:
        self._client = RedisClient(url, socket_timeout_s=socket_timeout_s)
        self._policy = f"baton:{cluster}:policy"
        self._state = f"baton:{cluster}:autoscale:state"
        self._view = f"baton:{cluster}:autoscale:view"
        self._view_ms = round(view_s * 1000)

    async def read(self) -> Kept:
        """Return the policy and the autoscaler's memory."""
        ((policy, state),) = await self._client.execute(("MGET", self._policy, self._state))
        return Kept(None if policy is None else policy.decode(errors="replace"), state)

    async def read_view(self) -> bytes | None:
        """Return the view; None if there is none."""
        view: bytes | None
        (view,) = await self._client.execute(("GET", self._view))
        return view

    async def write(self, state: bytes, view: bytes) -> None:
        """Keep the autoscaler's memory and view, and renew the policy."""
        await self._client.execute(
            ("SET", self._state, state, "EX", _KEPT_S),
            ("SET", self._view, view, "PX", self._view_ms),
            ("EXPIRE", self._policy, _KEPT_S),
        )

    async def write_state(self, state: bytes) -> None:
        """Keep the autoscaler's memory alone."""
        await self._client.execute(("SET", self._state, state, "EX", _KEPT_S))

    async def restore_policy(self, found: str | None, text: str) -> None:
        """Put ``text`` in place of ``found``, unless another one was applied meanwhile."""
        old = _NONE if found is None else found
        await self._client.execute(("EVAL", _SWAP, 1, self._policy, old, text, _KEPT_S, _NONE))

    async def apply_policy(self, text: str) -> None:
        """Replace the policy. The autoscaler takes it at its next step."""
        await self._client.execute(("SET", self._policy, text, "EX", _KEPT_S))

    async def remove_policy(self) -> None:
        """Go on without a policy: each pool keeps its number of workers."""
        await self._client.execute(("SET", self._policy, "", "EX", _KEPT_S))

    async def forget(self) -> None:
        """Remove what an earlier cluster of this name left."""
        await self._client.execute(("DEL", self._policy, self._state, self._view))

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        await self._client.close()
