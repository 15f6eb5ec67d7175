"""What the journal costs: a cluster with fake engines, with and without it.

step      between two responses of one stream at the client (the fake engine makes one token each
          3 ms). With several streams, of all of them.
cpu       of the router's process for one token, microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

import baton
from bench.report import Report, summary
from cluster.cli.progress import Progress
from cluster.local import reaper
from cluster.local.launch import Cluster
from cluster.local.run_dir import read_state
from core.config.schema import Config, load_config

TOKENS = 500


@contextmanager
def cluster(*, journal: bool) -> Iterator[tuple[str, psutil.Process]]:
    fake = {"engine_kind": "fake"}
    config = load_config(
        overrides={
            "cluster.name": "bench",
            "router.port": 0,
            "router.journal": journal,
            "prefill": fake,
            "decode": fake,
        }
    )
    with Progress(sys.stderr) as progress, Cluster(config, progress.step) as running:
        progress.done()
        yield running.address, router_process(config)


def router_process(config: Config) -> psutil.Process:
    state = read_state(config.cluster.run_path, config.cluster.name)
    assert state is not None
    processes = [psutil.Process(pid) for pid in reaper.find(state.cluster_id)]
    (router,) = [each for each in processes if ":Router" in each.cmdline()[0]]
    return router


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def steps_ms(client: baton.AsyncClient, prompt: int) -> list[float]:
    """Times between the responses of one stream, but for the first two tokens."""
    at_s = []
    stream = client.generate(token_ids=[prompt], temperature=0, max_tokens=TOKENS)
    async for _ in stream:
        at_s.append(time.perf_counter())  # noqa: PERF401 - the time of each
    return [1000 * (b - a) for a, b in itertools.pairwise(at_s[1:])]


async def measure(address: str, router: psutil.Process, streams: int) -> dict[str, float]:
    async with baton.AsyncClient(address, timeout_s=120) as client:
        await steps_ms(client, 9)
        before_s = cpu_s(router)
        all_ms = await asyncio.gather(*(steps_ms(client, 10 + index) for index in range(streams)))
        cpu_us = 1e6 * (cpu_s(router) - before_s) / (streams * TOKENS)
    return summary("step", [ms for each in all_ms for ms in each]) | {"cpu_us": round(cpu_us)}


def rows(journal: bool) -> list[dict[str, object]]:
    with cluster(journal=journal) as (address, router):
        return [
            {"measurement": "journal", "journal": journal, "streams": streams}
            | asyncio.run(measure(address, router, streams))
            for streams in (1, 8, 32)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.journal", description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = Report(args.json)
    # Ray takes one cluster's token for a process's whole life.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as one_each:
        for result in one_each.map(rows, (False, True, False, True)):
            for row in result:
                report.add(**row)
    report.save()


if __name__ == "__main__":
    main()
