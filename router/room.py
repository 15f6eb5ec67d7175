"""Says why a request must wait: which pools have no room for it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from core.types import Need, Pool


@dataclass(frozen=True, slots=True)
class NoRoom:
    """The request can run later, when workers of these pools have room."""

    pools: frozenset[Pool]  # at least one
    empty: frozenset[Pool] = frozenset()  # those of them that have no usable worker

    @property
    def need(self) -> Need:
        """What the request waits for."""
        return Need.BOTH if len(self.pools) > 1 else Need(*self.pools)
