"""The autoscaler's steps against fakes of Serve and the store."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cluster.autoscale.apps import AppState, WorkerApp, new_name, parse_name
from cluster.autoscale.loop import AutoscaleLoop
from cluster.autoscale.policy_file import digest_of
from cluster.autoscale.view import KEPT_CHANGES, AutoscaleView, decode_view
from core.config.schema import Config, load_config
from core.errors import UnavailableError
from core.state.autoscale import Kept
from core.state.registry import MemoryRegistry
from core.types import Pool, RouterRecord, WorkerLoad, WorkerRecord, WorkerState

GPUS = dict.fromkeys(Pool, 1.0)


@dataclass
class FakeApps:
    """Workers that start and leave when the test says so."""

    apps: tuple[WorkerApp, ...] = ()
    removed: tuple[str, ...] = ()
    available: bool = True

    async def list(self) -> tuple[WorkerApp, ...]:
        if not self.available:
            raise UnavailableError("Ray Serve does not answer")
        return self.apps

    async def add(self, pool: Pool, slot: int) -> str:
        name = new_name("baton", pool, slot)
        self.apps = (*self.apps, WorkerApp(name, pool, slot, AppState.STARTING))
        return name

    async def remove(self, name: str) -> None:
        self.removed = (*self.removed, name)
        self.apps = tuple(each for each in self.apps if each.name != name)

    def change(self, name: str, state: AppState, message: str = "") -> None:
        self.apps = tuple(
            replace(each, state=state, message=message) if each.name == name else each
            for each in self.apps
        )

    def names(self, pool: Pool) -> tuple[str, ...]:
        return tuple(each.name for each in self.apps if each.pool is pool)


@dataclass
class FakeStore:
    """Takes the place of ``Store`` and of the parts that it opens."""

    clock: Callable[[], float]
    policy: str | None = None
    state: bytes | None = None
    view: bytes | None = None
    orders_given: dict[Pool, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = MemoryRegistry(lease_s=1e9, clock=self.clock)

    def registry(self) -> MemoryRegistry:
        return self.memory

    def orders(self) -> FakeStore:
        return self

    def autoscale(self) -> FakeStore:
        return self

    async def take_scale(self) -> dict[Pool, int]:
        taken, self.orders_given = self.orders_given, {}
        return taken

    async def read(self) -> Kept:
        return Kept(self.policy, self.state)

    async def write(self, state: bytes, view: bytes) -> None:
        self.state, self.view = state, view

    async def write_state(self, state: bytes) -> None:
        self.state = state

    async def restore_policy(self, found: str | None, text: str) -> None:
        if self.policy == found:
            self.policy = text

    async def close(self) -> None:
        """Nothing is open."""


class Harness:
    """An autoscaler with fakes, on a clock that the test moves."""

    def __init__(self, **settings: Any) -> None:
        self.now_s = 1000.0
        self.config: Config = load_config(None, settings)
        self.apps = FakeApps()
        self.store = FakeStore(lambda: self.now_s)
        self.renewals = 0
        self.restart()

    def restart(self) -> None:
        """Replace the autoscaler, as Serve does with one that died."""
        store: Any = self.store
        self.loop = AutoscaleLoop(
            self.config, self.apps, store, gpus=GPUS, clock=lambda: self.now_s
        )

    async def step(self, seconds: float = 1.0) -> AutoscaleView:
        """Let all workers get ready and the router report. Then run a step, and return its view."""
        for app in self.apps.apps:
            if app.state in (AppState.STARTING, AppState.RUNNING):
                self.apps.change(app.name, AppState.RUNNING)
                await self.store.memory.put(worker(app))
        for record in await self.store.memory.list():
            if record.application not in [each.name for each in self.apps.apps]:
                await self.store.memory.remove(record.id)
        self.renewals += 1
        await self.store.memory.put_router(RouterRecord("r1", "a", self.renewals))
        await self.loop.step()
        self.now_s += seconds
        view = decode_view(self.store.view)
        assert view is not None
        return view

    def counts(self) -> tuple[int, int]:
        return len(self.apps.names(Pool.PREFILL)), len(self.apps.names(Pool.DECODE))


def worker(app: WorkerApp) -> WorkerRecord:
    load = WorkerLoad(0, 0, 0, kv_blocks_free=100, kv_blocks_total=100)
    return WorkerRecord(
        id=f"w-{app.name}",
        pool=app.pool,
        state=WorkerState.READY,
        incarnation="i",
        address="a:1",
        kv_addresses=(),
        model="m",
        load=load,
        application=app.name,
    )


def policy_text(prefill: tuple[int, int], decode: tuple[int, int], **spec: Any) -> str:
    pools = {
        pool: {
            "minReplicas": low,
            "maxReplicas": high,
            "signals": [{"type": "QueueRequests", "target": 10}],
        }
        for pool, (low, high) in {"prefill": prefill, "decode": decode}.items()
    }
    document = {"apiVersion": "baton/v1", "kind": "AutoscalingPolicy", "metadata": {"name": "p"}}
    return json.dumps({**document, "spec": {**pools, **spec}})


async def test_a_new_cluster_gets_its_configured_workers() -> None:
    harness = Harness(**{"prefill.replicas": 2, "decode.replicas": 3})
    await harness.step()
    assert harness.counts() == (2, 3)
    slots = [parse_name(name) for name in harness.apps.names(Pool.DECODE)]
    assert [parts[2] for parts in slots if parts] == [0, 1, 2]
    await harness.step()
    assert harness.counts() == (2, 3)


async def test_a_new_cluster_starts_within_its_policy() -> None:
    harness = Harness(**{"prefill.replicas": 1, "decode.replicas": 5})
    harness.store.policy = policy_text((2, 4), (1, 3))
    await harness.step()
    assert harness.counts() == (2, 3)


async def test_a_start_that_was_interrupted_goes_on() -> None:
    harness = Harness(**{"decode.replicas": 3})
    await harness.apps.add(Pool.DECODE, 0)
    harness.store.state = None
    add, calls = harness.apps.add, 0

    async def add_once(pool: Pool, slot: int) -> str:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise UnavailableError("Ray Serve does not answer")
        return await add(pool, slot)

    harness.apps.apps = ()
    harness.apps.add = add_once  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        await harness.step()
    await harness.step()
    assert harness.counts() == (1, 3)


async def test_orders_change_the_numbers() -> None:
    harness = Harness()
    await harness.step()
    harness.store.orders_given = {Pool.DECODE: 3}
    view = await harness.step()
    assert harness.counts() == (1, 3)
    assert [change.text for change in view.changes] == [
        "scaling from 1 to 3, as ordered",
        *["a worker starts: 1 to 3, as ordered"] * 2,
    ]
    harness.store.orders_given = {Pool.DECODE: 1}
    await harness.step()
    assert harness.counts() == (1, 1)


async def test_an_order_under_a_policy_is_refused_and_noted() -> None:
    harness = Harness()
    harness.store.policy = policy_text((1, 4), (1, 4))
    await harness.step()
    harness.store.orders_given = {Pool.DECODE: 3}
    view = await harness.step()
    assert harness.counts() == (1, 1)
    assert view.changes[-1].text == "an order to scale was refused: the policy decides"


async def test_a_restart_goes_on_with_its_memory() -> None:
    harness = Harness()
    await harness.step()
    harness.store.orders_given = {Pool.DECODE: 3}
    before = await harness.step()
    harness.restart()
    after = await harness.step()
    assert harness.counts() == (1, 3)
    assert after.changes[: len(before.changes)] == before.changes


async def test_without_its_memory_the_workers_that_exist_are_kept() -> None:
    """The store was emptied while the autoscaler was gone."""
    harness = Harness()
    await harness.step()
    harness.store.orders_given = {Pool.DECODE: 3}
    await harness.step()
    harness.store.state = None
    harness.restart()
    for _ in range(3):
        await harness.step()
    assert harness.counts() == (1, 3)
    assert not harness.apps.removed


async def test_without_its_memory_a_changed_role_is_kept_and_no_pool_stays_empty() -> None:
    harness = Harness(**{"prefill.replicas": 2})
    await harness.step()
    changed = harness.apps.names(Pool.PREFILL)[0]
    gone = harness.apps.names(Pool.DECODE)[0]
    await harness.apps.remove(gone)
    await harness.store.memory.remove(f"w-{gone}")
    for app in harness.apps.apps:
        pool = Pool.DECODE if app.name == changed else Pool.PREFILL
        await harness.store.memory.put(replace(worker(app), pool=pool))
    before = harness.apps.apps
    harness.store.state = None
    harness.restart()
    await harness.loop.step()
    assert harness.apps.apps == before
    harness.store.state = None
    harness.apps.apps = before[:1]  # the other pool has none
    harness.restart()
    await harness.loop.step()
    assert len(harness.apps.apps) == 2


async def test_a_memory_of_another_version_is_no_memory() -> None:
    harness = Harness()
    await harness.step()
    harness.store.state = b'{"fixed": 3}'
    harness.restart()
    await harness.step()
    assert harness.counts() == (1, 1)


async def test_a_store_that_was_emptied_changes_nothing_while_the_autoscaler_runs() -> None:
    harness = Harness()
    harness.store.policy = policy_text((2, 4), (1, 3))
    await harness.step()
    harness.store.state = harness.store.view = None
    await harness.step()
    assert harness.counts() == (2, 1)


async def test_a_worker_that_ends_is_replaced_in_its_slot() -> None:
    harness = Harness(**{"decode.replicas": 2})
    await harness.step()
    gone = harness.apps.names(Pool.DECODE)[0]
    await harness.apps.remove(gone)
    await harness.step()
    slots = sorted(app.slot for app in harness.apps.apps if app.pool is Pool.DECODE)
    assert slots == [0, 1]
    assert gone not in harness.apps.names(Pool.DECODE)


async def test_a_worker_that_cannot_start_is_tried_again_ever_later() -> None:
    harness = Harness()
    await harness.step()
    tries = []
    for _ in range(100):
        for name in harness.apps.names(Pool.DECODE):
            harness.apps.change(name, AppState.FAILED, "no memory")
            tries.append(harness.now_s)
        view = await harness.step()
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert gaps == sorted(gaps)
    assert gaps[0] <= 2
    assert 6 <= len(tries) <= 8, "1 + 2 + 4 + … seconds"
    assert "could not start: no memory" in view.changes[-1].text
    assert harness.counts()[0] == 1, "the other pool is undisturbed"


async def test_workers_that_cannot_start_together_are_one_try() -> None:
    harness = Harness(**{"decode.replicas": 8})
    await harness.step()
    for name in harness.apps.names(Pool.DECODE):
        harness.apps.change(name, AppState.FAILED, "no memory")
    remove = harness.apps.remove

    async def remove_later(name: str) -> None:
        raise UnavailableError("Ray Serve does not answer")

    harness.apps.remove = remove_later  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await harness.step()
    harness.apps.remove = remove  # type: ignore[method-assign]
    await harness.step(seconds=2)
    view = await harness.step()
    assert harness.counts() == (1, 8)
    assert sum("could not start" in change.text for change in view.changes) == 8


async def test_a_worker_without_a_place_is_tried_again_alone_and_ever_later() -> None:
    """Serve says that a worker starts, and only some seconds later that it has no place."""
    harness = Harness()
    times = {"placementTimeoutSeconds": 10, "placementRetrySeconds": 20}
    await harness.step()
    await harness.step()
    placed = harness.apps.apps
    harness.store.policy = policy_text((3, 4), (1, 3), **times)
    ordered_s: dict[str, float] = {}
    for _ in range(300):
        for app in harness.apps.apps:
            if app not in placed:
                late = harness.now_s - ordered_s.setdefault(app.name, harness.now_s) > 6
                harness.apps.change(app.name, AppState.UNPLACED if late else AppState.STARTING)
        await harness.loop.step()
        harness.now_s += 1
    orders = sorted(ordered_s.values())
    assert orders[0] == orders[1], "two workers are missing"
    gaps = [later - earlier for earlier, later in itertools.pairwise(orders[1:])]
    assert len(gaps) == 3
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(gaps))


async def test_routers_are_told_the_plan_although_serve_refuses_an_action() -> None:
    harness = Harness()
    await harness.step()

    async def refuse(pool: Pool, slot: int) -> str:
        raise UnavailableError("Ray Serve failed: no")

    harness.apps.add = refuse  # type: ignore[method-assign]
    harness.store.policy = policy_text((0, 4), (2, 3))
    for _ in range(2):
        with pytest.raises(UnavailableError, match="no"):
            await harness.loop.step()
    assert (await harness.store.memory.snapshot()).coming == frozenset(Pool)
    view = decode_view(harness.store.view)
    assert view is not None
    assert view.changes[-1].text == "policy 'p' applies"


async def test_a_worker_that_runs_does_not_hurry_one_that_cannot_start() -> None:
    harness = Harness(**{"decode.replicas": 2})
    await harness.step()
    await harness.step()
    runs, _ = harness.apps.names(Pool.DECODE)
    tries = 0
    for _ in range(100):
        for name in harness.apps.names(Pool.DECODE):
            if name != runs:
                harness.apps.change(name, AppState.FAILED, "no memory")
                tries += 1
        await harness.step()
    assert tries <= 8
    assert runs in harness.apps.names(Pool.DECODE)


async def test_a_wrong_policy_is_refused_once_and_the_last_one_stays() -> None:
    harness = Harness()
    harness.store.policy = policy_text((2, 4), (1, 3))
    good = await harness.step()
    harness.store.policy = WRONG
    for _ in range(3):
        view = await harness.step()
    assert view.policy_digest == good.policy_digest
    assert "30 is more than 8" in view.refused_why
    assert [change.text for change in view.changes if "refused" in change.text] == [
        f"a policy was refused: {view.refused_why}"
    ]
    assert harness.counts() == (2, 1)


async def test_without_its_policy_a_cluster_keeps_its_workers() -> None:
    harness = Harness()
    harness.store.policy = policy_text((3, 4), (2, 3))
    await harness.step()
    assert harness.counts() == (3, 2)
    harness.store.policy = ""
    view = await harness.step()
    await harness.step()
    assert harness.counts() == (3, 2)
    assert view.policy == ""


GREATER = ((3, 4), (2, 3))
WRONG = policy_text((1, 4), (1, 30))


async def with_policy(text: str = policy_text(*GREATER)) -> Harness:
    """Return a cluster with three prefill workers and two decode workers by its policy."""
    harness = Harness()
    harness.store.policy = text
    await harness.step()
    await harness.step()
    assert harness.counts() == (3, 2)
    return harness


async def test_a_restart_after_a_refused_policy_goes_on_with_the_last_one() -> None:
    harness = await with_policy()
    good = harness.store.policy
    harness.store.policy = WRONG
    view = await harness.step()
    assert view.refused_digest == digest_of(WRONG)
    assert harness.store.policy == good, "baton policy show prints the policy that applies"
    harness.restart()
    for _ in range(3):
        view = await harness.step()
    assert harness.counts() == (3, 2)
    assert view.policy == "p"


async def test_a_policy_removed_while_the_autoscaler_is_away_keeps_the_workers() -> None:
    harness = await with_policy()
    harness.store.policy = ""
    harness.restart()
    view = await harness.step()
    await harness.step()
    assert harness.counts() == (3, 2)
    assert view.changes[-1].text.startswith("no policy any more")


async def test_a_policy_removed_during_a_change_of_role_keeps_what_it_leads_to() -> None:
    harness = await with_policy()
    changing = harness.apps.names(Pool.PREFILL)[0]
    assert harness.store.state is not None
    memory = json.loads(harness.store.state)
    change = {"worker": changing, "to": "decode", "since_s": harness.now_s}
    memory["policy_state"]["role_change"] = change
    harness.store.state = json.dumps(memory).encode()
    harness.restart()
    harness.store.policy = ""
    before = harness.apps.apps
    await harness.step()
    for app in harness.apps.apps:
        pool = Pool.DECODE if app.name == changing else app.pool
        await harness.store.memory.put(replace(worker(app), pool=pool))
    await harness.loop.step()
    assert harness.apps.apps == before


async def test_a_policy_that_becomes_advisory_keeps_the_workers() -> None:
    harness = await with_policy()
    harness.store.policy = policy_text((1, 4), (1, 3), mode="Advisory")
    for _ in range(3):
        await harness.step()
    assert harness.counts() == (3, 2)


async def test_a_policy_removed_before_the_first_observation_keeps_the_workers() -> None:
    harness = await with_policy()
    harness.restart()
    harness.store.memory.available = False
    with pytest.raises(UnavailableError):
        await harness.loop.step()
    harness.store.memory.available = True
    harness.store.policy = ""
    for _ in range(3):
        await harness.step()
    assert harness.counts() == (3, 2)


async def test_a_store_that_lost_everything_gets_the_policy_back() -> None:
    harness = await with_policy()
    text, harness.store.policy = harness.store.policy, None
    harness.store.state = harness.store.view = None
    for _ in range(3):
        view = await harness.step()
    assert harness.store.policy == text
    assert view.policy == "p"
    assert harness.counts() == (3, 2)


async def test_a_later_policy_does_not_begin_with_the_target_of_an_earlier_one() -> None:
    harness = await with_policy()
    harness.store.policy = ""
    await harness.step()
    harness.store.orders_given = {Pool.PREFILL: 1, Pool.DECODE: 1}
    for _ in range(2):
        await harness.step()
    harness.store.policy = policy_text((1, 4), (1, 3))
    for _ in range(3):
        view = await harness.step()
    assert harness.counts() == (1, 1)
    assert view.changes[-1].text == "policy 'p' applies"


async def test_pools_that_were_empty_get_a_worker_when_their_policy_is_removed() -> None:
    """Without a policy, nothing would wake them."""
    harness = Harness()
    harness.store.policy = policy_text((0, 4), (0, 3))
    await harness.step()
    harness.apps.apps = ()
    harness.store.policy = ""
    for _ in range(2):
        await harness.step()
    assert harness.counts() == (1, 1)


async def test_a_refusal_is_shown_for_a_minute() -> None:
    harness = await with_policy()
    harness.store.policy = WRONG
    shown = [bool((await harness.step(seconds=10)).refused_digest) for _ in range(10)]
    assert shown == [True] * 7 + [False] * 3


async def test_a_clock_that_was_set_back_does_not_prolong_a_backoff() -> None:
    harness = Harness()
    await harness.step()
    harness.apps.change(harness.apps.names(Pool.DECODE)[0], AppState.FAILED, "no memory")
    await harness.step()
    harness.now_s -= 3600
    for _ in range(62):
        await harness.step()
    assert harness.counts() == (1, 1)


async def test_the_words_of_a_failed_start_are_short() -> None:
    harness = Harness()
    await harness.step()
    name = harness.apps.names(Pool.DECODE)[0]
    harness.apps.change(name, AppState.FAILED, "Traceback\n" * 500 + "no memory\n\n")
    view = await harness.step()
    assert view.changes[-1].text == f"{name} could not start: no memory"


async def test_a_process_that_takes_over_in_the_middle_of_a_start_finishes_it() -> None:
    harness = Harness(**{"decode.replicas": 3})
    add, calls = harness.apps.add, 0

    async def add_twice(pool: Pool, slot: int) -> str:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise UnavailableError("Ray Serve does not answer")
        return await add(pool, slot)

    harness.apps.add = add_twice  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        await harness.step()
    harness.restart()
    await harness.step()
    assert harness.counts() == (1, 3)


async def test_the_start_of_the_first_workers_is_measured() -> None:
    harness = Harness()
    await harness.loop.step()  # orders them
    harness.now_s += 30
    assert (await harness.step()).start_s == 30


async def test_a_start_is_measured_from_the_order_to_the_first_lease() -> None:
    harness = Harness()
    await harness.step()
    harness.store.orders_given = {Pool.DECODE: 2}
    await harness.loop.step()  # orders the worker
    harness.now_s += 2  # Serve is slow to answer
    await harness.loop.step()  # sees that it starts
    harness.now_s += 38
    view = await harness.step()
    assert view.start_s == 40
    await harness.store.memory.remove(f"w-{harness.apps.names(Pool.DECODE)[0]}")  # it is late
    await harness.loop.step()
    harness.now_s += 1
    assert (await harness.step()).start_s == 40


async def test_nobody_knows_when_the_workers_that_a_restart_finds_were_ordered() -> None:
    harness = Harness()
    harness.store.orders_given = {Pool.DECODE: 2}
    await harness.loop.step()
    harness.restart()
    await harness.loop.step()
    harness.now_s += 40
    assert (await harness.step()).start_s is None


async def test_an_advisory_policy_shows_its_decision_and_changes_nothing() -> None:
    harness = Harness()
    await harness.step()
    harness.store.policy = policy_text((3, 4), (2, 3), mode="Advisory")
    for _ in range(3):
        view = await harness.step()
    assert harness.counts() == (1, 1)
    assert {each.pool: each.target for each in view.advice} == {Pool.PREFILL: 3, Pool.DECODE: 2}
    assert {each.pool: each.target for each in view.pools} == {Pool.PREFILL: 1, Pool.DECODE: 1}


async def test_routers_are_told_of_pools_that_may_be_empty_on_purpose() -> None:
    harness = Harness()
    await harness.step()
    assert (await harness.store.memory.snapshot()).coming == frozenset()
    harness.store.policy = policy_text((0, 4), (0, 3))
    await harness.step()
    assert (await harness.store.memory.snapshot()).coming == frozenset(Pool)


@pytest.mark.parametrize("part", ["serve", "registry"])
async def test_nothing_changes_while_serve_or_the_store_is_away(part: str) -> None:
    harness = Harness()
    await harness.step()
    before = harness.apps.apps
    harness.store.orders_given = {Pool.DECODE: 3}
    harness.apps.available = part != "serve"
    harness.store.memory.available = part != "registry"
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await harness.loop.step()
    assert [each.name for each in harness.apps.apps] == [each.name for each in before]
    harness.apps.available = harness.store.memory.available = True
    await harness.step()
    assert harness.counts() == (1, 3), "the order was not lost"


async def test_only_the_latest_changes_are_kept() -> None:
    harness = Harness()
    await harness.step()
    for number in range(KEPT_CHANGES):
        harness.store.orders_given = {Pool.DECODE: 1 + number % 2}
        view = await harness.step()
    assert len(view.changes) == KEPT_CHANGES
    numbers = [change.number for change in view.changes]
    assert numbers == list(range(numbers[0], numbers[0] + KEPT_CHANGES))
