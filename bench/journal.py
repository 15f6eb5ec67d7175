"""Measures what the journal costs.

With ``router.journal`` on, the router writes the tokens of each stream to Redis. A cluster with
fake engines runs with and without the journal. The measured values:

step      time between two responses of a stream, measured at the client, over all streams; the
          fake engine makes one token every 3 ms
cpu       CPU time of the router's process for one token, in microseconds
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

TOKENS = 500  # in each answer


@contextmanager
def cluster(*, journal: bool) -> Iterator[tuple[str, psutil.Process]]:
    """Run a cluster with fake engines. Yield the router's address and process."""
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


async def steps_ms(client: baton.AsyncClient, prompt_token: int) -> list[float]:
    """Run one stream. Return the times between its responses, starting at the second one."""
    stream = client.generate(token_ids=[prompt_token], temperature=0, max_tokens=TOKENS)
    at_s = [time.perf_counter() async for _ in stream]
    return [1000 * (after - before) for before, after in itertools.pairwise(at_s[1:])]


async def measure(address: str, router: psutil.Process, streams: int) -> dict[str, float]:
    async with baton.AsyncClient(address, timeout_s=120) as client:
        await steps_ms(client, 9)  # warm-up
        before_s = cpu_s(router)
        stream_steps_ms = await asyncio.gather(
            *(steps_ms(client, 10 + index) for index in range(streams))
        )
        cpu_us = 1e6 * (cpu_s(router) - before_s) / (streams * TOKENS)
    return summary("step", [ms for each in stream_steps_ms for ms in each]) | {
        "cpu_us": round(cpu_us)
    }


def measure_cluster(journal: bool) -> list[dict[str, object]]:
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
    # In one process, Ray keeps using the authentication token of the first cluster. Each cluster
    # therefore runs in its own process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as executor:
        for rows in executor.map(measure_cluster, (False, True, False, True)):
            for row in rows:
                report.add(**row)
    report.save()


if __name__ == "__main__":
    main()
