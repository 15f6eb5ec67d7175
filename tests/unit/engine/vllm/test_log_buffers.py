"""Log buffers keep their targets when logging is configured again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from logging.config import dictConfig
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from engine.vllm.log_buffers import log_buffers_kept


@pytest.fixture
def buffered(tmp_path: Path) -> Iterator[logging.Logger]:
    """Yield a logger like Ray Serve's, with a buffer in front of a file."""
    file = logging.FileHandler(tmp_path / "log")
    buffer = MemoryHandler(10, target=file)
    logger = logging.Logger("buffered")
    logger.addHandler(buffer)
    logging.root.manager.loggerDict["buffered"] = logger
    yield logger
    del logging.root.manager.loggerDict["buffered"]
    buffer.close()
    file.close()


def test_a_buffer_keeps_its_file_when_logging_is_configured_again(
    buffered: logging.Logger, tmp_path: Path
) -> None:
    (buffer,) = buffered.handlers
    assert isinstance(buffer, MemoryHandler)
    with log_buffers_kept():
        dictConfig({"version": 1, "disable_existing_loggers": False})
        assert buffer.target is None, "dictConfig closes the buffer"
    buffered.error("a line")
    assert (tmp_path / "log").read_text() == "a line\n"
