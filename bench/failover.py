"""Measures how long a stream pauses when its decode worker is killed (kill -9).

In each round, one stream runs on one of two decode workers, and this worker is killed. The next
round begins when a new worker has replaced the killed one.

next token    kill -> the first token of the second attempt at the client
break         kill -> the kernel closes the connections of the killed process; the benchmark sees
              this on its own connection to the worker
notice        break -> the router logs that the attempt failed and begins the second one; the
              log's times are in whole milliseconds
resume        the second attempt begins -> its first token at the client: the prefill worker
              computes the prompt and the tokens so far, and sends the next token
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import psutil

import baton
from bench.report import Report, spread
from bench.serving import fresh_prompt
from cluster.cli.progress import Progress
from cluster.local.launch import Cluster
from cluster.local.run_dir import read_state
from core.config.schema import load_config
from core.types import Pool, WorkerRecord, WorkerState

TOKENS = 300  # in an answer; enough to kill the worker in the middle of the answer
BEFORE_KILL = 30  # the worker is killed once the client has received this many tokens
REPLACE_TIMEOUT_S = 120.0  # a new worker must load the model and warm up
_POLL_S = 0.25

_ATTEMPT_FAILED = re.compile(
    r"^\w+ (?P<at>\S+ \S+) .* request (?P<id>\S+): attempt 1 failed after (?P<tokens>\d+) tokens",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Failover:
    """The times of one round; the module's docstring explains them."""

    next_token_ms: float
    break_ms: float
    notice_ms: float
    tokens_so_far: int
    step_ms: float  # median time between two tokens before the kill

    @property
    def resume_ms(self) -> float:
        return self.next_token_ms - self.break_ms - self.notice_ms


class WorkerConnection:
    """Connects to a worker and records when the connection breaks."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._broken_at: datetime | None = None
        self._thread = threading.Thread(target=self._read, name="worker-connection")
        self._thread.start()

    def wait_broken(self) -> datetime:
        """Wait until the connection breaks. Return the time of the break."""
        self._thread.join()
        self._socket.close()
        assert self._broken_at is not None
        return self._broken_at

    def _read(self) -> None:
        with suppress(ConnectionError):
            while self._socket.recv(4096):
                pass
        self._broken_at = datetime.now()


def fail_over(cluster: Cluster, client: baton.Client, prompt: list[int]) -> Failover:
    """Run one stream and kill its decode worker in the middle of it."""
    token_at: list[datetime] = []  # wall-clock times, because the router's log has these
    killed_at: datetime | None = None
    connection: WorkerConnection | None = None
    stream = client.generate(token_ids=prompt, temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for response in stream:
        token_at += [datetime.now()] * len(response.token_ids)
        if killed_at is None and len(token_at) >= BEFORE_KILL:
            running = [each for each in decode_workers(cluster) if each.load.running]
            if running:
                pid = listening_pid(running[0].address)
                connection = WorkerConnection(running[0].address)
                killed_at = datetime.now()
                os.kill(pid, signal.SIGKILL)
    if killed_at is None or connection is None or len(token_at) != TOKENS:
        raise RuntimeError(f"the stream ended too early, after {len(token_at)} tokens")
    broken_at = connection.wait_broken()
    noticed_at, tokens = first_attempt_failed(cluster, stream.request_id)
    gaps_s = [(later - each).total_seconds() for each, later in pairwise(token_at[1:tokens])]
    return Failover(
        next_token_ms=1000 * (token_at[tokens] - killed_at).total_seconds(),
        break_ms=1000 * (broken_at - killed_at).total_seconds(),
        notice_ms=1000 * (noticed_at - broken_at).total_seconds(),
        tokens_so_far=tokens,
        step_ms=1000 * statistics.median(gaps_s),
    )


def first_attempt_failed(cluster: Cluster, request_id: str) -> tuple[datetime, int]:
    """Read in the router's log when the first attempt failed, and after how many tokens."""
    config = cluster.config.cluster
    state = read_state(config.run_path, config.name)
    if state is None:
        raise RuntimeError("the cluster has stopped")
    logs = "ray/session_latest/logs/serve/replica_*_Router_*.log"
    for file in (file for folder in state.folders for file in Path(folder).glob(logs)):
        for line in _ATTEMPT_FAILED.finditer(file.read_text()):
            if line["id"] == request_id:
                return datetime.strptime(line["at"], "%Y-%m-%d %H:%M:%S,%f"), int(line["tokens"])
    raise RuntimeError(f"the router's log has no failed attempt of request {request_id}")


def listening_pid(address: str) -> int:
    """Return the id of the process that listens at "host:port" on this machine."""
    port = int(address.rpartition(":")[2])
    for each in psutil.net_connections("tcp"):
        if each.laddr.port == port and each.status == psutil.CONN_LISTEN and each.pid:
            return int(each.pid)
    raise RuntimeError(f"no process listens at {address}")


def decode_workers(cluster: Cluster) -> list[WorkerRecord]:
    return [each for each in cluster.workers() if each.pool is Pool.DECODE]


def wait_replaced(cluster: Cluster, before: Sequence[WorkerRecord]) -> None:
    """Wait until a new worker has replaced the killed one of the workers in ``before``."""
    known = {each.id for each in before}
    deadline_s = time.monotonic() + REPLACE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        now = decode_workers(cluster)
        ready = {each.id for each in now if each.state is WorkerState.READY}
        if len(now) == len(ready) == len(known) and len(ready - known) == 1:
            return
        time.sleep(_POLL_S)
    raise RuntimeError(f"no worker replaced the killed one within {REPLACE_TIMEOUT_S:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.failover", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = Report(args.json)
    rng = random.Random(args.prompt)
    config = load_config(
        overrides={
            "cluster.name": "bench",
            "router.port": 0,
            "model.max_model_len": 2048,
            "decode.replicas": 2,
        }
    )
    failovers: list[Failover] = []
    with Progress(sys.stderr) as progress, Cluster(config, progress.step) as cluster:
        progress.done()
        with baton.Client(cluster.address, timeout_s=120) as client:
            client.complete(token_ids=fresh_prompt(args.prompt, rng), max_tokens=8)  # warm-up
            for _ in range(args.rounds):
                before = decode_workers(cluster)
                failovers.append(fail_over(cluster, client, fresh_prompt(args.prompt, rng)))
                wait_replaced(cluster, before)
    report.add(
        measurement="failover",
        prompt_tokens=args.prompt,
        tokens_so_far_p50=int(statistics.median(each.tokens_so_far for each in failovers)),
        **spread("next_token", [each.next_token_ms for each in failovers]),
        **spread("break", [each.break_ms for each in failovers]),
        **spread("notice", [each.notice_ms for each in failovers]),
        **spread("resume", [each.resume_ms for each in failovers]),
        **spread("decode_step", [each.step_ms for each in failovers]),
        rounds=len(failovers),
    )
    report.save()


if __name__ == "__main__":
    main()
