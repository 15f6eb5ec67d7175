"""Sends ten times as many requests as a cluster with fake engines can serve.

peak        requests per second that succeed while a fixed number of clients send requests, each
            client one at a time
goodput     requests per second that succeed by their deadline during the overload. For
            ``--seconds``, requests arrive as a Poisson process at ``--times`` times the peak
share       goodput / peak
refused_ms  time until a refusal with QUEUE_FULL or WOULD_BE_LATE
late        requests that have not ended one second after their deadline
recovery_s  from the end of the overload until the last request is sent that fails or is slow. Slow
            means a TTFT of more than twice the longest TTFT before the overload. Before and after
            the overload, requests arrive at half the peak
rss         memory of the router's process in MiB: after ten seconds of overload, and its maximum
            from then on
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import baton
from bench.journal import router_process, state_of
from bench.report import Report, summary
from cluster.cli.progress import Progress
from cluster.local.launch import Cluster
from core.config.schema import load_config

PROMPT_TOKENS = 250  # 50 ms in the fake prefill engine, which computes one prompt at a time
ANSWER_TOKENS = 40  # 3 ms each in the fake decode engine
CLIENTS = 32
PEAK_S = 15.0
NORMAL_S = 10.0
LATE_S = 1.0  # a request counts as late this long after its deadline
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended. Times are in seconds on the monotonic clock."""

    sent_s: float
    first_s: float | None
    ended_s: float
    status: str  # "ok" or the reason of the error


class Load:
    """Sends requests and returns their outcomes."""

    def __init__(self, client: baton.AsyncClient, deadline_s: float, rng: random.Random) -> None:
        self._client = client
        self._deadline_s = deadline_s
        self._rng = rng

    async def send_one(self) -> Outcome:
        prompt = [self._rng.randrange(3, 1000) for _ in range(PROMPT_TOKENS)]
        sent_s, first_s = time.monotonic(), None
        status = "ok"
        stream = self._client.generate(
            token_ids=prompt, temperature=0, max_tokens=ANSWER_TOKENS, timeout_s=self._deadline_s
        )
        try:
            async for _ in stream:
                first_s = first_s or time.monotonic()
        except baton.BatonError as error:
            status = error.reason
        return Outcome(sent_s, first_s, time.monotonic(), status)

    async def closed_loop(self, clients: int, seconds: float) -> list[Outcome]:
        """Run this many clients. Each sends a request when its previous request has ended."""
        end_s = time.monotonic() + seconds
        outcomes = []

        async def client() -> None:
            while time.monotonic() < end_s:
                outcomes.append(await self.send_one())

        await asyncio.gather(*(client() for _ in range(clients)))
        return outcomes

    async def open_loop(self, rate: float, seconds: float) -> list[Outcome]:
        """Send requests as a Poisson process of ``rate`` per second, without awaiting answers."""
        begin_s = next_s = time.monotonic()
        tasks = []
        while next_s < begin_s + seconds:
            await asyncio.sleep(next_s - time.monotonic())
            tasks.append(asyncio.create_task(self.send_one()))
            next_s += self._rng.expovariate(rate)
        return await asyncio.gather(*tasks)


def goodput(outcomes: Sequence[Outcome], begin_s: float, seconds: float) -> float:
    """Return successes per second in the ``seconds`` after ``begin_s``."""
    end_s = begin_s + seconds
    done = [each for each in outcomes if each.status == "ok" and begin_s <= each.ended_s < end_s]
    return len(done) / seconds


def ttft_s(outcome: Outcome) -> float:
    """Return the time to the first token; infinite if there was none."""
    return outcome.first_s - outcome.sent_s if outcome.first_s is not None else float("inf")


async def watch_rss(process: psutil.Process, rss: list[int]) -> None:
    """Append the memory of the process, in bytes, once a second."""
    while True:
        rss.append(process.memory_info().rss)
        await asyncio.sleep(1)


async def measure(
    address: str, router: psutil.Process, args: argparse.Namespace, deadline_s: float
) -> dict[str, Any]:
    rng = random.Random(1)
    async with baton.AsyncClient(address, timeout_s=60) as client:
        patient = Load(client, 60, rng)
        await patient.closed_loop(CLIENTS, 3)  # warm-up
        begin_s = time.monotonic()
        peak_per_s = goodput(await patient.closed_loop(CLIENTS, PEAK_S), begin_s + 1, PEAK_S - 1)
        load = Load(client, deadline_s, rng)
        normal_ttft_s = max(map(ttft_s, await load.open_loop(peak_per_s / 2, NORMAL_S)))

        rss: list[int] = []
        watch = asyncio.create_task(watch_rss(router, rss))
        begin_s = time.monotonic()
        overload = asyncio.create_task(load.open_loop(args.times * peak_per_s, args.seconds))
        await asyncio.sleep(args.seconds)
        end_s = time.monotonic()
        after = await load.open_loop(peak_per_s / 2, NORMAL_S)
        outcomes = await overload
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
    not_recovered_s = [
        each.sent_s for each in after if ttft_s(each) > 2 * normal_ttft_s or each.status != "ok"
    ]
    goodput_per_s = goodput(outcomes, begin_s, args.seconds)
    refused = [each for each in outcomes if each.status in ("QUEUE_FULL", "WOULD_BE_LATE")]
    statuses = Counter(each.status for each in outcomes)
    late = [each for each in outcomes if each.ended_s > each.sent_s + deadline_s + LATE_S]
    return {
        "peak_per_s": round(peak_per_s, 1),
        "goodput_per_s": round(goodput_per_s, 1),
        "share": round(goodput_per_s / peak_per_s, 3),
        "sent": len(outcomes),
        **{f"ended_{status}": count for status, count in statuses.items()},
        "late": len(late),
        **summary("refused", [1000 * (each.ended_s - each.sent_s) for each in refused]),
        **summary("ttft", [1000 * ttft_s(each) for each in outcomes if each.status == "ok"]),
        "normal_ttft_ms_max": round(1000 * normal_ttft_s, 1),
        "recovery_s": round(max(not_recovered_s) - end_s, 2) if not_recovered_s else 0.0,
        "rss_mib_at_10_s": round(rss[10] / MIB, 1),
        "rss_mib_max": round(max(rss[10:]) / MIB, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--deadline", type=float, default=10, metavar="SECONDS")
    parser.add_argument("--queue-timeout", type=float, default=1, metavar="SECONDS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = Report(args.json)
    fake = {"engine_kind": "fake"}
    config = load_config(
        overrides={
            "cluster.name": "bench",
            "router.port": 0,
            "router.classes": {"interactive": {"queue_timeout_s": args.queue_timeout}},
            "prefill": fake,
            "decode": fake,
        }
    )
    with Progress(sys.stderr) as progress, Cluster(config, progress.step) as cluster:
        progress.done()
        router = router_process(state_of(config))
        row = asyncio.run(measure(cluster.address, router, args, args.deadline))
        report.add(
            measurement="overload",
            times=args.times,
            deadline_s=args.deadline,
            queue_timeout_s=args.queue_timeout,
            **row,
        )
    report.save()


if __name__ == "__main__":
    main()
