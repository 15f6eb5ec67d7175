"""Runs ``baton up`` in its own process, and observes its workers, processes and log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

import baton
from cluster.cli.status import read_workers
from cluster.local import reaper
from cluster.local.run_dir import ClusterState, read_state
from core.errors import UnavailableError
from core.types import Pool, WorkerRecord, WorkerState
from tests.support.waiting import wait_until

START_S = 240.0  # engines load one after the other on a small machine
GRACE_S = 30.0  # ``cluster.stop_grace_s``: how long running streams may go on
STOP_S = GRACE_S + 30.0
SILENCE_S = 4.0  # ``cluster.connection_silence_s``

ROUTER = "ray::ServeReplica:baton:Router"
AUTOSCALER = "ray::ServeReplica:baton:Autoscaler"
CONTROLLER = "ray::ServeController"
REPLICAS = {
    Pool.PREFILL: "ray::ServeReplica:baton:PrefillWorker",
    Pool.DECODE: "ray::ServeReplica:baton:DecodeWorker",
}
ENGINE = "VLLM::EngineCore"
STORE = "valkey-server"
GCS = "gcs_server"
RAYLET = "raylet"
# vLLM sets the title of its engine core. Sometimes this fails and the core keeps this command line.
# This identifies the core: with one rank, a replica spawns only the core and Python's resource
# tracker, which has another command line.
_ENGINE_UNNAMED = b"from multiprocessing.spawn import spawn_main"
_WORKER_APP = re.compile(r":baton-[a-z]+-\d+-[0-9a-f]{6}:")  # each worker has an application
_FILES_OF_RAY = 5  # allowed additional files, because Ray's connections come and go
_KINDS = (ROUTER, AUTOSCALER, CONTROLLER, *REPLICAS.values(), ENGINE, STORE, GCS, RAYLET)


@dataclass(frozen=True, slots=True)
class ClusterProcess:
    """One process of a cluster."""

    pid: int
    kind: str  # one of the names above


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """A cluster that ``start`` has started."""

    launcher: subprocess.Popen[str]
    config_file: Path
    run_dir: Path
    name: str
    sizes: dict[Pool, int]
    has_engines: bool  # whether its workers have engine cores
    log: Path

    @property
    def state(self) -> ClusterState:
        state = read_state(self.run_dir, self.name)
        assert state is not None, self.recent_log()
        return state

    def client(self) -> baton.Client:
        return baton.Client(self.state.address, timeout_s=300)

    def cli(self, *arguments: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        """Run a ``baton`` command on this cluster and wait for its end."""
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "cluster.cli.main",
                *arguments,
                "--config",
                str(self.config_file),
            ],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def scale_router(self, number: int) -> None:
        """Let Ray Serve run ``number`` routers, 0 or 1. Does not wait for the change."""
        (raylet,) = self.processes(RAYLET)
        (address,) = (
            word.partition("=")[2]
            for word in psutil.Process(raylet.pid).cmdline()
            if word.startswith("--gcs-address=")
        )
        settings = {  # they contain Ray's token, and make Ray use loopback
            name: value
            for name, value in psutil.Process(raylet.pid).environ().items()
            if name.startswith("RAY_")
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.scale_router", address, str(number)],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def recent_log(self) -> str:
        """Return the end of the launcher's log."""
        return self.log.read_text()[-8000:]

    def router_log_lines(self, words: str) -> list[str]:
        """Return the lines of the routers' logs that contain ``words``."""
        logs = "ray/session_latest/logs/serve/replica_*_Router_*.log"
        files = [file for folder in self.state.folders for file in Path(folder).glob(logs)]
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [line for line in lines if words in line]

    def workers(self, pool: Pool | None = None) -> list[WorkerRecord]:
        """Return the workers that hold a lease now; none if the store cannot be reached."""
        with suppress(UnavailableError):
            return [each for each in read_workers(self.state) if pool in (None, each.pool)]
        return []

    def processes(self, kind: str | None = None) -> list[ClusterProcess]:
        """Return ``processes_of`` this cluster."""
        return processes_of(self.state.cluster_id, kind)

    def replica_of(self, worker: WorkerRecord) -> ClusterProcess | None:
        """Return the process of ``worker``, or None if only its lease is left."""
        port = int(worker.address.rpartition(":")[2])
        for process in self.processes(REPLICAS[worker.pool]):
            if port in _listening(process.pid):
                return process
        return None

    def listening_ports(self) -> set[int]:
        """Return the ports on which any process of the cluster listens."""
        return {port for pid in reaper.find(self.state.cluster_id) for port in _listening(pid)}

    def engine_of(self, replica: ClusterProcess) -> ClusterProcess:
        """Return the engine core of ``replica``."""
        children = psutil.Process(replica.pid).children(recursive=True)
        (engine,) = [child.pid for child in children if _kind(child.pid) == ENGINE]
        return ClusterProcess(engine, ENGINE)

    def wait(self, condition: Callable[[], object], what: str, within_s: float = 60) -> None:
        """Wait for ``condition``. If it takes too long, fail with the launcher's log."""
        try:
            wait_until(condition, what=what, within_s=within_s)
        except AssertionError as error:
            error.add_note(self.recent_log())
            raise

    def process_counts(self) -> Counter[str]:
        """Return the number of living processes of each kind."""
        return Counter(process.kind for process in self.processes())

    def expected_process_counts(self) -> Counter[str]:
        """Return the process counts of an undisturbed cluster."""
        kinds = {ROUTER: 1, AUTOSCALER: 1, CONTROLLER: 1, STORE: 1, GCS: 1, RAYLET: 1}
        kinds |= {REPLICAS[pool]: size for pool, size in self.sizes.items()}
        return Counter(kinds | ({ENGINE: sum(self.sizes.values())} if self.has_engines else {}))

    def open_files(self) -> Counter[str]:
        """Return for each kind of process the largest number of open files in one process."""
        found: Counter[str] = Counter()
        for kind in (ROUTER, *REPLICAS.values()):
            for process in self.processes(kind):
                found |= Counter({kind: _open_files(process)})
                if self.has_engines and kind != ROUTER:
                    found |= Counter({f"{kind} {ENGINE}": _open_files(self.engine_of(process))})
        return found

    def wait_files_closed(self, before: Counter[str]) -> None:
        """Wait until no kind has more files open than in ``before``, a result of ``open_files``.

        Routers and replicas may have up to ``_FILES_OF_RAY`` more.
        """

        def left_open() -> list[str]:
            return [
                f"{kind} has {more} more files open"
                for kind, more in (self.open_files() - before).items()
                if ENGINE in kind or more > _FILES_OF_RAY
            ]

        self._wait_no_difference(left_open, "all new files are closed")

    def wait_restored(self, within_s: float) -> None:
        """Wait until the cluster is complete and idle, as after its start."""
        self._wait_no_difference(self.differences, "the cluster is restored and idle", within_s)

    def _wait_no_difference(
        self, differences: Callable[[], list[str]], what: str, within_s: float = 60
    ) -> None:
        found: list[str] = []

        def is_alike() -> bool:
            found[:] = differences()
            return not found

        try:
            self.wait(is_alike, what, within_s)
        except AssertionError as error:
            error.add_note("\n".join(found))
            raise

    def differences(self) -> list[str]:
        """Return the differences from an undisturbed and idle cluster, one line each."""
        assert self.launcher.poll() is None, self.recent_log()
        workers = self.workers()
        ready = Counter(each.pool for each in workers if each.state is WorkerState.READY)
        found = []
        if ready != Counter(self.sizes) or len(workers) != ready.total():
            found.append(f"workers: {[(each.id, each.state.value) for each in workers]}")
        for each in workers:
            load = each.load
            if load.kv_blocks_free < load.kv_blocks_total or load.running or load.queue_depth:
                found.append(f"{each.id} is not idle: {load}")
        if not found and (counts := self.process_counts()) != self.expected_process_counts():
            found.append(f"processes: {dict(counts - self.expected_process_counts())} too many")
            found.append(f"processes: {dict(self.expected_process_counts() - counts)} too few")
        return found


def processes_of(cluster_id: str, kind: str | None = None) -> list[ClusterProcess]:
    """Return a cluster's living processes of ``kind``, or of all known kinds, oldest first."""
    found = [ClusterProcess(pid, _kind(pid)) for pid in reaper.find(cluster_id)]
    wanted = _KINDS if kind is None else (kind,)
    return sorted((each for each in found if each.kind in wanted), key=_started_s)


def start(
    folder: Path, name: str, config: str, sizes: Mapping[Pool, int], *, settings: str = ""
) -> LiveCluster:
    """Start a cluster and wait until it is ready. ``stop`` ends it.

    Args:
        folder: for the cluster's files.
        config: YAML without the section ``cluster``.
        sizes: number of workers in each pool.
        settings: more settings of the section ``cluster``, such as ", role_change: true".
    """
    run_dir, config_file, log = folder / "run", folder / f"{name}.yaml", folder / f"{name}.log"
    section = (
        f"name: {name}, run_dir: {run_dir}, start_timeout_s: {START_S}, stop_grace_s: {GRACE_S}, "
        f"connection_silence_s: {SILENCE_S}{settings}"
    )
    config_file.write_text(f"cluster: {{{section}}}\n{config}")
    flags = [word for pool in Pool for word in (f"--{pool}", str(sizes[pool]))]
    with log.open("w") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli.main", "up", "--config", str(config_file), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    has_engines = "engine_kind: fake" not in config
    cluster = LiveCluster(
        launcher=launcher,
        config_file=config_file,
        run_dir=run_dir,
        name=name,
        sizes=dict(sizes),
        has_engines=has_engines,
        log=log,
    )

    def is_ready() -> bool:
        assert launcher.poll() is None, cluster.recent_log()
        return "ready: gRPC" in log.read_text()

    try:
        cluster.wait(is_ready, "the cluster is ready", START_S)
    except BaseException:
        stop(cluster)
        raise
    return cluster


def stop(cluster: LiveCluster) -> None:
    """End the launcher by SIGINT, or by SIGKILL if it still runs after ``STOP_S``. Idempotent."""
    if cluster.launcher.poll() is None:
        cluster.launcher.send_signal(signal.SIGINT)
        try:
            cluster.launcher.wait(STOP_S)
        except subprocess.TimeoutExpired:
            cluster.launcher.kill()
            cluster.launcher.wait()


def _kind(pid: int) -> str:
    """Return the kind of a process: one of ``_KINDS``, or its command line if no kind matches."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""  # the process has ended
    words = line.rstrip(b"\0 ").decode(errors="replace").split("\0")
    if _ENGINE_UNNAMED in line:
        return ENGINE
    title = _WORKER_APP.sub(":baton:", words[0])
    program = title.rpartition("/")[2]
    for kind in _KINDS:
        # Ray appends the method that the actor runs.
        if program == kind or title == kind or title.startswith(f"{kind}."):
            return kind
    return " ".join(words)


def _open_files(process: ClusterProcess) -> int:
    try:
        return int(psutil.Process(process.pid).num_fds())
    except psutil.NoSuchProcess:
        return 0


def _started_s(process: ClusterProcess) -> float:
    try:
        return float(psutil.Process(process.pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0


def _listening(pid: int) -> set[int]:
    with suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
    return set()
