"""The store in which the two ranks of a pair exchange addresses before their group exists.

torch reads the other rank's address from a store. Its own network store, TCPStore, serves whoever
connects. Here each rank keeps a copy, and the control connection, which only members of the cluster
can open, carries what the other rank sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.distributed import Store

from kv_transfer import wire
from kv_transfer.errors import PairError


class PairStore(Store):
    """One rank's copy. The thread that makes the pair uses it.

    Args:
        publish: sends a value to the other rank.
        receive: waits so many seconds at most for the next value that the other rank has published;
            returns None if none came. May raise PairError.
        timeout_s: bound on all waits for the other rank, counted from now. The shorter timeouts
            that gloo passes to ``wait`` are ignored.
    """

    def __init__(
        self,
        publish: Callable[[wire.Publish], None],
        receive: Callable[[float], wire.Publish | None],
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._publish = publish
        self._receive = receive
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = bytes(value)
        self._publish(wire.Publish(key, bytes(value)))

    def get(self, key: str) -> bytes:
        """Wait for a value. Raises PairError if it does not come in time."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], *_: object) -> None:
        """Wait for the values of all keys. Raises PairError if they do not come in time."""
        while not self.check(keys):
            value = self._receive(max(0.0, self._deadline_s - time.monotonic()))
            if value is None:
                raise PairError(f"the other rank has not joined within {self._timeout_s} s")
            self._values[value.key] = value.value

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)
