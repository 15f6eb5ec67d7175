"""The workers as Ray Serve knows them: one Serve application for each worker.

Serve itself would choose which replica of a deployment leaves, and may race a worker that drains.
With an application of its own, a worker is added and removed by name.
"""

from __future__ import annotations

import enum
import re
import secrets
from dataclasses import dataclass
from typing import Protocol

from core.types import Pool

_NAME = re.compile(rf"(?P<main>.+)-(?P<pool>{'|'.join(Pool)})-(?P<slot>\d+)-[0-9a-f]{{6}}")


class AppState(enum.Enum):
    UNPLACED = "unplaced"  # Ray has found no node with room for it for some time
    STARTING = "starting"
    RUNNING = "running"
    LEAVING = "leaving"
    FAILED = "failed"  # it could not start; Serve does not try again


@dataclass(frozen=True, slots=True)
class WorkerApp:
    """The Serve application of one worker."""

    name: str
    pool: Pool  # of its process at start; a worker that changed its role says so in the registry
    slot: int  # number among the pool's workers, from 0; selects CPU cores
    state: AppState
    message: str = ""  # Serve's, if something is wrong


class WorkerApps(Protocol):
    """Starts and stops workers. All methods raise UnavailableError if Serve does not answer."""

    async def list(self) -> tuple[WorkerApp, ...]:
        """Return all workers whose processes may still run."""

    async def add(self, pool: Pool, slot: int) -> str:
        """Start a worker in the background, and return its name."""

    async def remove(self, name: str) -> None:
        """Drain and end a worker in the background. An unknown name is not an error."""


def new_name(main_app: str, pool: Pool, slot: int) -> str:
    """Return a name for a new worker. It carries what must be known before the worker answers."""
    return f"{main_app}-{pool}-{slot}-{secrets.token_hex(3)}"


def parse_name(name: str) -> tuple[str, Pool, int] | None:
    """Return main application, pool and slot from a worker's name; None for other names."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match["main"], Pool(match["pool"]), int(match["slot"]))


def free_slot(apps: tuple[WorkerApp, ...], pool: Pool) -> int:
    """Return the lowest slot of the pool that no worker has, also no leaving one."""
    taken = {app.slot for app in apps if app.pool is pool}
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)
