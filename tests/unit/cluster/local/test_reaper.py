"""The reaper, with real processes: it kills the cluster's processes, and no others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from cluster.local import reaper
from cluster.local.reaper import CLUSTER_ID_VARIABLE, Reaper
from cluster.local.run_dir import RunDir, is_held
from tests.support.waiting import wait_until

WAIT_S = 10.0
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def cluster_id() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield name
    assert reaper.reap(name, [])


def spawn(cluster_id: str | None, code: str = SLEEPER, **options: bool) -> subprocess.Popen[str]:
    """Start a process and return it when it has printed its first line."""
    environment = dict(os.environ)
    if cluster_id is not None:
        environment[CLUSTER_ID_VARIABLE] = cluster_id
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=options.get("session", False),
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def end(process: subprocess.Popen[str]) -> int:
    """Wait until a process has ended, and return its status."""
    assert process.stdout is not None
    process.stdout.close()
    return process.wait(WAIT_S)


def test_reap_kills_all_processes_with_the_id_and_no_others(cluster_id: str) -> None:
    ours = [spawn(cluster_id), spawn(cluster_id, session=True)]
    longer = spawn(cluster_id + "0")
    stranger = spawn(None)
    try:
        assert reaper.find(cluster_id) == {process.pid for process in ours}
        assert reaper.reap(cluster_id, [])
        assert [end(process) for process in ours] == [-signal.SIGKILL] * 2
        assert (longer.poll(), stranger.poll()) == (None, None)
    finally:
        for process in (longer, stranger):
            process.kill()
            end(process)


def test_descendants_that_dropped_the_id_are_found_too(cluster_id: str) -> None:
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], env={{}}, start_new_session=True)\n"
        "time.sleep(600)"
    )
    parent = spawn(cluster_id, code)  # the first line comes from the child
    assert len(reaper.find(cluster_id)) == 2
    assert reaper.reap(cluster_id, [])
    end(parent)
    assert reaper.find(cluster_id) == set()


def test_processes_that_ignore_signals_and_keep_forking_are_killed(cluster_id: str) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)\n"
        "print('up', flush=True)\n"
        "while True:\n"
        "    subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'],\n"
        "                     start_new_session=True)\n"
        "    time.sleep(0.02)\n"
    )
    forking = spawn(cluster_id, code)
    wait_until(lambda: len(reaper.find(cluster_id)) > 3, what="it has forked")
    assert reaper.reap(cluster_id, [])
    end(forking)
    assert reaper.find(cluster_id) == set()


def spawn_keeping(cluster_id: str, code: str) -> tuple[subprocess.Popen[str], Path]:
    """Start a process of the cluster. ``code`` creates a file in /dev/shm and prints its name.

    Return the process and the file's path.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, CLUSTER_ID_VARIABLE: cluster_id},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    segment = Path("/dev/shm") / process.stdout.readline().strip()
    return process, segment


def test_shared_memory_of_killed_processes_is_removed(cluster_id: str, tmp_path: Path) -> None:
    code = (
        "from multiprocessing import shared_memory\n"
        "import time\n"
        "segment = shared_memory.SharedMemory(create=True, size=4096)\n"
        "print(segment.name, flush=True)\n"
        "time.sleep(600)"
    )
    process, segment = spawn_keeping(cluster_id, code)
    mine = shared_memory.SharedMemory(create=True, size=4096)
    try:
        assert segment.exists()
        assert reaper.reap(cluster_id, [tmp_path / "never there"])
        assert not segment.exists()
        assert (Path("/dev/shm") / mine.name).exists()
    finally:
        mine.close()
        mine.unlink()
        end(process)


# Each snippet unregisters its file. Otherwise Python's resource tracker would remove the file.
KEEPS_SHARED_MEMORY = {
    "a segment": (
        "segment = shared_memory.SharedMemory(create=True, size=4096)\n"
        "resource_tracker.unregister(segment._name, 'shared_memory')\n"
        "name = segment.name\n"
    ),
    "a semaphore": (
        "lock = multiprocessing.get_context('spawn').Lock()\n"
        "resource_tracker.unregister(lock._semlock.name, 'semaphore')\n"
        "name = 'sem.' + lock._semlock.name.lstrip('/')\n"
    ),
}


@pytest.mark.parametrize("what", KEEPS_SHARED_MEMORY)
def test_shared_memory_of_a_worker_that_was_killed_alone_is_removed(
    cluster_id: str, what: str
) -> None:
    code = (
        "import multiprocessing, time\n"
        "from multiprocessing import resource_tracker, shared_memory\n"
        f"{KEEPS_SHARED_MEMORY[what]}"
        "print(name, flush=True)\n"
        "time.sleep(600)"
    )
    process, segment = spawn_keeping(cluster_id, code)
    mine = shared_memory.SharedMemory(create=True, size=4096)
    watch = reaper.SharedMemoryWatch(cluster_id)
    try:
        watch.look()
        assert segment.exists(), "its owner still runs"
        process.kill()
        end(process)
        watch.look()
        assert not segment.exists()
        assert (Path("/dev/shm") / mine.name).exists()
    finally:
        mine.close()
        mine.unlink()


def test_each_process_is_read_once_however_many_files_are_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {inode: f"/dev/shm/never-there-{inode}" for inode in (1, 2, 3)}
    read: list[int] = []

    def open_shared(pid: int) -> set[int]:
        read.append(pid)
        return set()

    monkeypatch.setattr(reaper, "_shared_files", lambda: files)
    monkeypatch.setattr(reaper, "_open_shared", open_shared)
    reaper._remove_shared(files.keys())
    assert len(read) == len(set(read)) > 0


def test_shared_memory_that_a_process_has_open_is_kept() -> None:
    mine = shared_memory.SharedMemory(create=True, size=4096)
    segment = Path("/dev/shm") / mine.name
    try:
        reaper._remove_shared({segment.stat().st_ino})
        assert segment.exists()
    finally:
        mine.close()
        mine.unlink()


def test_a_look_that_fails_does_not_end_the_reaper(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, lock = tmp_path / "run" / "c", tmp_path / "run" / "c.lock"
    folder.mkdir(parents=True)
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    pipe_closed = iter([False, True])  # the pipe closes after the first look

    def fail(_watch: object) -> None:
        raise PermissionError

    monkeypatch.setattr(reaper.SharedMemoryWatch, "look", fail)
    monkeypatch.setattr(reaper.SharedMemoryWatch, "remove_all", fail)
    monkeypatch.setattr(
        "cluster.local.reaper.select.select", lambda *_: ([next(pipe_closed)], [], [])
    )
    monkeypatch.setattr("cluster.local.reaper.signal.signal", lambda *_: None)
    arguments = [uuid.uuid4().hex, str(lock), str(descriptor), str(folder)]
    monkeypatch.setattr(sys, "argv", ["reaper.py", *arguments])
    assert reaper.main() == 0
    os.close(descriptor)
    assert not (tmp_path / "run").exists()


def test_another_clusters_lock_of_the_same_name_is_not_removed(tmp_path: Path) -> None:
    lock = tmp_path / "c.lock"
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    lock.unlink()
    lock.touch()
    reaper.remove_lock(lock, descriptor)
    assert lock.exists()
    os.close(descriptor)


LAUNCHER = """
import os, subprocess, sys, time
from pathlib import Path
from cluster.local.reaper import CLUSTER_ID_VARIABLE, Reaper
from cluster.local.run_dir import RunDir
run = RunDir(Path(sys.argv[1]), "c")
reaper = Reaper(sys.argv[2], run.folders, run.lock_file, run.lock_fd)
os.environ[CLUSTER_ID_VARIABLE] = sys.argv[2]
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_launcher_is_killed(
    cluster_id: str, tmp_path: Path, number: signal.Signals
) -> None:
    base = tmp_path / "run"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, base, cluster_id], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline()
    assert is_held(base, "c")
    # The kernel shows a new program's environment only a moment after its start.
    wait_until(lambda: len(reaper.find(cluster_id)) == 1, what="the child is found")
    launcher.send_signal(number)
    end(launcher)
    wait_until(lambda: not base.exists(), what="the run folder is gone")
    assert reaper.find(cluster_id) == set()


def test_a_reaper_that_is_not_done_keeps_the_name(
    cluster_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "run"
    run = RunDir(base, "c")
    watcher = Reaper(cluster_id, run.folders, run.lock_file, run.lock_fd)
    pid = watcher._process.pid
    wait_until(lambda: ignores_signals(pid), what="the reaper waits for its pipe")
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(reaper, "_FINISH_TIMEOUT_S", 0.05)
    assert not watcher.finish()
    assert watcher.is_at_work()
    run.leave_to_reaper()
    run.release()
    assert run.path.exists()
    assert is_held(base, "c")
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not base.exists(), what="the reaper has done its work")
    assert watcher._process.wait(WAIT_S) == 0


def ignores_signals(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = next(line for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(ignored.split()[1], 16) & 1 << (signal.SIGTERM - 1))


def test_finish_waits_until_all_is_gone(cluster_id: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "c")
    watcher = Reaper(cluster_id, run.folders, run.lock_file, run.lock_fd)
    child = spawn(cluster_id)
    assert watcher.finish()
    assert end(child) == -signal.SIGKILL
    assert not run.path.exists()
    run.release()
    assert not (tmp_path / "run").exists()
