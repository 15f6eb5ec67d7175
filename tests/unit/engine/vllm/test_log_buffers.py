"""What an import of vLLM must not do to the process that it happens in."""

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
    """A logger as Ray Serve has one: a buffer before a file."""
    file = logging.FileHandler(tmp_path / "log")
    buffer = MemoryHandler(10, target=file)
    logger = logging.Logger("buffered")
    logger.addHandler(buffer)
    logging.root.manager.loggerDict["buffered"] = logger
    yield logger
    del logging.root.manager.loggerDict["buffered"]
    buffer.close()
    file.close()


def test_a_buffer_knows_its_file_after_logging_was_configured_anew(
    buffered: logging.Logger, tmp_path: Path
) -> None:
    (buffer,) = buffered.handlers
    assert isinstance(buffer, MemoryHandler)
    with log_buffers_kept():
        dictConfig({"version": 1, "disable_existing_loggers": False})
        assert buffer.target is None, "else there is no need to keep it"
    buffered.error("still here")
    assert (tmp_path / "log").read_text() == "still here\n"
