"""Reserves a cluster's name and manages its run folder, <run_dir>/<name>.

<run_dir>/<name>.lock         locked by launcher and reaper while the name is in use
<run_dir>/<name>/state.json   the ClusterState, which other commands need to connect to the cluster;
                              mode 0600, because it contains a password
<scratch>/                    files and sockets of Ray, Valkey and the engines. The scratch folder
                              is the run folder, or a folder in /tmp if the run folder's path is
                              too long for a socket
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.local import reaper
from core.errors import ConfigError
from core.state.store import Store

_STATE = "state.json"
_STATE_NEW = f"{_STATE}.new"  # renamed to _STATE when it is complete
_SCRATCH = ("ray", "tmp", "valkey")
_OWN_ENTRIES = {_STATE, _STATE_NEW, *_SCRATCH}  # a folder with other entries is not a cluster's
_LOCK_ATTEMPTS = 10  # _lock tries again only if the file or its folder was just removed

# Linux limits a socket's path to 107 bytes. Ray's longest path is the scratch folder's path plus
# "/ray", the session's name and "/sockets/plasma_store".
_LONGEST_SCRATCH = 107 - len("/ray/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store")


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What the launcher publishes about its cluster to other processes of the same user."""

    name: str
    cluster_id: str
    pid: int  # of the launcher
    pid_started: int  # clock ticks after boot; tells the launcher from a later process with its pid
    phase: str  # "starting", "ready" or "stopping"
    address: str  # gRPC address of the router, "host:port"
    model: str  # served name
    store: Store | None  # None until the launcher has reached the store
    start_timeout_s: float
    stop_grace_s: float
    max_replicas: dict[str, int]  # by pool
    folders: tuple[str, ...]  # to remove when the cluster is gone

    def launcher_lives(self) -> bool:
        """Return whether the launcher that wrote this state still runs."""
        return process_started(self.pid) == self.pid_started


class RunDir:
    """A cluster's run folder, and the lock on its name.

    The lock is held until launcher and reaper have both released it.
    """

    def __init__(self, base: Path, name: str) -> None:
        """Lock the name, remove what a dead cluster left, and create the folder.

        Raises:
            ConfigError: a cluster of this name runs, the folder cannot be used, or it has
                entries that are not a cluster's.
        """
        self.path = base / name
        self.lock_file = base / f"{name}.lock"
        try:
            self.lock_fd = _lock(self.lock_file, base, name)
            try:
                _clear_leftovers(base, name)
                self.path.mkdir(mode=0o700)
            except BaseException:
                reaper.remove_lock(self.lock_file, self.lock_fd)
                os.close(self.lock_fd)
                raise
        except OSError as error:
            raise ConfigError(f"cluster.run_dir: {base}: {error.strerror}") from None
        self._released = False
        self.scratch = self.path
        if len(os.fsencode(self.path)) > _LONGEST_SCRATCH:
            self.scratch = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
        for folder in _SCRATCH:
            (self.scratch / folder).mkdir(mode=0o700)

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders to remove when the cluster is gone."""
        return (self.path,) if self.scratch == self.path else (self.path, self.scratch)

    def write(self, state: ClusterState) -> None:
        """Publish ``state`` atomically."""
        new = self.path / _STATE_NEW
        with open(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(state), file)
        new.replace(self.path / _STATE)

    def set_phase(self, phase: str) -> None:
        """Change the phase of the published state. Does nothing before the first ``write``."""
        state = read_state(self.path.parent, self.path.name)
        if state is not None:
            self.write(replace(state, phase=phase))

    def release(self) -> None:
        """Remove the folders and release the name. Idempotent."""
        if self._released:
            return
        self._released = True
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        reaper.remove_lock(self.lock_file, self.lock_fd)
        os.close(self.lock_fd)

    def leave_to_reaper(self) -> None:
        """Leave the folders and the name to the reaper, which still runs. Idempotent.

        The reaper also holds the lock. It removes the folders and the lock file at its end.
        """
        if not self._released:
            self._released = True
            os.close(self.lock_fd)


def read_state(base: Path, name: str) -> ClusterState | None:
    """Return the published state of the cluster ``name``, or None if there is no state file.

    Raises:
        ConfigError: the file cannot be read, is damaged, or is from another version of Baton.
    """
    file = base / name / _STATE
    try:
        fields = json.loads(file.read_text())
        store = Store(**fields["store"]) if fields["store"] is not None else None
        return ClusterState(**fields | {"store": store, "folders": tuple(fields["folders"])})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{file} is damaged or from another version of Baton; if no cluster named {name!r} "
            "runs, delete it"
        ) from None


def is_held(base: Path, name: str) -> bool:
    """Return whether a launcher or its reaper still holds the name."""
    try:
        descriptor = os.open(base / f"{name}.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def process_started(pid: int) -> int | None:
    """Return when a process started, in clock ticks after boot. None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 1 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _lock(lock_file: Path, base: Path, name: str) -> int:
    """Lock the name and return the descriptor that holds the lock.

    Another launcher or a reaper may remove the file or its folder during this call. So the call
    tries several times.

    Raises:
        ConfigError: the name is in use, or the folder belongs to another user.
        OSError: the folder cannot be used.
    """
    for _ in range(_LOCK_ATTEMPTS):
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            if base.stat().st_uid != os.getuid():
                raise ConfigError(f"cluster.run_dir: {base} belongs to another user")
            descriptor = os.open(lock_file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(_held_message(base, name)) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock_file.stat()):
                return descriptor
        os.close(descriptor)
    raise ConfigError(f"cluster.run_dir: {lock_file} cannot be locked")


def _held_message(base: Path, name: str) -> str:
    state = read_state(base, name)
    if state is None or not state.launcher_lives() or state.phase == "stopping":
        return f"the cluster {name!r} is just starting or stopping; try again in some seconds"
    return (
        f"the cluster {name!r} is running already (pid {state.pid}, {state.address}); "
        f"stop it with: baton down --name {name}"
    )


def _clear_leftovers(base: Path, name: str) -> None:
    """Do the work of a reaper that was killed together with its launcher.

    Raises:
        ConfigError: the folder does not look like a cluster's, so it may hold a user's files.
    """
    folder = base / name
    state = read_state(base, name)
    if state is not None:
        reaper.reap(state.cluster_id, [Path(each) for each in state.folders])
    elif os.path.lexists(folder):
        if folder.is_symlink() or not folder.is_dir() or set(os.listdir(folder)) - _OWN_ENTRIES:
            raise ConfigError(
                f"cluster.run_dir: {folder} exists and is not a cluster's; choose another "
                "cluster.run_dir or cluster.name"
            )
        shutil.rmtree(folder)
