"""``baton policy calibrate``: measures the latency model of a running cluster.

It sends prompts of several lengths one after the other, then several streams at once. The cluster
should be idle: other requests would count as latency.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import baton
from cluster.cli.status import read_view, read_workers
from cluster.local.run_dir import ClusterState
from core.errors import ConfigError, UnavailableError
from core.types import Pool
from simulate.latency import (
    FitError,
    KvRoom,
    LatencyModel,
    TransferLatency,
    fit_decode,
    fit_prefill,
)
from simulate.latency_file import save_latency_model

_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # tokens; those that the model takes
_REPEATS = 3  # the median counts
_STREAMS = (1, 2, 4, 8, 16)
_ANSWER_TOKENS = 64  # enough for a steady step, and short beside the longest prompts
# Prompts of the streams. The second length tells the cost of KV from the cost of a stream.
_STREAM_PROMPTS = (64, 512)
# Every vocabulary has these ids, and none of them is special in the usual ones.
_TOKEN_IDS = range(300, 900)
_TIMEOUT_S = 600.0  # of one request; a long prompt on CPUs takes minutes
_DEFAULT_COLD_START_S = 60.0  # loading a model of some GB, if no start was seen


@dataclass(frozen=True, slots=True)
class _Probe:
    """One request, as the router measured it."""

    prompt_tokens: int
    cached_tokens: int
    prefill_s: float
    step_s: float
    handoff_s: float
    kv_bytes: int
    kv_tokens: int


def calibrate(state: ClusterState, output: Path, say: Callable[[str], None]) -> None:
    """Measure, write the model to ``output``, and tell how well it fits.

    Raises:
        ConfigError: the cluster is not ready, or the file cannot be written.
        BatonError: a request failed.
    """
    if state.phase != "ready":
        raise ConfigError(f"the cluster {state.name!r} is {state.phase}; wait until it is ready")
    kv = _kv_room(state)
    view = read_view(state)
    rng = random.Random()
    with baton.Client(state.address, timeout_s=_TIMEOUT_S) as client:
        _probe(client, rng, _LENGTHS[0], 8)  # the first request of a cluster is slow
        say("measuring prefill")
        prompts = _measure_prompts(client, rng)
        prefill, prefill_error = fit_prefill(
            [(each.prompt_tokens - each.cached_tokens, each.prefill_s) for each in prompts]
        )
        say("measuring decode")
        streams = _measure_streams(client, rng)
        decode, decode_error = fit_decode(streams)
    start_s = view.start_s if view is not None else None
    model = LatencyModel(
        name=state.model,
        source=f"baton policy calibrate, cluster {state.name}",
        prefill=prefill,
        decode=decode,
        transfer=_transfer(prompts),
        kv=kv,
        cold_start_s=_DEFAULT_COLD_START_S if start_s is None else start_s,
    )
    try:
        save_latency_model(model, output)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from None
    say(f"prefill: {_told(prefill_error)}; {prefill.seconds(1024):.3f} s for 1,024 tokens")
    say(f"decode: {_told(decode_error)}; {decode.seconds(8, 8 * 512) * 1000:.1f} ms for 8 streams")
    if start_s is None:
        say(
            f"cold_start_s: no worker has started lately, so {_DEFAULT_COLD_START_S:.0f} s is "
            "assumed; correct it in the file"
        )
    say(f"wrote {output}; use it with: baton policy simulate --model {output}")


def _kv_room(state: ClusterState) -> KvRoom:
    rooms: dict[Pool, int] = {}
    block_tokens = 1
    for worker in read_workers(state):
        rooms[worker.pool] = worker.load.kv_blocks_total * worker.load.kv_block_tokens
        block_tokens = worker.load.kv_block_tokens
    if len(rooms) < len(Pool):
        raise UnavailableError("measuring needs a worker in each pool")
    return KvRoom(rooms[Pool.PREFILL], rooms[Pool.DECODE], block_tokens)


def _measure_prompts(client: baton.Client, rng: random.Random) -> list[_Probe]:
    found = []
    for length in _LENGTHS:
        try:
            probes = [_probe(client, rng, length, _ANSWER_TOKENS) for _ in range(_REPEATS)]
        except baton.InvalidArgumentError:  # longer than the model's context
            break
        found.append(sorted(probes, key=lambda probe: probe.prefill_s)[_REPEATS // 2])
    return found


def _measure_streams(client: baton.Client, rng: random.Random) -> list[tuple[int, int, float]]:
    """Return (streams, KV tokens of the batch, seconds of a step)."""
    samples = []
    for prompt_tokens in _STREAM_PROMPTS:
        for count in _STREAMS:
            seeds = [rng.randrange(2**32) for _ in range(count)]
            with ThreadPoolExecutor(count) as threads:
                probes = list(
                    threads.map(
                        lambda seed: _probe(
                            client,
                            random.Random(seed),
                            prompt_tokens,  # noqa: B023 - the threads end within the iteration
                            _ANSWER_TOKENS,
                        ),
                        seeds,
                    )
                )
            kv_tokens = count * (prompt_tokens + _ANSWER_TOKENS // 2)
            samples.append((count, kv_tokens, statistics.median(p.step_s for p in probes)))
    return samples


def _probe(client: baton.Client, rng: random.Random, prompt_tokens: int, tokens: int) -> _Probe:
    answer = client.complete(
        token_ids=[rng.choice(_TOKEN_IDS) for _ in range(prompt_tokens)],
        max_tokens=tokens,
        temperature=0.0,
        ignore_eos=True,
    )
    phases, kv = answer.phases, answer.phases.kv
    return _Probe(
        prompt_tokens,
        answer.usage.cached_prompt_tokens,
        phases.prefill_ms / 1000,
        phases.decode_ms / 1000 / (tokens - 2),
        phases.handoff_ms / 1000,
        0 if kv is None else kv.bytes,
        0 if kv is None else kv.tokens,
    )


def _transfer(prompts: Sequence[_Probe]) -> TransferLatency:
    """Estimate what the hand-off of a prompt costs beyond one decode step."""
    moved = [each for each in prompts if each.kv_tokens]
    if not moved:
        return TransferLatency(base_s=0.0)
    extra = [(each.kv_bytes, max(each.handoff_s - each.step_s, 0.0)) for each in moved]
    base_s = min(seconds for _, seconds in extra)
    (most_bytes, most_s), bytes_per_token = max(extra), moved[-1].kv_bytes / moved[-1].kv_tokens
    rate = most_bytes / (most_s - base_s) if most_s > base_s else float("inf")
    return TransferLatency(base_s, rate, round(bytes_per_token))


def _told(error: FitError) -> str:
    return (
        f"{error.samples} measurements, {error.rms:.1%} off on average (rms), "
        f"{error.largest:.1%} at most"
    )
