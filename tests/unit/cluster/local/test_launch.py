"""The launcher's own decisions, with fakes for Ray and the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from autoscale.policy import Policy
from cluster.autoscale.policy_file import PolicyFile
from cluster.autoscale.view import AutoscaleView, Change, encode_view
from cluster.local import launch
from cluster.local.launch import Cluster, StartInterruptedError
from cluster.local.run_dir import RunDir
from core.config.schema import Config, load_config
from core.errors import InternalError, UnavailableError
from core.model.resolve import ResolvedModel
from core.state.orders import StartFailure
from core.state.store import Store
from core.types import Pool, WorkerLoad, WorkerRecord, WorkerState

AWAY = UnavailableError("the registry does not answer")


def quiet(_line: str) -> None:
    """Discard progress."""


@dataclass
class FakeRuntime:
    """A fake Ray runtime."""

    def is_alive(self) -> bool:
        return True

    def has_replicas(self) -> bool:
        return True

    def failure(self) -> str | None:
        return None

    def worker_logs(self) -> list[Path]:
        return []

    def drain_router(self, grace_s: float) -> None:
        """Return immediately."""

    def delete(self, timeout_s: float) -> bool:
        return True


@dataclass
class FakeStore:
    """Replaces the registry, the ``Orders`` and the ``AutoscaleStore`` of a cluster.

    Each call of ``list`` takes the next element of ``answers`` and returns or raises it. When
    only the last element is left, each call uses this element. So does ``read_view`` with
    ``changes``.
    """

    answers: list[tuple[WorkerRecord, ...] | Exception] = field(default_factory=list)
    orders: dict[Pool, int] = field(default_factory=dict)
    changes: list[tuple[Change, ...]] = field(default_factory=lambda: [()])
    policy: str | None = "left by an earlier cluster"

    async def list(self) -> tuple[WorkerRecord, ...]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def take_scale(self) -> dict[Pool, int]:
        taken, self.orders = self.orders, {}
        return taken

    async def read_view(self) -> bytes:
        changes = self.changes.pop(0) if len(self.changes) > 1 else self.changes[0]
        return encode_view(AutoscaleView("", "", "", "", False, None, (), (), (), changes))

    async def forget(self) -> None:
        self.policy = None

    async def apply_policy(self, text: str) -> None:
        self.policy = text

    async def take_failures(self) -> tuple[StartFailure, ...]:
        return ()

    async def close(self) -> None:
        """Do nothing."""


def worker(pool: Pool) -> WorkerRecord:
    load = WorkerLoad(
        queue_depth=0, running=0, queued_tokens=0, kv_blocks_free=1, kv_blocks_total=1
    )
    return WorkerRecord(
        id=f"{pool}-1",
        pool=pool,
        state=WorkerState.READY,
        incarnation="i",
        address="a:1",
        kv_addresses=(),
        model="m",
        load=load,
    )


ALL = tuple(worker(pool) for pool in Pool)


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Create clusters with fakes, in the state between start and stop."""

    def make(
        store: FakeStore | None = None,
        progress: Callable[[str], None] = quiet,
        config: Config | None = None,
        signal: Any = None,
    ) -> Any:
        cluster: Any = Cluster(config or Config(), progress, signal)
        cluster._runtime = FakeRuntime()
        cluster._registry = cluster._orders = cluster._autoscale = store or FakeStore([ALL])
        request.addfinalizer(cluster._loop.close)
        return cluster

    return make


@pytest.mark.parametrize("error", [BrokenPipeError, KeyboardInterrupt])
def test_everything_is_stopped_even_if_draining_raises(
    make: Callable[..., Any], error: type[BaseException]
) -> None:
    def fail(_line: str) -> None:
        raise error

    cluster = make(progress=fail)
    undone: list[str] = []
    cluster._stack.callback(undone.append, "Ray")
    with pytest.raises(error):
        cluster.stop()
    assert undone == ["Ray"]
    cluster.stop()  # idempotent


@dataclass
class StopAfter:
    """A stop signal that is off for the first ``polls`` reads, and then on."""

    polls: int
    hurry: bool = False

    @property
    def requested(self) -> bool:
        self.polls -= 1
        return self.polls < 0


def test_changes_of_the_autoscaler_are_reported_once(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_POLL_S", 0.001)
    changes = (
        Change(1, 0.0, Pool.DECODE, "scaling from 1 to 2, as ordered"),
        Change(2, 0.0, None, "policy 'chat' applies"),
    )
    # The autoscaler's memory is lost in the end, so it counts from 1 again.
    store = FakeStore([ALL], changes=[changes, changes, (Change(1, 0.0, None, "it goes on"),)])
    said: list[str] = []
    make(store, signal=StopAfter(4)).watch(said.append)
    assert said == [
        "decode: scaling from 1 to 2, as ordered",
        "policy 'chat' applies",
        "it goes on",
    ]


def test_workers_that_come_and_go_are_reported(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_POLL_S", 0.001)
    prefill, decode = ALL
    draining, newer = replace(decode, state=WorkerState.DRAINING), replace(decode, id="decode-2")
    answers: list[tuple[WorkerRecord, ...] | Exception] = [
        *(ALL, ALL, AWAY, ALL),
        *((prefill, draining), (prefill,), (prefill, newer)),
    ]
    said: list[str] = []
    make(FakeStore(answers), signal=StopAfter(len(answers))).watch(said.append)
    assert said == [
        f"{AWAY}; running requests go on",
        "the registry answers again",
        "decode-1 takes no more requests",
        "decode-2 is ready",
    ]


def test_a_start_survives_a_store_that_fails_for_a_while(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_POLL_S", 0.001)
    monkeypatch.setattr("baton.Client.health", lambda *_args, **_options: True)
    lines: list[str] = []
    make(FakeStore([AWAY, (), AWAY, ALL]), lines.append).wait_ready()
    assert "the registry does not answer" in lines


def test_a_store_that_stays_away_ends_the_start_at_its_timeout(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "_POLL_S", 0.001)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    config = load_config(None, {"cluster.start_timeout_s": 0.01})
    with pytest.raises(InternalError, match="not ready after 0 s: the registry does not answer"):
        make(FakeStore([AWAY]), config=config).wait_ready()


def test_logs_that_cannot_be_kept_do_not_hide_the_failure(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failure = StartFailure("router", "no memory", is_config=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    message = str(make()._start_error(failure))
    assert message.startswith("the router could not start: no memory; logs could not be kept: ")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert "logs could not be kept: Could not" in str(make()._start_error(failure))


def test_a_signal_ends_the_unpacking_of_the_model(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(_model: object, progress: Callable[[str], None]) -> ResolvedModel:
        for second in range(100):
            progress(f"unpacking, {second} s")
        pytest.fail("the unpacking went on")

    monkeypatch.setattr(launch, "resolve_model", unpack)
    lines: list[str] = []
    cluster = make(progress=lines.append, signal=StopAfter(2))
    with pytest.raises(StartInterruptedError):
        cluster._resolve_model()
    assert lines == ["unpacking, 0 s", "unpacking, 1 s"]


@pytest.mark.parametrize("policy", [None, "apiVersion: baton/v1"])
def test_what_an_earlier_cluster_left_in_the_store_is_dropped(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, policy: str | None
) -> None:
    store = FakeStore([()], orders={Pool.DECODE: 8})
    for part in ("registry", "orders", "autoscale"):
        monkeypatch.setattr(Store, part, lambda _self: store)
    cluster = make(config=load_config(None, {"redis.url": "redis://10.0.0.1"}))
    if policy is not None:
        cluster._policy = PolicyFile(cast("Policy", None), policy)
    cluster._connect_registry(None)
    assert store.orders == {}
    assert store.policy == policy


@dataclass
class FailedReaper:
    at_work: bool

    def finish(self) -> bool:
        return False

    def is_at_work(self) -> bool:
        return self.at_work


@pytest.mark.parametrize("at_work", [True, False])
def test_folder_and_lock_are_left_to_a_reaper_that_is_still_at_work(
    make: Callable[..., Any], tmp_path: Path, at_work: bool
) -> None:
    lines: list[str] = []
    run = RunDir(tmp_path / "run", "c")
    make(progress=lines.append)._finish(FailedReaper(at_work), run)
    run.release()
    assert run.path.exists() is run.lock_file.exists() is at_work
    assert lines == ["some processes of the cluster could not be killed"]
    for folder in run.folders:
        shutil.rmtree(folder, ignore_errors=True)
