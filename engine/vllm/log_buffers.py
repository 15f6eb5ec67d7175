"""Keeps the log buffers of the process that hosts an engine.

vLLM configures logging, as it is imported and with its first engine, and Python then closes all
handlers there are. A file opens again with the next line, but a buffer has forgotten whose it was:
it grows for ever, and Ray Serve's controller, which on its start asks each replica where it logs,
takes the replica for broken and ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler


@contextmanager
def log_buffers_kept() -> Iterator[None]:
    """Whatever configures logging in the block, log buffers still write to where they did."""
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
