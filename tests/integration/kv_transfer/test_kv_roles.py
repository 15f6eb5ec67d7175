"""What depends in vLLM on ``kv_role``, and that an engine with ``kv_both`` serves both roles.

``kv_both`` differs from the two other roles in these ways:

    instead of kv_producer   multi-modal inputs may lack their tensors; one more gauge; with
                             several batches in flight, blocks are freed later (defer_block_free)
    instead of kv_consumer   a preemption drops the output that is in flight, which is then computed
                             again (requires_kv_delivery); the end of a request looks for partial
                             blocks of Mamba layers, which Baton does not stream

None of them changes a token.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm.config import KVTransferConfig
from vllm.v1.request import RequestStatus

from core.config.schema import Config
from core.types import Pool
from engine.vllm.engine import kv_role
from kv_transfer.vllm.connector import BatonConnector
from tests.support.vllm_scheduler import SAMPLED, SchedulerBench, result_of

pytestmark = pytest.mark.integration

LOOKS_AT_THE_ROLE = re.compile(
    r"is_kv_(?:producer|consumer|transfer_instance)|\bkv_role\b"
    r"|['\"]kv_(?:both|producer|consumer)['\"]|\b(?:requires_kv_delivery|defer_block_free)\b"
)
# The lines of vLLM 0.32 that look at the role. Other connectors and the definition of the roles
# (config/kv_transfer.py) are left out.
LINES = {
    "config/vllm.py": [
        'self.kv_transfer_config.kv_role = "kv_both"',  # of KV offloading, which Baton does not use
        "and self.kv_transfer_config.is_kv_transfer_instance",
        ") or (kv_config is not None and kv_config.is_kv_consumer)",
        "and self.kv_transfer_config.is_kv_transfer_instance",
    ],
    "distributed/kv_transfer/kv_connector/v1/base.py": [
        "def requires_kv_delivery(self) -> bool:",
        "return self._kv_transfer_config.is_kv_producer",
    ],
    "distributed/kv_transfer/kv_transfer_state.py": [
        "if kv_transfer_config is not None and kv_transfer_config.is_kv_transfer_instance:",
    ],
    "v1/attention/backends/rocm_aiter_unified_attn.py": [
        "return kv_transfer_config is not None and kv_transfer_config.is_kv_transfer_instance",
    ],
    "v1/attention/selector.py": [
        "kv_transfer_config is not None and kv_transfer_config.is_kv_transfer_instance",
    ],
    "v1/core/sched/scheduler.py": [
        "self.defer_block_free = False",
        "self.requires_kv_delivery = False",
        "if multiple_inflight_batches and kv_transfer_config.is_kv_consumer:",
        "self.defer_block_free = True",
        "self.requires_kv_delivery = self.connector.requires_kv_delivery",
        "drop_stale_output=self.requires_kv_delivery,",
        "if self.defer_block_free and total_num_scheduled_tokens > 0:",
        "if self.defer_block_free:",
        "if self.defer_block_free and scheduler_output.total_num_scheduled_tokens > 0:",
        "return not self.defer_block_free or (",
        "if not self.defer_block_free or fence_seq <= self.processed_step_seq:",
        "if kv_transfer_config is not None and kv_transfer_config.is_kv_producer:",
    ],
    "v1/metrics/loggers.py": [
        "if kv_transfer_config is not None and kv_transfer_config.is_kv_consumer:",
    ],
}


def test_vllm_looks_at_the_role_where_it_did() -> None:
    """If this fails after an upgrade, read each new place before roles may change with it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    connectors = root / "distributed" / "kv_transfer" / "kv_connector" / "v1"
    found = {}
    for file in root.rglob("*.py"):
        if connectors in file.parents and file != connectors / "base.py":
            continue
        lines = [line.strip() for line in file.read_text().splitlines()]
        lines = [each for each in lines if LOOKS_AT_THE_ROLE.search(each) and each[0] != "#"]
        if lines:
            found[str(file.relative_to(root))] = lines
    assert found.pop("config/kv_transfer.py"), "the roles are defined elsewhere"
    assert found == LINES


@pytest.mark.parametrize(
    ("role", "sends", "receives"),
    [("kv_producer", True, False), ("kv_consumer", False, True), ("kv_both", True, True)],
)
def test_what_the_roles_mean(role: str, sends: bool, receives: bool) -> None:
    config = KVTransferConfig(kv_connector="BatonConnector", kv_role=role)
    assert (config.is_kv_producer, config.is_kv_consumer) == (sends, receives)
    assert config.is_kv_transfer_instance


def test_an_engine_has_both_roles_only_if_they_may_change() -> None:
    fixed, changing = (
        Config.model_validate({"cluster": {"role_change": each}}) for each in (False, True)
    )
    assert [kv_role(fixed, pool) for pool in Pool] == ["kv_producer", "kv_consumer"]
    assert [kv_role(changing, pool) for pool in Pool] == ["kv_both", "kv_both"]


def test_the_cuda_graph_mode_does_not_depend_on_the_role() -> None:
    """vLLM passes only the extra configuration, so the answer is the same for all roles."""
    assert BatonConnector.requires_piecewise_for_cudagraph({})


@pytest.fixture
def bench() -> Iterator[Callable[..., SchedulerBench]]:
    made = []

    def make(role: str, **options: int) -> SchedulerBench:
        made.append(SchedulerBench(role, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(
    ("role", "delivers"), [("kv_producer", True), ("kv_consumer", False), ("kv_both", True)]
)
def test_a_preemption_drops_output_in_flight_unless_the_engine_only_receives(
    bench: Callable[..., SchedulerBench], role: str, delivers: bool
) -> None:
    scheduler = bench(role).scheduler
    assert scheduler.requires_kv_delivery is delivers
    assert not scheduler.defer_block_free, "one batch is in flight at a time on CPUs"


def test_one_scheduler_sends_and_receives(bench: Callable[..., SchedulerBench]) -> None:
    both = bench("kv_both")
    sent = both.add("s", list(range(100, 140)), "send", max_tokens=1)
    received = both.add("r", list(range(200, 240)), "receive", max_tokens=4)
    first = both.step()
    assert first.computed == {"s": 40}
    assert [chunk.transfer_id for chunk in first.plan.chunks] == ["s#1"]
    assert [each.transfer_id for each in first.plan.reservations] == ["r#1"]
    assert sent.status is RequestStatus.FINISHED_LENGTH_CAPPED
    assert received.status is RequestStatus.WAITING_FOR_REMOTE_KVS
    assert both.blocks_used == 6
    second = both.step(sent={"s"}, received=[result_of(first)])
    assert second.plan.sampled == [("s#1", SAMPLED)]
    assert both.blocks_used == 3, "the sent blocks are free, the received ones are not"
    assert both.step().computed == {"r": 1}
    assert list(received.all_token_ids) == [*range(200, 240), 99, SAMPLED]


def test_blocks_received_in_one_role_are_sent_in_the_other(
    bench: Callable[..., SchedulerBench],
) -> None:
    """The prefix cache outlives the change of role."""
    both = bench("kv_both")
    prompt = list(range(100, 148))
    both.add("r", prompt, "receive", max_tokens=1, forwards_first_token=False)
    first = both.step()
    both.step(received=[result_of(first, first_token_id=None)])
    both.step()
    both.add("s", [*prompt, 7], "send", max_tokens=1)
    (chunk,) = both.step().plan.chunks
    assert (chunk.token_start, chunk.token_end) == (48, 49)
    assert chunk.block_ids[:3] == first.plan.reservations[0].block_ids


def test_an_engine_with_news_for_its_ranks_does_not_sleep(
    bench: Callable[..., SchedulerBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = bench("kv_both")
    sleeps: list[float] = []
    doorbell = both.connector.scheduler_side._doorbell
    assert doorbell is not None
    monkeypatch.setattr(doorbell, "wait", sleeps.append)
    both.add("r", list(range(200, 240)), "receive")
    both.step()
    both.step()
    assert len(sleeps) == 1
    both.add("s", list(range(100, 140)), "send")
    both.abort("s")
    assert both.step().plan.aborted == ["s#1"]
    assert len(sleeps) == 1, "the abort of s waits for nothing"
