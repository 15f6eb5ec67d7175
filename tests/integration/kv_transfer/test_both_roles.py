"""Ranks with both halves of the connector send KV to each other, in one direction and the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from kv_transfer.rank_reports import RankReports
from kv_transfer.receive.records import Reservation, TransferResult
from kv_transfer.send.records import StepChunk
from kv_transfer.vllm.metadata import StepPlan
from kv_transfer.vllm.worker_side import WorkerSide
from tests.support.kv_stream import OPTIONS
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("all_threads_end")]

LAYERS, HEADS, HEAD_SIZE, BLOCK_TOKENS, BLOCKS = 3, 2, 32, 32, 24
NAMES = [f"model.layers.{layer}.attn" for layer in range(LAYERS)]
TOKENS = 3 * BLOCK_TOKENS + 5
FIRST_TOKEN_ID = 7


class Rank:
    """One ``WorkerSide``, and vLLM's calls to it in each step."""

    _seeds = itertools.count()

    def __init__(self, name: str, role: str) -> None:
        self.name = name
        self.reports = RankReports("127.0.0.1", OPTIONS.secret)
        generator = torch.Generator().manual_seed(next(self._seeds))
        shape = BLOCKS, HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE
        self.caches = {each: torch.randn(shape, generator=generator) for each in NAMES}
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float32
        )
        self.side = WorkerSide(
            _vllm_config(name, role, self.reports.endpoint),
            KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(NAMES, spec)]),
        )
        self.side.start(self.caches)
        self.address: tuple[str, ...] = ()
        if role != "kv_consumer":
            self.address = self.reports.addresses(1, OPTIONS.pair_timeout_s)
        self.released: set[str] = set()
        self.received: dict[str, TransferResult] = {}  # by the engine's request id
        self.failed: set[str] = set()

    def step(self, **plan: Any) -> None:
        """Run one engine step. It writes no KV: the caches already hold random KV."""
        step = StepPlan(**plan)
        self.side.preempt(step.preempted)
        self.side.begin_step(step)
        for name in NAMES:
            self.side.layer_done(name)
        self.side.end_step()
        results = self.side.take_results()
        self.released |= results.finished_sending
        self.failed |= results.failed_recving
        details = self.side.take_rank_results()
        by_id = {each.request_id: each for each in details.results} if details else {}
        assert by_id.keys() == results.finished_recving
        self.received |= by_id

    def blocks(self, ids: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([self.caches[name][list(ids)] for name in NAMES])

    def stop(self) -> None:
        self.side.stop()
        self.reports.close()


def _vllm_config(name: str, role: str, report_to: str) -> Any:
    """Return the parts of vLLM's configuration that ``WorkerSide`` reads."""
    fields = (each for each in OPTIONS.__slots__ if each not in ("cores", "incarnation"))
    extra = {each: getattr(OPTIONS, each) for each in fields}
    extra |= {"incarnation": name, "report_to": report_to, "model": "tiny"}
    return SimpleNamespace(
        kv_transfer_config=KVTransferConfig(
            kv_connector="BatonConnector", kv_role=role, kv_connector_extra_config=extra
        ),
        compilation_config=SimpleNamespace(
            static_forward_context={each: SimpleNamespace(isa="vec") for each in NAMES}
        ),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: SimpleNamespace(name="LBHNC")
        ),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: HEADS),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.vllm.worker_side.get_tensor_model_parallel_rank", lambda: 0)


@pytest.fixture
def ranks() -> Iterator[tuple[Rank, Rank]]:
    a, b = Rank("a-both", "kv_both"), Rank("b-both", "kv_both")
    yield a, b
    a.stop()
    b.stop()


class Transfer:
    """A request whose KV goes from one rank to another. Each rank has blocks for it."""

    def __init__(self, name: str, source: Rank, target: Rank, first_block: int) -> None:
        self.id = f"{name}#1"
        self.source, self.target = source, target
        count = -(-TOKENS // BLOCK_TOKENS)
        self.source_blocks = tuple(range(first_block, first_block + count))
        self.target_blocks = tuple(range(first_block + count, first_block + 2 * count))

    @property
    def reservation(self) -> Reservation:
        return Reservation(
            transfer_id=self.id,
            request_id=f"r-{self.id}",
            addresses=self.source.address,
            incarnation=self.source.name,
            block_ids=self.target_blocks,
            token_start=0,
            token_end=TOKENS,
        )

    @property
    def chunk(self) -> StepChunk:
        return StepChunk(
            transfer_id=self.id,
            request_id=f"s-{self.id}",
            block_ids=self.source_blocks,
            token_start=0,
            token_end=TOKENS,
            num_tokens=TOKENS,
        )

    def is_over(self) -> bool:
        for rank in (self.source, self.target):
            rank.step()
        return f"s-{self.id}" in self.source.released and f"r-{self.id}" in self.target.received

    def check(self) -> None:
        result = self.target.received[f"r-{self.id}"]
        assert result.complete
        assert result.first_token_id == FIRST_TOKEN_ID
        assert torch.equal(
            self.source.blocks(self.source_blocks), self.target.blocks(self.target_blocks)
        )


def run(*transfers: Transfer) -> None:
    """Run transfers at the same time, each as vLLM's schedulers would."""
    for each in transfers:
        each.target.step(reservations=[each.reservation])
    for each in transfers:
        each.source.step(chunks=[each.chunk])
    for each in transfers:
        each.source.step(sampled=[(each.id, FIRST_TOKEN_ID)])
    for each in transfers:
        wait_until(each.is_over, what=f"{each.id} is over", within_s=30)
        each.check()


def test_kv_goes_in_both_directions(ranks: tuple[Rank, Rank]) -> None:
    a, b = ranks
    run(Transfer("one way", a, b, 0))
    assert (a.side.paired_with("prefill"), a.side.paired_with("decode")) == ({b.name}, set())
    assert (b.side.paired_with("prefill"), b.side.paired_with("decode")) == (set(), {a.name})
    run(Transfer("other way", b, a, 8))
    assert a.side.paired_with("prefill") == a.side.paired_with("decode") == {b.name}
    run(Transfer("first at once", a, b, 0), Transfer("second at once", b, a, 8))
    assert not a.failed | b.failed


def test_pairs_of_the_new_role_are_made_in_advance(ranks: tuple[Rank, Rank]) -> None:
    a, b = ranks
    for decode, prefill in ((a, b), (b, a)):
        decode.side.prewarm(prefill.address, prefill.name)
        wait_until(
            lambda d=decode, p=prefill: (  # type: ignore[misc]
                d.side.paired_with("decode") == {p.name}
                and p.side.paired_with("prefill") == {d.name}
            ),
            what="the pair is open on both sides",
            within_s=30,
        )


def test_a_send_and_a_receive_fail_each_for_itself(ranks: tuple[Rank, Rank]) -> None:
    a, b = ranks
    good, bad = Transfer("good", a, b, 0), Transfer("bad", b, a, 8)
    bad.target.step(reservations=[bad.reservation])
    bad.source.step(chunks=[bad.chunk])
    bad.source.step(aborted=[bad.id])
    run(good)
    wait_until(bad.is_over, what="the aborted transfer is over", within_s=30)
    assert bad.target.failed == {f"r-{bad.id}"}


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_a_rank_with_one_role_has_one_half(role: str) -> None:
    rank = Rank("one-role", role)
    try:
        assert bool(rank.address) == (role == "kv_producer")
        assert (rank.side._server is None, rank.side._client is None) == (
            role == "kv_consumer",
            role == "kv_producer",
        )
        for each in ("prefill", "decode"):
            assert rank.side.paired_with(cast(Any, each)) == set()
        rank.step()
    finally:
        rank.stop()
