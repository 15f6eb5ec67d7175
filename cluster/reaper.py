"""Ends whatever a cluster leaves behind, however its launcher ended.

    launcher ──starts first──▶ reaper          (own session; holds the run folder's lock)
        └─────── pipe ───────────┘  closes with the launcher, even on kill -9

When the pipe closes, the reaper kills every process that carries the cluster's id in its
environment, and all their descendants, then removes the cluster's folders and the shared
memory that its processes had open. Each process of a cluster inherits the id from the
launcher, which itself does not carry it.

The file runs as a script with nothing but the standard library (``python -I -S``), so that
it costs little memory and cannot fail for a reason that failed the cluster.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

CLUSTER_ID_VARIABLE = "BATON_CLUSTER_ID"

KILL_TIMEOUT_S = 10.0  # SIGKILL works at once, but for processes stuck in a driver
_POLL_S = 0.02
_WATCH_S = 1.0  # between two looks at /dev/shm while the cluster lives
_WATCH_TRIES = 5  # looks at a new segment until it counts as somebody else's
_SHM = "/dev/shm/"


class Reaper:
    """The launcher's end of the pipe.

    Args:
        cluster_id: value of ``BATON_CLUSTER_ID``.
        folders: removed at the end.
        lock_file: removed last.
        lock_fd: keeps the lock held until the reaper is done.
    """

    def __init__(
        self, cluster_id: str, folders: Sequence[Path], lock_file: Path, lock_fd: int
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if k != CLUSTER_ID_VARIABLE}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, cluster_id, lock_file, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock_fd,),
            start_new_session=True,
            env=environment,
        )

    def finish(self) -> bool:
        """Close the pipe and wait until all is gone. False if something resisted."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(KILL_TIMEOUT_S * 2) == 0


class SharedMemoryWatch:
    """Remembers which segments in /dev/shm a cluster's processes have had open.

    A worker that is killed leaves its segments behind, and afterwards nothing says whose they
    were: so new ones are looked at while their owners live, and go when the last owner has gone.
    """

    def __init__(self, cluster_id: str) -> None:
        self._cluster_id = cluster_id
        self._owners: dict[str, set[int]] = {}
        self._unclaimed: dict[str, int] = {}  # looks without an owner

    def look(self) -> None:
        """Find the owners of new segments, remove those whose owners are all gone."""
        present = {_SHM + name for name in os.listdir(_SHM)}
        self._unclaimed = {path: n for path, n in self._unclaimed.items() if path in present}
        new = {
            path for path in present - self._owners.keys()
            if self._unclaimed.get(path, 0) < _WATCH_TRIES
        }  # fmt: skip
        if new:
            self._claim(new)
        for path, pids in list(self._owners.items()):
            if not any(_parent_of_living(pid) is not None for pid in pids):
                _remove_shared(path)
                del self._owners[path]

    def remove_all(self) -> None:
        for path in self._owners:
            _remove_shared(path)

    def _claim(self, paths: set[str]) -> None:
        for pid in find(self._cluster_id):
            for path in _shared_memory(pid) & paths:
                self._owners.setdefault(path, set()).add(pid)
        for path in paths - self._owners.keys():
            self._unclaimed[path] = self._unclaimed.get(path, 0) + 1


def reap(cluster_id: str, folders: Collection[Path]) -> bool:
    """Kill the cluster's processes and remove what they left. False if one resisted."""
    shared: set[str] = set()
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    empty_looks = 0
    while empty_looks < 2 and time.monotonic() < deadline_s:  # one look may miss a fork
        pids = find(cluster_id)
        empty_looks = 0 if pids else empty_looks + 1
        for pid in pids:
            shared |= _shared_memory(pid)
            _kill(pid)
        time.sleep(_POLL_S)
    for path in shared:
        _remove_shared(path)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return empty_looks >= 2


def find(cluster_id: str) -> set[int]:
    """Living processes with the cluster's id, and their descendants. Never this process."""
    marker = f"{CLUSTER_ID_VARIABLE}={cluster_id}".encode()
    children: dict[int, list[int]] = {}
    found: list[int] = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        parent = _parent_of_living(pid)
        if parent is None:
            continue
        children.setdefault(parent, []).append(pid)
        if marker in _read(f"/proc/{pid}/environ").split(b"\0"):
            found.append(pid)
    reached: set[int] = set()
    while found:
        pid = found.pop()
        if pid not in reached:
            reached.add(pid)
            found.extend(children.get(pid, ()))
    return reached - {os.getpid()}


def _parent_of_living(pid: int) -> int | None:
    """None for a process that ended, be it not yet waited for."""
    stat = _read(f"/proc/{pid}/stat")
    fields = stat[stat.rfind(b")") + 1 :].split()  # the name before may hold anything
    return None if not fields or fields[0] in (b"Z", b"X") else int(fields[1])


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # it ended, or belongs to somebody else
        return b""


def _kill(pid: int) -> None:
    # The descriptor makes sure that the number is not a new process's by now.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        descriptor = os.pidfd_open(pid)
        try:
            if _parent_of_living(pid) is not None:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _shared_memory(pid: int) -> set[str]:
    """Files in /dev/shm that a process maps or holds open, but for those deleted already."""
    paths = {
        line[line.index(_SHM) :]
        for line in _read(f"/proc/{pid}/maps").decode(errors="replace").splitlines()
        if _SHM in line
    }
    with contextlib.suppress(OSError):
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                paths.add(os.readlink(descriptor.path))
    return {path for path in paths if path.startswith(_SHM) and not path.endswith("(deleted)")}


def _remove_shared(path: str) -> None:
    """Remove a segment of this user that no living process has open."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_uid == os.getuid() and not _is_open(path):
            os.unlink(path)


def _is_open(path: str) -> bool:
    return any(
        path in _shared_memory(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()
    )


def main() -> int:
    """Wait for the launcher's end, then reap. Exit status 1 if something resisted."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    cluster_id, lock_file, *folders = sys.argv[1:]
    watch = SharedMemoryWatch(cluster_id)
    while not select.select([sys.stdin], [], [], _WATCH_S)[0]:
        watch.look()
    gone = reap(cluster_id, [Path(folder) for folder in folders])
    watch.remove_all()
    Path(lock_file).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other clusters of this user
        Path(lock_file).parent.rmdir()
    return 0 if gone else 1


if __name__ == "__main__":
    sys.exit(main())
