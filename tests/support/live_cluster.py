"""``baton up`` in a process of its own, seen from outside: its workers, its processes, its log."""

from __future__ import annotations

import os
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
GRACE_S = 30.0  # for the streams of a cluster that goes down
STOP_S = GRACE_S + 30.0
SILENCE_S = 4.0  # a connection without a sign of life is given up

ROUTER = "ray::ServeReplica:baton:Router"
CONTROLLER = "ray::ServeController"
REPLICAS = {
    Pool.PREFILL: "ray::ServeReplica:baton:PrefillWorker",
    Pool.DECODE: "ray::ServeReplica:baton:DecodeWorker",
}
ENGINE = "VLLM::EngineCore"
STORE = "valkey-server"
GCS = "gcs_server"
RAYLET = "raylet"
# vLLM gives its engine core a title, which now and then does not take: it stays what it was spawned
# as. With one rank an engine it is all that a replica spawns, but for Python's resource tracker.
_ENGINE_UNNAMED = b"from multiprocessing.spawn import spawn_main"
_FILES_OF_RAY = 5  # its own connections between replicas, controller and raylet come and go
_KINDS = (ROUTER, CONTROLLER, *REPLICAS.values(), ENGINE, STORE, GCS, RAYLET)


@dataclass(frozen=True, slots=True)
class Part:
    """One process of a cluster."""

    pid: int
    kind: str  # one of the names above


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """One that was started by ``start``."""

    process: subprocess.Popen[str]
    file: Path  # its configuration
    run_dir: Path
    name: str
    sizes: dict[Pool, int]
    has_engines: bool  # its workers have engine cores
    log: Path

    @property
    def state(self) -> ClusterState:
        state = read_state(self.run_dir, self.name)
        assert state is not None, self.output()
        return state

    def client(self) -> baton.Client:
        return baton.Client(self.state.address, timeout_s=300)

    def cli(self, *arguments: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        """Run a ``baton`` command of this cluster to its end."""
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli.main", *arguments, "--config", str(self.file)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def scale_router(self, number: int) -> None:
        """Have Ray Serve run so many routers."""
        (raylet,) = self.parts(RAYLET)
        (address,) = (
            word.partition("=")[2]
            for word in psutil.Process(raylet.pid).cmdline()
            if word.startswith("--gcs-address=")
        )
        settings = {  # its secret, and how it uses loopback
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

    def output(self) -> str:
        """What the launcher said, latest last."""
        return self.log.read_text()[-8000:]

    def router_said(self, words: str) -> list[str]:
        """Lines with ``words`` of the router's log."""
        logs = "ray/session_latest/logs/serve/replica_*_Router_*.log"
        files = [file for folder in self.state.folders for file in Path(folder).glob(logs)]
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [line for line in lines if words in line]

    def workers(self, pool: Pool | None = None) -> list[WorkerRecord]:
        """The leases that hold now; none while the store is away."""
        with suppress(UnavailableError):
            return [each for each in read_workers(self.state) if pool in (None, each.pool)]
        return []

    def parts(self, kind: str | None = None) -> list[Part]:
        """Its living processes of ``kind``, or of all the kinds there are, oldest first."""
        return parts_of(self.state.cluster_id, kind)

    def replica_of(self, worker: WorkerRecord) -> Part | None:
        """The process that serves ``worker``; None if it is dead, and only its lease lives."""
        port = int(worker.address.rpartition(":")[2])
        for part in self.parts(REPLICAS[worker.pool]):
            if port in _listening(part.pid):
                return part
        return None

    def engine_of(self, replica: Part) -> Part:
        """Its engine core."""
        children = psutil.Process(replica.pid).children(recursive=True)
        (engine,) = [child.pid for child in children if _kind(child.pid) == ENGINE]
        return Part(engine, ENGINE)

    def wait(self, condition: Callable[[], object], what: str, within_s: float = 60) -> None:
        """Fails with the launcher's output."""
        try:
            wait_until(condition, what=what, within_s=within_s)
        except AssertionError as error:
            error.add_note(self.output())
            raise

    def census(self) -> Counter[str]:
        """How many living processes of each kind there are."""
        return Counter(part.kind for part in self.parts())

    def whole(self) -> Counter[str]:
        """The census of an undisturbed cluster."""
        kinds = {ROUTER: 1, CONTROLLER: 1, STORE: 1, GCS: 1, RAYLET: 1}
        kinds |= {REPLICAS[pool]: size for pool, size in self.sizes.items()}
        return Counter(kinds | ({ENGINE: sum(self.sizes.values())} if self.has_engines else {}))

    def files(self) -> Counter[str]:
        """How many files and sockets a process of ours has open at most, by what it is."""
        found: Counter[str] = Counter()
        for kind in (ROUTER, *REPLICAS.values()):
            for part in self.parts(kind):
                found |= Counter({kind: _files(part)})
                if self.has_engines and kind != ROUTER:
                    found |= Counter({f"{kind} {ENGINE}": _files(self.engine_of(part))})
        return found

    def wait_files(self, at_first: Counter[str]) -> None:
        """Until no process has more open than ``files`` said then."""

        def open_still() -> list[str]:
            return [
                f"{kind} has {more} files more"
                for kind, more in (self.files() - at_first).items()
                if ENGINE in kind or more > _FILES_OF_RAY
            ]

        self._wait_alike(open_still, "what was opened has been closed")

    def wait_whole(self, within_s: float) -> None:
        """Until it is as an undisturbed cluster without a request."""
        self._wait_alike(self.unlike_whole, "the cluster is whole and idle", within_s)

    def _wait_alike(
        self, differences: Callable[[], list[str]], what: str, within_s: float = 60
    ) -> None:
        differs: list[str] = []

        def alike() -> bool:
            differs[:] = differences()
            return not differs

        try:
            self.wait(alike, what, within_s)
        except AssertionError as error:
            error.add_note("\n".join(differs))
            raise

    def unlike_whole(self) -> list[str]:
        """What differs from an undisturbed cluster without a request: nothing, when idle."""
        assert self.process.poll() is None, self.output()
        workers = self.workers()
        ready = Counter(each.pool for each in workers if each.state is WorkerState.READY)
        found = []
        if ready != Counter(self.sizes) or len(workers) != ready.total():
            found.append(f"workers: {[(each.id, each.state.value) for each in workers]}")
        for each in workers:
            load = each.load
            if load.kv_blocks_free < load.kv_blocks_total or load.running or load.queue_depth:
                found.append(f"{each.id} holds something: {load}")
        if not found and (census := self.census()) != self.whole():
            found.append(f"processes: {dict(census - self.whole())} too many")
            found.append(f"processes: {dict(self.whole() - census)} too few")
        return found


def parts_of(cluster_id: str, kind: str | None = None) -> list[Part]:
    """A cluster's living processes of ``kind``, or of all the kinds there are, oldest first."""
    found = [Part(pid, _kind(pid)) for pid in reaper.find(cluster_id)]
    wanted = _KINDS if kind is None else (kind,)
    return sorted((each for each in found if each.kind in wanted), key=_started)


def start(folder: Path, name: str, config: str, sizes: Mapping[Pool, int]) -> LiveCluster:
    """Start a cluster and wait until it is ready; ``stop`` ends it.

    Args:
        folder: for its files.
        config: YAML, without ``cluster``.
        sizes: workers by pool.
    """
    run_dir, file, log = folder / "run", folder / f"{name}.yaml", folder / f"{name}.log"
    settings = (
        f"name: {name}, run_dir: {run_dir}, start_timeout_s: {START_S}, stop_grace_s: {GRACE_S}, "
        f"connection_silence_s: {SILENCE_S}"
    )
    file.write_text(f"cluster: {{{settings}}}\n{config}")
    flags = [word for pool in Pool for word in (f"--{pool}", str(sizes[pool]))]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli.main", "up", "--config", str(file), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    has_engines = "engine_kind: fake" not in config
    cluster = LiveCluster(process, file, run_dir, name, dict(sizes), has_engines, log)

    def ready() -> bool:
        assert process.poll() is None, cluster.output()
        return "ready: gRPC" in log.read_text()

    try:
        cluster.wait(ready, "the cluster is ready", START_S)
    except BaseException:
        stop(cluster)
        raise
    return cluster


def stop(cluster: LiveCluster) -> None:
    """End it, by force if it takes long. Idempotent."""
    if cluster.process.poll() is None:
        cluster.process.send_signal(signal.SIGINT)
        try:
            cluster.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            cluster.process.kill()
            cluster.process.wait()


def _kind(pid: int) -> str:
    """The name of a process of interest; else its command line."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""  # ended meanwhile
    words = line.rstrip(b"\0 ").decode(errors="replace").split("\0")
    if _ENGINE_UNNAMED in line:
        return ENGINE
    program = words[0].rpartition("/")[2]
    for kind in _KINDS:
        # Ray adds the method that an actor is in.
        if program == kind or words[0] == kind or words[0].startswith(f"{kind}."):
            return kind
    return " ".join(words)


def _files(part: Part) -> int:
    try:
        return int(psutil.Process(part.pid).num_fds())
    except psutil.NoSuchProcess:
        return 0


def _started(part: Part) -> float:
    try:
        return float(psutil.Process(part.pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0


def _listening(pid: int) -> set[int]:
    with suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
    return set()
