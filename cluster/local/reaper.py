"""The reaper: a process that cleans up after a cluster, even if its launcher is killed.

    launcher ──starts first──▶ reaper          (own session; also holds the name's lock)
        └─────── pipe ───────────┘  closes when the launcher ends, even on kill -9

When the pipe closes, the reaper kills every process that has the cluster's id in its
environment, and all descendants of those processes. Then it removes the cluster's folders and
the shared memory that those processes had open. The cluster's processes inherit the id from the
launcher. The reaper does not find the launcher itself: /proc shows a process's environment as it
was when the process started, and the launcher sets the id later.

This file runs as a script with only the standard library (``python -I -S``). So it needs little
memory, and a broken package that stops the cluster does not stop the reaper.
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
from collections.abc import Collection, Sequence, Set
from pathlib import Path

CLUSTER_ID_VARIABLE = "BATON_CLUSTER_ID"

KILL_TIMEOUT_S = 10.0  # SIGKILL works immediately unless a process is stuck in a driver
_FINISH_TIMEOUT_S = 2 * KILL_TIMEOUT_S  # also covers removing folders and shared memory
_POLL_S = 0.02  # a killed process is gone within milliseconds
_WATCH_S = 1.0  # time between two looks at /dev/shm while the cluster runs
_WATCH_TRIES = 5  # a file without an owner after this many looks is not the cluster's
_SHM = "/dev/shm/"


class Reaper:
    """Starts a reaper process and holds the launcher's end of its pipe.

    Args:
        cluster_id: value of ``BATON_CLUSTER_ID`` in the cluster's processes.
        folders: the reaper removes them at the end.
        lock_file: the reaper removes it last.
        lock_fd: descriptor that holds the lock. The reaper inherits it, so the lock is held
            until the reaper is done.
    """

    def __init__(
        self, cluster_id: str, folders: Sequence[Path], lock_file: Path, lock_fd: int
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if k != CLUSTER_ID_VARIABLE}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, cluster_id, lock_file, str(lock_fd), *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock_fd,),
            start_new_session=True,
            env=environment,
        )

    def finish(self) -> bool:
        """Close the pipe and wait until the reaper is done.

        Return False if the reaper could not kill every process, or if it is not done in time. A
        reaper that is not done still runs and holds the lock.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(_FINISH_TIMEOUT_S) == 0
        except subprocess.TimeoutExpired:
            return False

    def is_at_work(self) -> bool:
        """Return whether the reaper still runs. If it does, it removes the folders itself."""
        return self._process.poll() is None


class SharedMemoryWatch:
    """Records which files in /dev/shm the cluster's processes have open.

    A killed worker leaves its shared memory segments and semaphores behind, and nothing shows
    afterwards which process owned them. So this class finds the owners of each new file while
    the owners run, and removes the file when its last owner has ended.
    """

    def __init__(self, cluster_id: str) -> None:
        self._cluster_id = cluster_id
        self._owners: dict[int, set[int]] = {}  # pids by inode
        self._unclaimed: dict[int, int] = {}  # number of looks that found no owner, by inode

    def look(self) -> None:
        """Find the owners of new files. Remove the files whose owners have all ended."""
        present = _shared_files().keys()
        self._unclaimed = {inode: n for inode, n in self._unclaimed.items() if inode in present}
        new = {
            inode for inode in present - self._owners.keys()
            if self._unclaimed.get(inode, 0) < _WATCH_TRIES
        }  # fmt: skip
        if new:
            self._claim(new)
        abandoned = {
            inode
            for inode, pids in self._owners.items()
            if not any(_parent_of_living(pid) is not None for pid in pids)
        }
        _remove_shared(abandoned)
        for inode in abandoned:
            del self._owners[inode]

    def remove_all(self) -> None:
        """Remove every file that the cluster's processes had open."""
        _remove_shared(self._owners.keys())

    def _claim(self, inodes: set[int]) -> None:
        for pid in find(self._cluster_id):
            for inode in _open_shared(pid) & inodes:
                self._owners.setdefault(inode, set()).add(pid)
        for inode in inodes - self._owners.keys():
            self._unclaimed[inode] = self._unclaimed.get(inode, 0) + 1


def reap(cluster_id: str, folders: Collection[Path]) -> bool:
    """Kill the cluster's processes. Remove their shared memory and ``folders``.

    Return False if a process is still alive after ``KILL_TIMEOUT_S``.
    """
    shared: set[int] = set()
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    empty_scans = 0
    while empty_scans < 2 and time.monotonic() < deadline_s:  # one scan may miss a new child
        pids = find(cluster_id)
        empty_scans = 0 if pids else empty_scans + 1
        for pid in pids:
            shared |= _open_shared(pid)
            _kill(pid)
        time.sleep(_POLL_S)
    with contextlib.suppress(OSError):  # the folders must be removed in any case
        _remove_shared(shared)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return empty_scans >= 2


def find(cluster_id: str) -> set[int]:
    """Return the pids of living processes with the cluster's id, and of their descendants.

    This process is never included.
    """
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
    """Return the parent's pid, or None if the process has ended (zombies included)."""
    stat = _read(f"/proc/{pid}/stat")
    fields = stat[stat.rfind(b")") + 1 :].split()  # skip the name, which may contain anything
    return None if not fields or fields[0] in (b"Z", b"X") else int(fields[1])


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # the process has ended, or belongs to another user
        return b""


def _kill(pid: int) -> None:
    # With the descriptor open, the check below and the signal concern the same process.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        descriptor = os.pidfd_open(pid)
        try:
            if _parent_of_living(pid) is not None:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _shared_files() -> dict[int, str]:
    """Return the paths of the files in /dev/shm by inode."""
    with os.scandir(_SHM) as entries:
        return {entry.inode(): entry.path for entry in entries}


def _open_shared(pid: int) -> set[int]:
    """Return the inodes of the files in /dev/shm that a process maps or has open.

    An inode still identifies a file that is renamed. A semaphore's file gets its name only after
    it is mapped.
    """
    inodes = set()
    for line in _read(f"/proc/{pid}/maps").decode(errors="replace").splitlines():
        fields = line.split(maxsplit=5)  # address, mode, offset, device, inode, path
        if len(fields) == 6 and fields[5].startswith(_SHM):
            inodes.add(int(fields[4]))
    with contextlib.suppress(OSError):
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(descriptor.path).startswith(_SHM):
                    inodes.add(os.stat(descriptor.path).st_ino)
    return inodes


def _remove_shared(inodes: Set[int]) -> None:
    """Remove the files with these inodes, except files that are in use or another user's."""
    files = _shared_files() if inodes else {}
    present = inodes & files.keys()
    if not present:
        return
    still_open = _all_open_shared()
    for inode in present - still_open:
        with contextlib.suppress(OSError):
            if os.stat(files[inode]).st_uid == os.getuid():
                os.unlink(files[inode])


def _all_open_shared() -> set[int]:
    """Return the inodes of all files in /dev/shm that a process has open or maps.

    Processes that this user may not inspect are left out. The call is slow, because it reads the
    memory maps of all processes on the machine, so call it once per removal.
    """
    inodes: set[int] = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            inodes |= _open_shared(int(entry))
    return inodes


def remove_lock(lock_file: Path, lock_fd: int) -> None:
    """Remove the lock file that ``lock_fd`` has open, and its folder if that is empty.

    If the name now belongs to a different file, that file is another launcher's lock, and is kept.
    """
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(lock_fd), lock_file.stat()):
            lock_file.unlink()
    with contextlib.suppress(OSError):  # not empty: this user has other clusters
        lock_file.parent.rmdir()


def main() -> int:
    """Wait until the launcher ends, then reap. Return 1 if a process could not be killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    cluster_id, lock_file, lock_fd, *folders = sys.argv[1:]
    watch = SharedMemoryWatch(cluster_id)
    while not select.select([sys.stdin], [], [], _WATCH_S)[0]:
        with contextlib.suppress(OSError):  # the next call may succeed; the reaper must go on
            watch.look()
    gone = reap(cluster_id, [Path(folder) for folder in folders])
    with contextlib.suppress(OSError):
        watch.remove_all()
    remove_lock(Path(lock_file), int(lock_fd))
    return 0 if gone else 1


if __name__ == "__main__":
    sys.exit(main())
