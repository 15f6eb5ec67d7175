"""Keeps the targets of the log buffers in the process that hosts an engine.

vLLM configures logging when it is imported and again with its first engine. Python then closes all
existing handlers. A file handler opens its file again with the next line, but a buffer
(MemoryHandler) has lost its target and then grows without bound. Ray Serve needs the target, too:
when Ray Serve's controller starts, it asks each replica for the replica's log file. If a replica's
buffer has no target, the controller treats this replica as broken and ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler


@contextmanager
def log_buffers_kept() -> Iterator[None]:
    """Restore the targets of all log buffers after a block that configures logging."""
    targets = {
        handler: handler.target
        for logger in (logging.root, *logging.root.manager.loggerDict.values())
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, MemoryHandler)
    }
    try:
        yield
    finally:
        for handler, target in targets.items():
            handler.setTarget(target)
