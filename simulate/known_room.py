"""Remembers which sizes of requests have room, to save most calls of the placement.

While many requests wait, each one asks again and again. By ``router.placement.policy``, a pool that
has no room for one request has none for a larger one, until room is freed. A pool that has room for
a request has room for a smaller one, until room is taken. All requests here need both pools.
"""

from __future__ import annotations

from collections.abc import Mapping

from core.types import Pool
from router.room import NoRoom


class KnownRoom:
    """What the placement's answers say of other requests.

    Sizes are in tokens: of the prompt for prefill, and of the KV at the request's end for decode.
    """

    def __init__(self) -> None:
        self._without: dict[Pool, int] = {}  # the smallest size for which a pool has no room
        self._with: dict[Pool, int] = {}  # the largest size for which it has room
        self._empty: frozenset[Pool] = frozenset()

    def freed(self) -> None:
        """Note that workers may have more room than before, or that others are usable."""
        self._without.clear()
        self._with.clear()

    def taken(self) -> None:
        """Note that a request took room."""
        self._with.clear()

    def note(self, sizes: Mapping[Pool, int], answer: NoRoom) -> None:
        """Note the placement's answer for a request of these sizes."""
        self._empty = answer.empty
        for pool, size in sizes.items():
            if pool in answer.pools:
                self._without[pool] = min(size, self._without.get(pool, size))
            else:
                self._with[pool] = max(size, self._with.get(pool, size))

    def answer(self, sizes: Mapping[Pool, int]) -> NoRoom | None:
        """Return what the placement would say; None: there is room, or that is not known."""
        full = {pool for pool, least in self._without.items() if sizes[pool] >= least}
        for pool, size in sizes.items():
            if pool not in full and size > self._with.get(pool, -1):
                return None
        return NoRoom(frozenset(full), self._empty) if full else None
