"""Errors that several parts of the router raise."""

from __future__ import annotations

from core.errors import UnavailableError
from core.types import Pool

# If a worker was paused and lost its lease, it is back after one renewal, within a second. A worker
# that is starting takes longer, and the client will try again.
RETRY_AFTER_S = 1.0


def no_worker_error(pool: Pool, detail: str) -> UnavailableError:
    """Return the error of a request that needs a pool without a usable worker."""
    return UnavailableError(
        f"no {pool} worker can take the request ({detail})",
        reason=f"NO_{pool.upper()}_WORKER",
        retry_after_s=RETRY_AFTER_S,
    )
