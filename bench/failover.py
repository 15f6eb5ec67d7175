"""How long a stream stands still when its decode worker dies (kill -9): one stream, two decode
workers, one of them killed in each round; the next round waits until another has replaced it.

next token    kill -> the next token at the client
break         kill -> the kernel has ended the process and closes its connections, as one of the
              benchmark's own shows
notice        that -> the router begins another attempt, as its log says (to the millisecond)
resume        that -> the next token: the prefill worker reads the prompt and the tokens so far,
              their KV goes to the other decode worker, and that makes its first step
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

TOKENS = 300  # of an answer; long enough to be killed in the middle of
BEFORE_KILL = 30  # tokens that the client has by then, at least
WHOLE_S = 120.0
_POLL_S = 0.25

_FAILED = re.compile(
    r"^\w+ (?P<at>\S+ \S+) .* request (?P<id>\S+): attempt 1 failed after (?P<tokens>\d+) tokens",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Failover:
    next_token_ms: float
    break_ms: float
    notice_ms: float
    tokens_so_far: int
    step_ms: float  # median time between two tokens when nothing is wrong

    @property
    def resume_ms(self) -> float:
        return self.next_token_ms - self.break_ms - self.notice_ms


class Wire:
    """A connection to a worker, for when it breaks."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._broken: datetime | None = None
        self._thread = threading.Thread(target=self._read, name="wire")
        self._thread.start()

    def broken(self) -> datetime:
        """Waits until it is."""
        self._thread.join()
        self._socket.close()
        assert self._broken is not None
        return self._broken

    def _read(self) -> None:
        with suppress(ConnectionError):
            while self._socket.recv(4096):
                pass
        self._broken = datetime.now()


def fail_over(cluster: Cluster, client: baton.Client, prompt: list[int]) -> Failover:
    """Run one stream and kill its decode worker under way."""
    at: list[datetime] = []  # of each token; the log has wall-clock times, too
    killed: datetime | None = None
    wire: Wire | None = None
    stream = client.generate(token_ids=prompt, temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for response in stream:
        at += [datetime.now()] * len(response.token_ids)
        if killed is None and len(at) >= BEFORE_KILL:
            running = [each for each in decode_workers(cluster) if each.load.running]
            if running:
                pid = listener(running[0].address)
                wire = Wire(running[0].address)
                killed = datetime.now()
                os.kill(pid, signal.SIGKILL)
    if killed is None or wire is None or len(at) != TOKENS:
        raise RuntimeError(f"the stream ended too early, after {len(at)} tokens")
    broken = wire.broken()
    begun, tokens = begun_again(cluster, stream.request_id)
    gaps_s = [(later - each).total_seconds() for each, later in pairwise(at[1:tokens])]
    return Failover(
        next_token_ms=1000 * (at[tokens] - killed).total_seconds(),
        break_ms=1000 * (broken - killed).total_seconds(),
        notice_ms=1000 * (begun - broken).total_seconds(),
        tokens_so_far=tokens,
        step_ms=1000 * statistics.median(gaps_s),
    )


def begun_again(cluster: Cluster, request_id: str) -> tuple[datetime, int]:
    """When the router gave the first attempt up, and how many tokens there were."""
    config = cluster.config.cluster
    state = read_state(config.run_path, config.name)
    if state is None:
        raise RuntimeError("the cluster has ended")
    logs = "ray/session_latest/logs/serve/replica_*_Router_*.log"
    for file in (file for folder in state.folders for file in Path(folder).glob(logs)):
        for line in _FAILED.finditer(file.read_text()):
            if line["id"] == request_id:
                return datetime.strptime(line["at"], "%Y-%m-%d %H:%M:%S,%f"), int(line["tokens"])
    raise RuntimeError(f"the router's log says nothing of {request_id}")


def listener(address: str) -> int:
    """The process that listens at "host:port" on this machine."""
    port = int(address.rpartition(":")[2])
    for each in psutil.net_connections("tcp"):
        if each.laddr.port == port and each.status == psutil.CONN_LISTEN and each.pid:
            return int(each.pid)
    raise RuntimeError(f"nobody listens at {address}")


def decode_workers(cluster: Cluster) -> list[WorkerRecord]:
    return [each for each in cluster.workers() if each.pool is Pool.DECODE]


def wait_whole(cluster: Cluster, before: Sequence[WorkerRecord]) -> None:
    """Until another worker stands in the place of the one of ``before`` that was killed."""
    known = {each.id for each in before}
    deadline_s = time.monotonic() + WHOLE_S
    while time.monotonic() < deadline_s:
        now = decode_workers(cluster)
        ready = {each.id for each in now if each.state is WorkerState.READY}
        if len(now) == len(ready) == len(known) and len(ready - known) == 1:
            return
        time.sleep(_POLL_S)
    raise RuntimeError(f"after {WHOLE_S:.0f} s no other worker has replaced the one that died")


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
    found: list[Failover] = []
    with Progress(sys.stderr) as progress, Cluster(config, progress.step) as cluster:
        progress.done()
        with baton.Client(cluster.address, timeout_s=120) as client:
            client.complete(token_ids=fresh_prompt(args.prompt, rng), max_tokens=8)  # warm-up
            for _ in range(args.rounds):
                before = decode_workers(cluster)
                found.append(fail_over(cluster, client, fresh_prompt(args.prompt, rng)))
                wait_whole(cluster, before)
    report.add(
        measurement="failover",
        prompt_tokens=args.prompt,
        tokens_so_far_p50=int(statistics.median(each.tokens_so_far for each in found)),
        **spread("next_token", [each.next_token_ms for each in found]),
        **spread("break", [each.break_ms for each in found]),
        **spread("notice", [each.notice_ms for each in found]),
        **spread("resume", [each.resume_ms for each in found]),
        **spread("decode_step", [each.step_ms for each in found]),
        rounds=len(found),
    )
    report.save()


if __name__ == "__main__":
    main()
