"""Starts one real cluster for all end-to-end tests, with ``baton up``, as a user does.

The cluster has one prefill worker and one decode worker, each with a vLLM engine. The test files
run in any order, except that the tests marked ``ends_cluster`` run last. A test that changes the
cluster's workers ends with ``RunningCluster.wait_restored``. If a test expects a prompt to be
uncached, no test of another file uses the prompt.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import baton
from cluster.local.ports import free_port
from cluster.local.run_dir import read_state
from core.types import Pool
from tests.support.live_cluster import REPLICAS, ClusterProcess, processes_of
from tests.support.prompts import random_prompt
from tests.support.reference import greedy
from tests.support.run_order import run_cluster_ends_last
from tests.support.waiting import wait_until

NAME = "e2e"
HOST = "127.0.0.1"
# float32: in bfloat16, batching alone changes the last bits of the logits and sometimes a token.
CONFIG = """\
cluster:
  name: {name}
  run_dir: {run_dir}
  start_timeout_s: 300
model:
  dtype: float32
  max_model_len: 2048
router:
  port: {port}
prefill:
  cpu_binding: ["0"]
  engine: {{max_num_batched_tokens: 256}}
decode:
  cpu_binding: ["1"]
  engine: {{max_num_batched_tokens: 256}}
"""
MAX_TOKENS = 24
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_here(item):
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(600))
    run_cluster_ends_last(items, lambda item: HERE if _is_here(item) else None)


def _is_here(item: pytest.Item) -> bool:
    return item.path.is_relative_to(HERE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """The shared cluster, as its user sees it."""

    launcher: subprocess.Popen[str]
    config_file: Path
    run_dir: Path
    log: Path
    address: str
    foreign_shared_memory: frozenset[str]  # names in /dev/shm before the cluster started

    def client(self) -> baton.Client:
        return baton.Client(self.address)

    def cli(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a ``baton`` command on this cluster and wait for its end."""
        return run_baton(*arguments, "--config", str(self.config_file), timeout_s=timeout_s)

    def workers(self) -> list[dict[str, Any]]:
        """Return the workers that ``baton status --json`` lists."""
        done = self.cli("status", "--json")
        assert done.returncode == 0, done.stderr
        workers: list[dict[str, Any]] = json.loads(done.stdout)["workers"]
        return workers

    def worker_processes(self, pool: Pool) -> list[ClusterProcess]:
        """Return the living worker processes of ``pool``, oldest first."""
        state = read_state(self.run_dir, NAME)
        assert state is not None, "the cluster is not running"
        return processes_of(state.cluster_id, REPLICAS[pool])

    def wait_idle(self) -> None:
        """Wait until every KV block of every worker is free and nothing is queued."""
        self.wait(
            lambda: all(
                worker["kv_blocks_free"] == worker["kv_blocks_total"] and not worker["queue_depth"]
                for worker in self.workers()
            ),
            "all KV blocks are free",
        )

    def wait_restored(self) -> None:
        """Wait until each pool has exactly one worker, as after the start of the cluster. It must
        be ready and idle, and no process of another worker may be left."""

        def is_restored() -> bool:
            found = sorted((worker["pool"], worker["state"]) for worker in self.workers())
            return found == [("decode", "ready"), ("prefill", "ready")] and all(
                len(self.worker_processes(pool)) == 1 for pool in Pool
            )

        self.wait(is_restored, "the cluster has its initial size again", 60)
        self.wait_idle()

    def wait(self, condition: Callable[[], bool], what: str, within_s: float = 30) -> None:
        wait_until(condition, what=what, within_s=within_s)


def run_baton(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt of token ids."""

    name: str
    prompt: list[int]


# tests/e2e/test_exact.py expects these prompts and those of SHARED_PREFIX to be uncached at first.
# No other file uses them.
CASES = [
    Case("one token", random_prompt(1, 1)),
    Case("shorter than a block", random_prompt(50, 2)),
    Case("one short of a block", random_prompt(127, 3)),
    Case("exactly a block", random_prompt(128, 4)),
    Case("a block and one", random_prompt(129, 5)),
    Case("exactly a prefill chunk", random_prompt(256, 6)),
    Case("a chunk and a part", random_prompt(300, 7)),
    Case("exactly two chunks", random_prompt(512, 8)),
    Case("many chunks", random_prompt(1100, 9)),
    *(Case(f"batch {index}", random_prompt(40 + 37 * index, 20 + index)) for index in range(8)),
]
# 640 tokens are five whole blocks, and two and a half steps of a prefill worker.
SHARED_PREFIX = [
    Case(f"shared {index}", random_prompt(640, 90) + random_prompt(20, 91 + index))
    for index in range(4)
]
BYSTANDER = Case("bystander", random_prompt(129, 10))
AFTER_REPLACEMENT = Case("after the prefill worker was replaced", random_prompt(1100, 11))


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("e2e") / "cluster.yaml"
    file.write_text(CONFIG.format(name=NAME, port=free_port(HOST), run_dir=_run_dir()))
    return file


def _run_dir() -> Path:
    return Path(f"/tmp/baton-e2e-{os.getpid()}")  # the paths of Ray's sockets must be short


@pytest.fixture(scope="session")
def reference(config_file: Path) -> dict[str, list[int]]:
    """The tokens that an aggregated vLLM generates, by the name of the case."""
    cases = [*CASES, *SHARED_PREFIX, BYSTANDER, AFTER_REPLACEMENT]
    answers = greedy(config_file, [case.prompt for case in cases], MAX_TOKENS)
    return {case.name: answer for case, answer in zip(cases, answers, strict=True)}


@pytest.fixture(scope="session")
def cluster(
    config_file: Path, reference: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    log = tmp_path_factory.mktemp("log") / "up.log"
    port = config_file.read_text().split("port: ")[1].split()[0]
    foreign = frozenset(os.listdir("/dev/shm"))
    with log.open("w") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli.main", "up", "--config", str(config_file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    running = RunningCluster(
        launcher=launcher,
        config_file=config_file,
        run_dir=_run_dir(),
        log=log,
        address=f"{HOST}:{port}",
        foreign_shared_memory=foreign,
    )
    try:
        with running.client() as client:

            def is_ready() -> bool:
                assert launcher.poll() is None, log.read_text()[-5000:]
                try:
                    return client.health(timeout_s=1)
                except baton.BatonError:
                    return False

            running.wait(is_ready, "the cluster answers", 300)
        yield running
    finally:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGINT)
            try:
                launcher.wait(60)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
