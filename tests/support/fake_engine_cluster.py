"""Runs ``baton up`` with fake engines in a separate process.

The engines simulate the model and the KV transfer. Everything else is real.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import baton
from cluster.local import reaper
from cluster.local.run_dir import ClusterState, read_state
from tests.support import waiting

# A start takes about 10 s. If a worker process does not register with Ray within 60 s
# (worker_register_timeout_seconds), Ray starts a new process, and the start takes 60 s longer.
START_S = 120.0
GONE_S = 15.0  # the longest that a cluster may take to end and remove everything
PROMPT = [5, 6, 7]

_CONFIG = """\
cluster: {{name: {name}, run_dir: {run_dir}, start_timeout_s: {start_s}, stop_grace_s: 8{more}}}
model: {{path: {model}}}
router: {{port: 0}}
prefill: {{engine_kind: fake}}
decode: {{engine_kind: fake}}
"""


@dataclass(kw_only=True)
class FakeEngineCluster:
    """A cluster that ``start`` has launched. It may not be ready yet."""

    config_file: Path
    run_dir: Path
    name: str
    launcher: subprocess.Popen[str]
    log: Path
    pids: set[int] = field(default_factory=set)  # processes that must have no open port at the end

    @property
    def state(self) -> ClusterState:
        state = read_state(self.run_dir, self.name)
        assert state is not None, self.log.read_text()
        return state

    def client(self) -> baton.Client:
        return baton.Client(self.state.address, timeout_s=30)

    def complete(self, prompt: list[int], max_tokens: int) -> baton.Completion:
        with self.client() as client:
            return client.complete(token_ids=prompt, max_tokens=max_tokens, temperature=0.0)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a ``baton`` command on this cluster and wait for its end."""
        return run_baton(*arguments, "--config", str(self.config_file))

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a ``baton`` command on this cluster. The caller waits for its end."""
        return subprocess.Popen(
            [*_command(*arguments), "--config", str(self.config_file)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def workers(self) -> list[dict[str, Any]]:
        """Return the workers that ``baton status --json`` lists."""
        done = self.cli("status", "--json")
        assert done.returncode == 0, done.stderr
        workers: list[dict[str, Any]] = json.loads(done.stdout)["workers"]
        return workers

    def ids(self, pool: str) -> set[str]:
        """Return the ids of the workers of ``pool``."""
        return {worker["id"] for worker in self.workers() if worker["pool"] == pool}

    def resize(self, workers_per_pool: int) -> None:
        """Give each pool ``workers_per_pool`` workers. Wait until all are ready and idle."""
        wanted = sorted(["prefill", "decode"] * workers_per_pool)
        if sorted(worker["pool"] for worker in self.workers()) != wanted:
            done = self.cli("scale", f"prefill={workers_per_pool}", f"decode={workers_per_pool}")
            assert done.returncode == 0, done.stderr

        def is_settled() -> bool:
            workers = self.workers()
            return sorted(worker["pool"] for worker in workers) == wanted and all(
                worker["state"] == "ready"
                and worker["kv_blocks_free"] == worker["kv_blocks_total"]
                and not worker["queue_depth"]
                for worker in workers
            )

        self.wait(is_settled)

    def replicas(self) -> dict[int, str]:
        """Return the deployment of each Ray Serve replica, by process id."""
        found = {}
        for pid in reaper.find(self.state.cluster_id):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode()
            if title.startswith("ray::ServeReplica:"):
                # While the process runs a method, its title ends with that method's name.
                found[pid] = title.rpartition(":")[2].partition(".")[0]
        return found

    def replica(self, deployment: str) -> int:
        """Return the process id of a replica of ``deployment``."""
        return next(pid for pid, name in self.replicas().items() if name == deployment)

    def is_ready(self) -> bool:
        """Whether the launcher has reported "ready". Fails if the launcher has ended."""
        assert self.launcher.poll() is None, self.log.read_text()
        return "ready: gRPC" in self.log.read_text()

    def wait(self, condition: Callable[[], bool], within_s: float = 30) -> None:
        wait_or_show_log(condition, within_s, self.log)

    def kill(self) -> None:
        """Kill the launcher, which ends the cluster. Idempotent."""
        self.launcher.kill()
        self.launcher.wait()


def run_baton(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a ``baton`` command and wait for its end."""
    return subprocess.run(
        _command(*arguments), capture_output=True, text=True, timeout=60, check=False
    )


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli.main", *arguments]


def write_config(folder: Path, model: Path, name: str, more: str = "") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(
        _CONFIG.format(name=name, run_dir=folder / "run", model=model, start_s=START_S, more=more)
    )
    return file


def start(
    folder: Path, model: Path, name: str, *arguments: str, settings: str = ""
) -> FakeEngineCluster:
    """Launch a cluster without waiting until it is ready. The caller must ``kill`` it.

    Args:
        folder: gets the cluster's configuration, log and run directory.
        model: a folder that ``word_model.write_word_model`` has written.
        arguments: more arguments of ``baton up``.
        settings: more settings of the section ``cluster``, such as ", role_change: true".
    """
    config_file = write_config(folder, model, name, settings)
    log = folder / f"{name}.log"
    with log.open("w") as output:
        launcher = subprocess.Popen(
            [*_command("up", "--config", str(config_file)), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return FakeEngineCluster(
        config_file=config_file, run_dir=folder / "run", name=name, launcher=launcher, log=log
    )


def wait_or_show_log(condition: Callable[[], bool], within_s: float, log: Path) -> None:
    """Wait for ``condition``. If it takes too long, fail with the launcher's log."""
    try:
        waiting.wait_until(condition, what="the cluster is as expected", within_s=within_s)
    except AssertionError as error:
        raise AssertionError(log.read_text()) from error


def check_nothing_is_left(cluster: FakeEngineCluster, state: ClusterState) -> None:
    """Check that the processes, folders and port of ``state`` are gone within ``GONE_S``."""

    def is_gone() -> bool:
        folders = [cluster.run_dir, *map(Path, state.folders)]
        return not reaper.find(state.cluster_id) and not any(f.exists() for f in folders)

    wait_or_show_log(is_gone, GONE_S, cluster.log)
    host, _, port = state.address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))
    assert not listening_sockets(cluster.pids)


def listening_sockets(pids: set[int]) -> dict[str, str]:
    """Return the line of ``ss`` for each address on which one of ``pids`` listens, by address."""
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in lines.splitlines():
        if {int(pid) for pid in re.findall(r"pid=(\d+)", line)} & pids:
            found[line.split()[3]] = line
    return found
