"""One real cluster for all end-to-end tests: `baton up` as a user starts it, two vLLM engines.

The tests run in the order of their file names: what changes the cluster comes last.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import baton
from tests.support.reference import greedy
from tests.support.waiting import wait_until

# float32: batching alone changes the last bits of bfloat16, and with them now and then a token.
CONFIG = """\
cluster:
  name: e2e
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(600))


@dataclass(frozen=True, slots=True)
class RunningCluster:
    process: subprocess.Popen[str]
    config_file: Path
    run_dir: Path
    log: Path
    address: str
    foreign_shared_memory: frozenset[str]  # in /dev/shm before the cluster began

    def client(self) -> baton.Client:
        return baton.Client(self.address)

    def cli(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a `baton` command of this cluster to its end."""
        return run_baton(*arguments, "--config", str(self.config_file), timeout_s=timeout_s)

    def workers(self) -> list[dict[str, Any]]:
        done = self.cli("status", "--json")
        assert done.returncode == 0, done.stderr
        workers: list[dict[str, Any]] = json.loads(done.stdout)["workers"]
        return workers

    def wait_idle(self) -> None:
        """Until every KV block of every worker is free and nothing is queued."""
        self.wait(
            lambda: all(
                worker["kv_blocks_free"] == worker["kv_blocks_total"] and not worker["queue_depth"]
                for worker in self.workers()
            ),
            "all KV blocks are free",
        )

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
        wait_until(condition, what=what, within_s=timeout_s)


def run_baton(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Random token ids: the next token hangs on every one of them, so a wrong block shows."""
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(tokens)]


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    prompt: list[int]


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


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    file = folder / "cluster.yaml"
    # Ray's sockets need a short path.
    file.write_text(CONFIG.format(port=free_port(), run_dir=f"/tmp/baton-e2e-{os.getpid()}"))
    return file


@pytest.fixture(scope="session")
def reference(config_file: Path) -> dict[str, list[int]]:
    """What an aggregated vLLM answers, by the name of the case."""
    cases = CASES + SHARED_PREFIX
    answers = greedy(config_file, [case.prompt for case in cases], MAX_TOKENS)
    return {case.name: answer for case, answer in zip(cases, answers, strict=True)}


@pytest.fixture(scope="session")
def cluster(
    config_file: Path, reference: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    log = tmp_path_factory.mktemp("log") / "up.log"
    run_dir = Path(f"/tmp/baton-e2e-{os.getpid()}")
    port = config_file.read_text().split("port: ")[1].split()[0]
    foreign = frozenset(os.listdir("/dev/shm"))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli.main", "up", "--config", str(config_file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    running = RunningCluster(process, config_file, run_dir, log, f"127.0.0.1:{port}", foreign)
    try:
        with running.client() as client:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()[-5000:]
                try:
                    return client.health(timeout_s=1)
                except baton.BatonError:
                    return False

            running.wait(ready, "the cluster answers", 300)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
