"""Saves the ends of the workers' logs when a start fails, because the run folder is removed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_LINES_PER_FILE = 200  # a traceback of vLLM has about 100


def keep_logs(name: str, logs: Sequence[Path]) -> Path:
    """Copy the last lines of each log (200 at most) into one file and return its path.

    The file is $XDG_STATE_HOME/baton/<name>-failure.log. Without this variable, the file is in
    ~/.local/state/baton. The next failure of a cluster of this name replaces the file.

    Raises:
        OSError: the file cannot be written, or a log cannot be read.
        RuntimeError: this user has no home folder.
    """
    base = os.environ.get("XDG_STATE_HOME")
    folder = (Path(base) if base else Path.home() / ".local" / "state") / "baton"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = folder / f"{name}-failure.log"
    parts = []
    for log in logs:
        lines = log.read_text(errors="replace").splitlines()[-_LINES_PER_FILE:]
        if lines:
            parts.append("\n".join([f"==> {log.name}", *lines, ""]))
    kept.write_text("\n".join(parts))
    return kept
