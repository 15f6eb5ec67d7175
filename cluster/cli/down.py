"""``baton down``: asks the launcher to stop and kills what does not stop in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.local import reaper
from cluster.local.run_dir import ClusterState, is_held, read_state
from core.errors import ConfigError, InternalError

_STOP_MARGIN_S = 7.0  # for Ray, Valkey and the reaper to end after the grace period
_KILL_TIMEOUT_S = 15.0  # SIGKILL works immediately, but the reaper may need 10 s
_POLL_S = 0.05  # nobody notices such a short delay


def take_down(base: Path, name: str, progress: Callable[[str], None]) -> None:
    """Stop the cluster ``name`` and return when nothing of it is left.

    The launcher gets SIGTERM first. If the name is still locked some seconds after the grace
    period, the launcher gets SIGKILL.

    Raises:
        ConfigError: no cluster of this name runs, or its state file cannot be read.
        InternalError: the launcher, its reaper or a process of the cluster does not end.
    """
    state = read_state(base, name)
    if state is None and not is_held(base, name):
        raise ConfigError(f"no cluster named {name!r} is running")
    if state is not None and state.launcher_lives():
        progress(f"stopping {name} (pid {state.pid})")
        _send(state, signal.SIGTERM)
        if not _wait_until_free(base, name, state.stop_grace_s + _STOP_MARGIN_S):
            progress("it did not stop in time; killing it")
            _send(state, signal.SIGKILL)
    if not _wait_until_free(base, name, _KILL_TIMEOUT_S):
        raise InternalError(f"the cluster {name!r} does not stop; its folder is {base / name}")
    if state is not None and (base / name).exists():  # launcher and reaper were both killed
        reaper.reap(state.cluster_id, [Path(folder) for folder in state.folders])
    if state is not None and reaper.find(state.cluster_id):
        raise InternalError(f"some processes of the cluster {name!r} could not be killed")
    progress(f"{name} is down")


def _send(state: ClusterState, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(state.pid)
        try:
            if state.launcher_lives():  # the pid may belong to a new process by now
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def _wait_until_free(base: Path, name: str, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while is_held(base, name):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True
