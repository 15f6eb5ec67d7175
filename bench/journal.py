"""Measures what the journal costs.

With ``router.journal`` on, the router writes the tokens of each stream to Redis. A cluster with
fake engines runs with and without the journal. The measured values:

step      time between two responses of a stream, measured at the client, over all streams; the
          fake engine makes one token every 3 ms
cpu       CPU time of the router's process for one token, in microseconds

``--fill S`` instead fills the journal for S seconds: many streams run one after the other, and no
entry expires. One row every 10 s, and one for the whole time:

store_mib       memory that the store uses
requests        requests that ended well
failed          all other requests
resumable       share of the sampled requests that could be resumed after their end
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

import baton
from baton.v1 import inference_pb2, inference_pb2_grpc
from bench.report import Report, summary
from cluster.cli.progress import Progress
from cluster.local import reaper
from cluster.local.launch import Cluster
from cluster.local.run_dir import ClusterState, read_state
from core.config.schema import Config, load_config
from core.state.redis import RedisClient

TOKENS = 500  # in each answer


FILL_STREAMS = 256  # at the same time
FILL_TOKENS = 700  # in each answer
FILL_SAMPLE = 50  # one of so many requests is resumed
FILL_ROW_S = 10
FILL_BUDGET_BYTES = 16 * 2**20  # full after about three minutes on two cores


@contextmanager
def cluster(**router: object) -> Iterator[tuple[str, ClusterState]]:
    """Run a cluster with fake engines and these settings of the router. Yield the router's address
    and the cluster's state."""
    fake = {"engine_kind": "fake"}
    config = load_config(
        overrides={
            "cluster.name": "bench",
            "router": {"port": 0, **router},
            "prefill": fake,
            "decode": fake,
        }
    )
    with Progress(sys.stderr) as progress, Cluster(config, progress.step) as running:
        progress.done()
        yield running.address, state_of(config)


def state_of(config: Config) -> ClusterState:
    state = read_state(config.cluster.run_path, config.cluster.name)
    assert state is not None
    return state


def router_process(state: ClusterState) -> psutil.Process:
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
    with cluster(journal=journal) as (address, state):
        router = router_process(state)
        return [
            {"measurement": "journal", "journal": journal, "streams": streams}
            | asyncio.run(measure(address, router, streams))
            for streams in (1, 8, 32)
        ]


@dataclass
class Fill:
    """The counts of a filled journal since the start."""

    requests: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by code and details
    sampled: int = 0
    resumable: int = 0

    def row(self, store_bytes: int) -> dict[str, object]:
        return {
            "measurement": "journal fill",
            "store_mib": round(store_bytes / 2**20, 1),
            "requests": self.requests,
            "failed": self.failed.total(),
            "resumable": round(self.resumable / max(1, self.sampled), 2),
        }


async def fill(address: str, state: ClusterState, seconds: float, report: Report) -> None:
    """Keep ``FILL_STREAMS`` streams running, and report every ``FILL_ROW_S``."""
    assert state.store is not None
    store = RedisClient(state.store.url, socket_timeout_s=5)
    clock = asyncio.get_running_loop().time
    counts, end_s = Fill(), clock() + seconds

    async def client_loop(stub: Any, number: int) -> None:
        for turn in itertools.count():
            if clock() >= end_s:
                return
            request = inference_pb2.GenerateRequest(
                request_id=f"fill-{number}-{turn}",
                token_ids=inference_pb2.TokenIds(ids=[number + 3, turn % 1000]),
                sampling=inference_pb2.SamplingParams(max_tokens=FILL_TOKENS, temperature=0),
            )
            try:
                responses = [each async for each in stub.Generate(request, timeout=600)]
            except grpc.aio.AioRpcError as error:
                counts.failed[f"{error.code().name}: {error.details()}"] += 1
                continue
            assert sum(len(each.token_ids) for each in responses) == FILL_TOKENS
            counts.requests += 1
            if counts.requests % FILL_SAMPLE == 0:
                token = responses[0].resume_token
                counts.resumable += await is_resumable(stub, request.request_id, token)
                counts.sampled += 1

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        loops = [asyncio.create_task(client_loop(stub, number)) for number in range(FILL_STREAMS)]
        while clock() < end_s:
            await asyncio.sleep(FILL_ROW_S)
            report.add(**counts.row(await used_bytes(store)))
        await asyncio.gather(*loops)
    report.add(**counts.row(await used_bytes(store)))
    print("failed:", dict(counts.failed), flush=True)
    await store.close()


async def used_bytes(store: RedisClient) -> int:
    (memory,) = await store.execute(("INFO", "memory"))
    return int(memory["used_memory"])


async def is_resumable(stub: Any, request_id: str, token: str) -> bool:
    """Whether the responses of an ended request can be had again."""
    request = inference_pb2.ResumeRequest(
        request_id=request_id, last_sequence=0, resume_token=token
    )
    while True:
        try:
            return [each async for each in stub.Resume(request, timeout=60)] != []
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return False
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            await asyncio.sleep(0.1)  # the router has not given the lease up yet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.journal", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fill", type=float, metavar="S", help="fill the journal for S seconds")
    args = parser.parse_args()
    report = Report(args.json)
    if args.fill:
        # One process serves more streams than it is fast enough for, so they wait long.
        patient = {"interactive": {"max_queue": FILL_STREAMS, "queue_timeout_s": 600}}
        with cluster(journal_ttl_s=3600, journal_max_bytes=FILL_BUDGET_BYTES, classes=patient) as (
            address,
            state,
        ):
            asyncio.run(fill(address, state, args.fill, report))
        report.save()
        return
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
