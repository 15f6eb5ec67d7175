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
from collections.abc import Collection, Sequence, Set
from pathlib import Path

CLUSTER_ID_VARIABLE = "BATON_CLUSTER_ID"

KILL_TIMEOUT_S = 10.0  # SIGKILL works at once, but for processes stuck in a driver
_FINISH_TIMEOUT_S = 2 * KILL_TIMEOUT_S  # it also removes folders and shared memory
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
            [sys.executable, "-I", "-S", __file__, cluster_id, lock_file, str(lock_fd), *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock_fd,),
            start_new_session=True,
            env=environment,
        )

    def finish(self) -> bool:
        """Close the pipe and wait until all is gone.

        False if something resisted; the reaper may then still be at work, and hold the lock.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(_FINISH_TIMEOUT_S) == 0
        except subprocess.TimeoutExpired:
            return False

    def is_at_work(self) -> bool:
        """Whether it still runs, and so will remove the folders itself."""
        return self._process.poll() is None


class SharedMemoryWatch:
    """Remembers which files in /dev/shm a cluster's processes have had open.

    A worker that is killed leaves its segments and semaphores behind, and afterwards nothing
    says whose they were: so new ones are looked at while their owners live, and go when the
    last owner has gone.
    """

    def __init__(self, cluster_id: str) -> None:
        self._cluster_id = cluster_id
        self._owners: dict[int, set[int]] = {}  # inode: pids
        self._unclaimed: dict[int, int] = {}  # inode: looks without an owner

    def look(self) -> None:
        """Find the owners of new files, remove those whose owners are all gone."""
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
        """Remove every file that an owner was found for."""
        _remove_shared(self._owners.keys())

    def _claim(self, inodes: set[int]) -> None:
        for pid in find(self._cluster_id):
            for inode in _open_shared(pid) & inodes:
                self._owners.setdefault(inode, set()).add(pid)
        for inode in inodes - self._owners.keys():
            self._unclaimed[inode] = self._unclaimed.get(inode, 0) + 1


def reap(cluster_id: str, folders: Collection[Path]) -> bool:
    """Kill the cluster's processes and remove what they left. False if one resisted."""
    shared: set[int] = set()
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    empty_looks = 0
    while empty_looks < 2 and time.monotonic() < deadline_s:  # one look may miss a fork
        pids = find(cluster_id)
        empty_looks = 0 if pids else empty_looks + 1
        for pid in pids:
            shared |= _open_shared(pid)
            _kill(pid)
        time.sleep(_POLL_S)
    with contextlib.suppress(OSError):  # the folders go in any case
        _remove_shared(shared)
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


def _shared_files() -> dict[int, str]:
    """What lies in /dev/shm, by inode."""
    with os.scandir(_SHM) as entries:
        return {entry.inode(): entry.path for entry in entries}


def _open_shared(pid: int) -> set[int]:
    """Inodes of the files in /dev/shm that a process maps or holds open.

    Not their names: a semaphore is mapped under a first name that it loses at once.
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
    """Remove those files of this user that no living process has open."""
    files = _shared_files() if inodes else {}
    left = inodes & files.keys()
    if not left:
        return
    still_open = _all_open_shared()
    for inode in left - still_open:
        with contextlib.suppress(OSError):
            if os.stat(files[inode]).st_uid == os.getuid():
                os.unlink(files[inode])


def _all_open_shared() -> set[int]:
    """One look at every process of the machine: there may be many, with long tables."""
    inodes: set[int] = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            inodes |= _open_shared(int(entry))
    return inodes


def remove_lock(lock_file: Path, lock_fd: int) -> None:
    """Remove the lock file that ``lock_fd`` has open, and its folder if nothing else is there.

    It may be gone already, and somebody else's file lie under its name.
    """
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(lock_fd), lock_file.stat()):
            lock_file.unlink()
    with contextlib.suppress(OSError):  # other clusters of this user
        lock_file.parent.rmdir()


def main() -> int:
    """Wait for the launcher's end, then reap. Exit status 1 if something resisted."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    cluster_id, lock_file, lock_fd, *folders = sys.argv[1:]
    watch = SharedMemoryWatch(cluster_id)
    while not select.select([sys.stdin], [], [], _WATCH_S)[0]:
        with contextlib.suppress(OSError):  # the next look may do better; our end would not
            watch.look()
    gone = reap(cluster_id, [Path(folder) for folder in folders])
    with contextlib.suppress(OSError):
        watch.remove_all()
    remove_lock(Path(lock_file), int(lock_fd))
    return 0 if gone else 1


if __name__ == "__main__":
    sys.exit(main())
