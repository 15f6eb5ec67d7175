"""Measures what an idle cluster costs: memory and CPU time, by kind of process.

A cluster starts with the default configuration. After it has been idle for a while, each row shows
one kind of process:

processes  how many there are
pss_mib    their memory; memory that several processes share counts in equal parts
rss_mib    their resident memory; shared memory counts in each
cpu_ms     their CPU time per second
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.journal import state_of
from bench.report import Report
from cluster.cli.progress import Progress
from cluster.local import reaper
from cluster.local.launch import Cluster
from core.config.schema import load_config

SETTLE_S = 20.0  # after the start, some processes are still busy or about to end
MEASURE_S = 30.0


@dataclass
class Kind:
    """The sums over all processes of one kind."""

    processes: int = 0
    pss_bytes: int = 0
    rss_bytes: int = 0
    cpu_s: float = 0.0


def kind_of(process: psutil.Process) -> str:
    """Return a short name: the title that a process has given itself, or its program's."""
    line = process.cmdline()
    if not line:
        return str(process.name())
    title = line[0].strip()
    if title.startswith(("ray::", "VLLM::")):
        return str(title.split(" ")[0])
    words = [Path(word).name for word in line if not word.startswith("-")]
    return " ".join(words[:3])


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(cluster_id: str) -> dict[str, Kind]:
    """Return the kinds of processes of a cluster, and of this process, which is its launcher."""
    time.sleep(SETTLE_S)
    pids = {*reaper.find(cluster_id), os.getpid()}
    processes = [psutil.Process(pid) for pid in pids]
    before_s = {process.pid: cpu_s(process) for process in processes}
    time.sleep(MEASURE_S)
    kinds: dict[str, Kind] = collections.defaultdict(Kind)
    for process in processes:
        name = "launcher" if process.pid == os.getpid() else kind_of(process)
        kind, memory = kinds[name], process.memory_full_info()
        kind.processes += 1
        kind.pss_bytes += memory.pss
        kind.rss_bytes += memory.rss
        kind.cpu_s += cpu_s(process) - before_s[process.pid]
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fake", action="store_true", help="fake engines instead of vLLM")
    args = parser.parse_args()
    report = Report(args.json)
    overrides: dict[str, object] = {"cluster.name": "bench", "router.port": 0}
    if args.fake:
        overrides |= {pool: {"engine_kind": "fake"} for pool in ("prefill", "decode")}
    config = load_config(overrides=overrides)
    with Progress(sys.stderr) as progress, Cluster(config, progress.step):
        progress.done()
        kinds = measure(state_of(config).cluster_id)
    kinds["total"] = Kind(
        sum(kind.processes for kind in kinds.values()),
        sum(kind.pss_bytes for kind in kinds.values()),
        sum(kind.rss_bytes for kind in kinds.values()),
        sum(kind.cpu_s for kind in kinds.values()),
    )
    for name, kind in sorted(kinds.items(), key=lambda item: item[1].pss_bytes):
        report.add(
            measurement="idle",
            kind=name,
            processes=kind.processes,
            pss_mib=round(kind.pss_bytes / 2**20, 1),
            rss_mib=round(kind.rss_bytes / 2**20, 1),
            cpu_ms=round(1000 * kind.cpu_s / MEASURE_S, 1),
        )
    report.save()


if __name__ == "__main__":
    main()
