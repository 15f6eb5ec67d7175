"""Makes a worker's KV pairs with the other pool's workers before requests need them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Set
from typing import Final, NoReturn

from core.errors import UnavailableError
from core.types import Pool
from engine.protocol import Engine
from worker.peers import Peers

_POLL_S: Final = 0.05  # short compared with a start

_log = logging.getLogger(__name__)


class Pairing:
    """Belongs to one event loop. ``peers`` knows the worker's current pool.

    Args:
        name: of the worker, for the log.
        timeout_s: longest wait for the pairs of a worker that is not ready yet.
        renew_s: time between two reads of the registry once the worker is ready.
    """

    def __init__(
        self, name: str, engine: Engine, peers: Peers, *, timeout_s: float, renew_s: float
    ) -> None:
        self._name = name
        self._engine = engine
        self._peers = peers
        self._timeout_s = timeout_s
        self._renew_s = renew_s

    async def make(self) -> None:
        """Wait for the pairs with all workers of the other pool, at most ``timeout_s``.

        The registry must list this worker, so that the other pool finds it. Later requests make
        the pairs that are missing at the end.
        """
        missing: Set[str] = set()
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    others = await self._peers.refresh()
                    missing = await self._engine.pair_up(others, self._peers.pool)
                    if not missing:
                        return
                    await asyncio.sleep(_POLL_S)
        except UnavailableError as error:
            _log.warning("%s could not make KV pairs in advance: %s", self._name, error)
        except TimeoutError:
            _log.warning(
                "%s made no KV pair with %s within %.1f s",
                self._name,
                sorted(missing),
                self._timeout_s,
            )

    async def keep(self) -> NoReturn:
        """While this is a decode worker, make pairs with prefill workers that start later.

        Their start waits for the pairs. If a prefill worker leaves and returns, its pair is made
        again.
        """
        paired: Set[str] = set()
        while True:
            if self._peers.pool is Pool.DECODE:
                with contextlib.suppress(UnavailableError):  # the lease's renewal logs it
                    others = await self._peers.refresh()
                    if others.keys() != paired:
                        await self._engine.pair_up(others, Pool.DECODE)
                    paired = others.keys()
            else:
                paired = set()
            await asyncio.sleep(self._renew_s)
