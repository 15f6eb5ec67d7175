"""Tokens arrive as they are decoded. A cancelled request frees its KV blocks on both workers.

Below, P and D are the prefill and the decode worker.
"""

from __future__ import annotations

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from threading import Timer

import baton
from tests.e2e.conftest import RunningCluster
from tests.support.prompts import random_prompt


def test_tokens_arrive_one_by_one(cluster: RunningCluster) -> None:
    with cluster.client() as client:
        stream = client.generate(
            token_ids=random_prompt(200, 80), temperature=0, max_tokens=60, ignore_eos=True
        )
        responses, arrived_s = [], []
        for response in stream:
            responses.append(response)
            arrived_s.append(time.monotonic())
    assert [response.sequence for response in responses] == list(range(len(responses)))
    with_tokens = [response for response in responses if response.token_ids]
    assert len(with_tokens) >= 55, "responses held several tokens each"
    gaps_s = [after - before for before, after in pairwise(arrived_s)]
    stream_s = arrived_s[-1] - arrived_s[0]
    assert max(gaps_s) < stream_s / 3, "one pause took a third of the stream"
    assert statistics.median(gaps_s) > stream_s / 200, "most responses came in bursts"


def test_the_first_token_does_not_wait_for_the_decode_worker(cluster: RunningCluster) -> None:
    """The router forwards P's token before D has decoded the second one."""
    with cluster.client() as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            client.complete,
            token_ids=random_prompt(300, 81),
            temperature=0,
            max_tokens=20,
            ignore_eos=True,
        ).result()
    phases = answer.phases
    # TTFT ended before the second token reached the router.
    assert phases.handoff_ms > 0
    assert phases.ttft_ms < phases.queue_ms + phases.prefill_ms + phases.handoff_ms
    first = answer.token_ids[0]
    with cluster.client() as client:
        stream = client.generate(
            token_ids=random_prompt(300, 81), temperature=0, max_tokens=20, ignore_eos=True
        )
        opening = next(iter(stream))
        assert list(opening.token_ids) == [first], "the first response holds more than P's token"
        stream.close()


def test_fifty_cancels_leave_nothing_behind(cluster: RunningCluster) -> None:
    rng = random.Random(5)
    cluster.wait_idle()

    def ttft_ms(seed: int) -> float:
        with cluster.client() as client:
            answer = client.complete(
                token_ids=random_prompt(150, seed), temperature=0, max_tokens=4, ignore_eos=True
            )
        return answer.phases.ttft_ms

    usual_ms = statistics.median(ttft_ms(900 + index) for index in range(5))

    plans = [(rng.randrange(10, 900), rng.expovariate(2.0)) for _ in range(50)]

    def start_and_cancel(index: int) -> None:
        tokens, cancel_after_s = plans[index]
        with cluster.client() as client:
            stream = client.generate(
                token_ids=random_prompt(tokens, 1000 + index), max_tokens=200, ignore_eos=True
            )
            timer = Timer(cancel_after_s, stream.close)
            timer.start()
            with suppress(baton.CancelledError):
                for _ in stream:
                    pass
            timer.cancel()

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(start_and_cancel, range(50)))
    cluster.wait_idle()
    assert ttft_ms(990) < 3 * usual_ms, "a new request waits for cancelled ones"


def test_a_deadline_ends_the_request_and_frees_it(cluster: RunningCluster) -> None:
    with cluster.client() as client:
        stream = client.generate(
            token_ids=random_prompt(100, 82), temperature=0, max_tokens=1500, ignore_eos=True,
            timeout_s=1.5,
        )  # fmt: skip
        tokens = 0
        try:
            for response in stream:
                tokens += len(response.token_ids)
        except baton.DeadlineError:
            pass
        else:
            raise AssertionError("the deadline did not end the request")
    assert tokens > 0
    cluster.wait_idle()
