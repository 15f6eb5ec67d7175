"""How long a model's prefill, decode step and KV transfer take, and how much KV has room.

The formulas have one term per cause, as in DistServe (OSDI '24, appendix A) and vidur (MLSys '24):

    prefill seconds     base + per_token * (n - cached) + per_square_token * (n^2 - cached^2)
                        n prompt tokens; the weights, then the attention over all earlier tokens
    decode step seconds base + per_stream * streams + per_kv_token * KV tokens of the batch
                        reading the weights, work per sampled token, reading the KV
    transfer seconds    base + KV bytes / bytes_per_s

``PRESETS`` hold estimates; ``fit_prefill`` and ``fit_decode`` fit measured values instead.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from core.errors import ConfigError
from engine.fake import FakeLatency, FakeSize

_SIMPLER_RMS = 1.05  # a term must lower the error by this factor, or it is left out


@dataclass(frozen=True, slots=True)
class PrefillLatency:
    """Seconds of a prompt on a prefill worker, which computes one prompt after the other."""

    base_s: float
    per_token_s: float
    per_square_token_s: float = 0.0

    def seconds(self, prompt_tokens: int, cached_tokens: int = 0) -> float:
        """Return the time to compute a prompt whose first tokens are in the prefix cache."""
        square = prompt_tokens * prompt_tokens - cached_tokens * cached_tokens
        linear = (prompt_tokens - cached_tokens) * self.per_token_s
        return self.base_s + linear + square * self.per_square_token_s


@dataclass(frozen=True, slots=True)
class DecodeLatency:
    """Seconds of one step on a decode worker, which gives each stream one token."""

    base_s: float
    per_stream_s: float = 0.0
    per_kv_token_s: float = 0.0

    def seconds(self, streams: int, kv_tokens: int) -> float:
        """Return the time of a step."""
        return self.base_s + streams * self.per_stream_s + kv_tokens * self.per_kv_token_s


class TransferStart(enum.StrEnum):
    """When the KV of a prompt begins to move to the decode worker."""

    AFTER_PREFILL = "after prefill"
    # What the fake engine does. The router holds the decode worker's tokens back until the prefill
    # worker's token is there.
    AT_DISPATCH = "at dispatch"


@dataclass(frozen=True, slots=True)
class TransferLatency:
    """Seconds from the end of a prefill until the decode worker has all its KV.

    The KV streams while the prompt is computed. So ``bytes_per_s`` is an effective rate: it counts
    only the time that the computation does not hide.
    """

    base_s: float
    bytes_per_s: float = float("inf")
    kv_bytes_per_token: int = 0
    start: TransferStart = TransferStart.AFTER_PREFILL

    def seconds(self, tokens: int) -> float:
        """Return the time for the KV of this many tokens."""
        return self.base_s + tokens * self.kv_bytes_per_token / self.bytes_per_s


class KvReservation(enum.StrEnum):
    """How much room a decode worker's engine takes for a stream when the stream begins."""

    PROMPT = "prompt"  # as vLLM does; if the room is used up later, a stream is preempted
    WHOLE = "whole"  # the prompt and all tokens it may generate, as the fake engine does


@dataclass(frozen=True, slots=True)
class KvRoom:
    """The KV cache of a worker, in tokens."""

    prefill_tokens: int  # bounds the prefix cache
    decode_tokens: int
    block_tokens: int = 16
    reservation: KvReservation = KvReservation.PROMPT

    def holds(self, tokens: int) -> bool:
        """Whether an empty decode worker has room for a request of so many tokens."""
        return -(-tokens // self.block_tokens) * self.block_tokens <= self.decode_tokens


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Everything that a simulation knows of one model on one kind of machine."""

    name: str
    source: str  # where the numbers come from
    prefill: PrefillLatency
    decode: DecodeLatency
    transfer: TransferLatency
    kv: KvRoom
    gpus: float = 1.0  # of one worker
    cold_start_s: float = 60.0  # from the order to start a worker until it takes requests
    role_change_s: float = 1.0  # from the end of a worker's last request until its new role
    request_s: float = 0.0  # client, network and router, until a request is dispatched

    def __post_init__(self) -> None:
        if (
            self.prefill.seconds(1) <= 0
            or self.decode.base_s <= 0
            or self.transfer.bytes_per_s <= 0
        ):
            raise ConfigError(
                "prefill and decode.base_s must take time, and transfer.bytes_per_s must be above 0"
            )
        if self.kv.decode_tokens < self.kv.block_tokens or self.kv.block_tokens < 1:
            raise ConfigError("kv.decode_tokens must hold at least one block of kv.block_tokens")

    def prefill_tokens_per_s(self, prompt_tokens: int) -> float:
        """Prompt tokens per second of one busy prefill worker, for prompts of this length."""
        return prompt_tokens / self.prefill.seconds(prompt_tokens)

    def decode_tokens_per_s(self, kv_tokens: float, itl_s: float) -> float:
        """Output tokens per second of one decode worker whose steps take ``itl_s``.

        Args:
            kv_tokens: mean KV tokens of a stream. The KV room bounds the number of streams, too.
        """
        per_stream_s = self.decode.per_stream_s + kv_tokens * self.decode.per_kv_token_s
        most = max(1.0, self.kv.decode_tokens / max(kv_tokens, 1.0))
        streams = most
        if per_stream_s > 0:
            streams = max(1.0, min(most, (itl_s - self.decode.base_s) / per_stream_s))
        return streams / (self.decode.base_s + streams * per_stream_s)


def h100_8b() -> LatencyModel:
    """Return estimates for a Llama-3.1-8B-class model in bfloat16 on one H100 SXM."""
    return LatencyModel(
        name="8b-h100",
        source="An estimate, not a measurement; `baton policy calibrate` measures. Prefill: 16 "
        "GFLOP a token at 36% of 989 TFLOPS, within the 15,000-25,000 tokens/s that vendors and "
        "vLLM users publish. Decode: 16 GB of weights at 3.35 TB/s are 4.8 ms, published steps of "
        "small batches are 7-8 ms. KV: 32 layers * 8 heads * 128 * 2 * 2 bytes a token, read at "
        "70% of the bandwidth. Transfer: computing a token's KV takes 45 us, sending it at 25 GB/s "
        "5 us, so all but about a tenth is hidden.",
        prefill=PrefillLatency(base_s=0.008, per_token_s=45e-6, per_square_token_s=6.6e-10),
        decode=DecodeLatency(base_s=0.008, per_stream_s=50e-6, per_kv_token_s=56e-9),
        transfer=TransferLatency(base_s=0.008, bytes_per_s=250e9, kv_bytes_per_token=131_072),
        kv=KvRoom(prefill_tokens=400_000, decode_tokens=400_000),
        cold_start_s=60.0,
    )


def a10_8b() -> LatencyModel:
    """Return estimates for the same model on one A10, a small GPU."""
    return LatencyModel(
        name="8b-a10",
        source="An estimate; `baton policy calibrate` measures. As 8b-h100, "
        "with the A10's 125 TFLOPS (40% used), 600 GB/s, and 4 GB of its 24 GB left for KV. A "
        "tenth of the transfer at 1.25 GB/s is not hidden.",
        prefill=PrefillLatency(base_s=0.01, per_token_s=320e-6, per_square_token_s=5.2e-9),
        decode=DecodeLatency(base_s=0.03, per_stream_s=100e-6, per_kv_token_s=310e-9),
        transfer=TransferLatency(base_s=0.01, bytes_per_s=12.5e9, kv_bytes_per_token=131_072),
        kv=KvRoom(prefill_tokens=30_000, decode_tokens=30_000),
        cold_start_s=60.0,
    )


def fake_engine(latency: FakeLatency | None = None, size: FakeSize | None = None) -> LatencyModel:
    """Return the latencies of ``engine.fake``, to compare a simulation with a real run."""
    latency, size = latency or FakeLatency(), size or FakeSize()
    kv_tokens = size.kv_blocks * size.kv_block_tokens
    return LatencyModel(
        name="fake",
        source="engine.fake",
        prefill=PrefillLatency(base_s=0.0, per_token_s=latency.prefill_ms_per_token / 1000),
        decode=DecodeLatency(base_s=latency.decode_step_ms / 1000),
        transfer=TransferLatency(
            base_s=latency.transfer_ms / 1000,
            kv_bytes_per_token=size.kv_bytes_per_token,
            start=TransferStart.AT_DISPATCH,
        ),
        kv=KvRoom(0, kv_tokens, size.kv_block_tokens, KvReservation.WHOLE),
        cold_start_s=5.0,
        role_change_s=0.5,
    )


PRESETS = {model.name: model for model in (h100_8b(), a10_8b(), fake_engine())}


@dataclass(frozen=True, slots=True)
class FitError:
    """How far fitted formulas are from the measured values, relative to these."""

    samples: int
    rms: float
    largest: float


@dataclass(frozen=True, slots=True)
class _Fit:
    factors: tuple[float, ...] = ()
    error: FitError = field(default_factory=lambda: FitError(0, float("inf"), float("inf")))

    @property
    def terms(self) -> int:
        return sum(factor > 0 for factor in self.factors)


def fit_prefill(samples: Sequence[tuple[int, float]]) -> tuple[PrefillLatency, FitError]:
    """Fit (uncached prompt tokens, seconds). The relative error is least.

    Raises:
        ConfigError: fewer than two lengths, or a value that is not positive.
    """
    tokens = [float(each) for each, _ in samples]
    terms = [[1.0] * len(tokens), tokens, [each * each for each in tokens]]
    fit = _fitted(terms, [seconds for _, seconds in samples], "prompt lengths")
    return PrefillLatency(*fit.factors), fit.error


def fit_decode(samples: Sequence[tuple[int, int, float]]) -> tuple[DecodeLatency, FitError]:
    """Fit (streams, KV tokens of the batch, seconds of a step). ``fit_prefill`` says what is
    raised."""
    streams, kv_tokens = ([float(each[index]) for each in samples] for index in (0, 1))
    terms = [[1.0] * len(samples), streams, kv_tokens]
    fit = _fitted(terms, [seconds for *_, seconds in samples], "numbers of streams")
    return DecodeLatency(*fit.factors), fit.error


def _fitted(terms: list[list[float]], seconds: list[float], what: str) -> _Fit:
    """Find factors >= 0 by least squares of the relative error.

    There are few terms, so all subsets are tried: a term that would get a negative factor, or that
    hardly lowers the error, is left out.
    """
    if len(seconds) < 2 or len(set(terms[1])) < 2:
        raise ConfigError(f"measure at least two different {what}; {len(seconds)} samples given")
    if min(seconds) <= 0:
        raise ConfigError("a measured time is not above 0 s; leave that sample out")
    measured = np.array(seconds)
    columns = np.array(terms) / measured  # of the relative error
    best = _Fit()
    for count in range(1, len(terms) + 1):
        for chosen in itertools.combinations(range(len(terms)), count):
            solved = np.linalg.lstsq(columns[list(chosen)].T, np.ones(len(seconds)), rcond=None)[0]
            if (solved < 0).any():
                continue
            off = np.abs(solved @ columns[list(chosen)] - 1)
            error = FitError(len(seconds), float(np.sqrt((off**2).mean())), float(off.max()))
            needed = best.error.rms / (_SIMPLER_RMS if count > best.terms else 1.0)
            if error.rms < needed:
                factors = dict(zip(chosen, solved.tolist(), strict=True))
                best = _Fit(tuple(factors.get(index, 0.0) for index in range(len(terms))), error)
    return best
