"""Starts a whole cluster on this machine, watches it, and takes it down.

    run folder (holds the name) ▸ reaper ▸ model ▸ Valkey ▸ Ray ▸ Serve ▸ router and workers

What is checked cheaply is checked first. Whatever happens after the reaper started, nothing
of the cluster outlives this process by more than some seconds.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Self, TypeVar

import baton
from cluster.local.environment import applied, cluster_environment
from cluster.local.failure_log import keep_logs
from cluster.local.loop_thread import LoopThread
from cluster.local.ports import check_port_is_free, free_port
from cluster.local.reaper import Reaper
from cluster.local.run_dir import ClusterState, RunDir, process_started
from cluster.local.signals import NeverStop, Signals, StopSignal
from cluster.local.valkey import EmbeddedValkey
from core.config.schema import Config
from core.errors import BatonError, ConfigError, InternalError, UnavailableError
from core.model.resolve import ResolvedModel, resolve_model
from core.state.orders import Orders, StartFailure
from core.state.registry import RedisRegistry
from core.state.store import Store
from core.types import Pool, WorkerRecord, WorkerState

if TYPE_CHECKING:
    from cluster.ray.head import RayRuntime

Progress = Callable[[str], None]
T = TypeVar("T")

_POLL_S = 0.2
_HEALTH_TIMEOUT_S = 1.0
_ROUTER_SHARE = 0.8  # of the grace; the rest is for workers and engines
_LATE_S = 1.0  # beyond the grace, for a call of Ray's under way: to abandon it leaves noise


class StartInterruptedError(Exception):
    """Somebody wanted the cluster to end before it was ready."""


class Cluster:
    """One cluster. ``start`` and ``stop`` once each, from the main thread, and one in the life of
    a process: Ray keeps what its first start read from the environment.

    Args:
        progress: told what is being done, with each change.
        signal: looked at in each wait.
    """

    def __init__(
        self, config: Config, progress: Progress, signal: StopSignal | None = None
    ) -> None:
        self.config = config
        self._progress = progress
        self._signal = signal or NeverStop()
        self._wanted = {pool: config.pool(pool).replicas for pool in Pool}
        self._stack = ExitStack()  # undoes each step of start, latest first
        self._has_abandoned = False  # a thread that is still in a call of Ray's
        self._loop = LoopThread()
        self._run: RunDir | None = None
        self._valkey: EmbeddedValkey | None = None
        self._runtime: RayRuntime | None = None
        self._registry: RedisRegistry | None = None
        self._orders: Orders | None = None

    @property
    def address(self) -> str:
        """The router's "host:port"."""
        return self.config.router_address

    def start(self) -> None:
        """Return when the router serves and all workers are ready.

        Raises:
            ConfigError: something that the user can set right.
            BatonError: a part does not start, or not in ``cluster.start_timeout_s``.
            StartInterruptedError: the signal came.
        """
        try:
            self._start()
        except BaseException:
            self.stop(graceful=False)
            raise

    def workers(self) -> tuple[WorkerRecord, ...]:
        """The leases that hold now. Raises UnavailableError if the registry is away."""
        assert self._registry is not None
        return self._await(self._registry.list())

    def scale(self, pool: Pool, replicas: int) -> None:
        """Change the number of workers of ``pool``; ``wait_ready`` waits for it.

        Raises:
            ConfigError: ``replicas`` is out of the pool's bounds.
            UnavailableError: Ray Serve does not answer.
        """
        limit = self.config.pool(pool).max_replicas
        if not 1 <= replicas <= limit:
            raise ConfigError(f"{pool}: {replicas} workers are not within 1 and {limit}")
        assert self._runtime is not None
        self._runtime.scale(pool, replicas)
        self._wanted[pool] = replicas

    def wait_ready(self) -> None:
        """Wait until the wanted workers are ready and the router serves; see ``start``."""
        timeout_s = self.config.cluster.start_timeout_s
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._check_signal()
            try:
                if self._is_ready():
                    return
                self._check_failures()
                waiting_for = self._waiting_for()
            except UnavailableError as error:  # a store that hiccups may answer the next time
                waiting_for = str(error)
                if self._valkey is not None:
                    self._valkey.ensure_running()
            if time.monotonic() > deadline_s:
                raise InternalError(
                    f"the cluster is not ready after {timeout_s:.0f} s: {waiting_for}; "
                    f"{self._where_logs_are()}"
                )
            self._progress(waiting_for)
            time.sleep(_POLL_S)

    def watch(self, say: Callable[[str], None]) -> None:
        """Keep the cluster running and carry out orders, until the signal comes.

        Args:
            say: told of each thing that happens.

        Raises:
            InternalError: Ray ended.
        """
        assert self._runtime is not None
        away = False
        ready: frozenset[str] | None = None
        while not self._signal.requested:
            if not self._runtime.is_alive():
                raise InternalError("Ray ended unexpectedly; the cluster is taken down")
            if self._valkey is not None and self._valkey.ensure_running():
                say("the embedded Valkey had ended and was started again")
            try:
                self._carry_out_orders(say)
                ready = self._tell_changes(ready, say)
                if away:
                    say("the registry answers again")
                away = False
            except UnavailableError as error:
                if not away:
                    say(f"{error}; running requests go on")
                away = True
            time.sleep(_POLL_S)

    def stop(self, *, graceful: bool = True) -> None:
        """Take everything down. Idempotent; never raises for a part that is gone already.

        Running requests get ``cluster.stop_grace_s``, less if the signal says hurry.
        """
        try:
            if self._run is not None:
                with suppress(ConfigError, OSError):
                    self._run.set_phase("stopping")
            if graceful and self._runtime is not None and self._runtime.has_replicas():
                self._drain(self._runtime)
        finally:  # also after a Ctrl-C while draining
            self._runtime = None
            self._run = None
            self._stack.close()

    def __enter__(self) -> Self:
        with Signals() as signals:
            self._signal = signals
            try:
                self.start()
            except StartInterruptedError:
                raise KeyboardInterrupt from None
        self._signal = NeverStop()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        """As ``with``, and blocking like it."""
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        cluster = self.config.cluster
        self._stack.callback(self._loop.close)
        run = RunDir(cluster.run_path, cluster.name)
        self._stack.callback(run.release)
        self._choose_port()
        cluster_id = uuid.uuid4().hex
        reaper = Reaper(cluster_id, run.folders, run.lock_file, run.lock_fd)
        self._stack.callback(self._finish, reaper, run)
        self._run = run
        self._write_state(cluster_id, served_name="", store=None)
        path = self.config.model.path
        is_local = path.startswith("embedded:") or Path(path).expanduser().exists()
        self._stack.enter_context(
            applied(
                cluster_environment(cluster_id, cluster.host, run.scratch, model_is_local=is_local)
            )
        )
        model = self._resolve_model()
        store = self._connect_registry(run)
        self._write_state(cluster_id, model.served_name, store)
        self._check_signal()
        self._start_ray(run, model, store)
        self.wait_ready()
        run.set_phase("ready")

    def _choose_port(self) -> None:
        host, port = self.config.router_host, self.config.router.port
        host_field = "cluster.host" if self.config.router.host is None else "router.host"
        if port == 0:  # fixed from here on, so that a restarted router comes back to it
            port = free_port(host, host_field)
        check_port_is_free(host, port, host_field)
        router = self.config.router.model_copy(update={"port": port})
        self.config = self.config.model_copy(update={"router": router})

    def _resolve_model(self) -> ResolvedModel:
        def progress(line: str) -> None:
            self._check_signal()
            self._progress(line)

        model = resolve_model(self.config.model, progress)
        found = self.config.model.model_copy(
            update={"path": str(model.path), "served_name": model.served_name}
        )
        self.config = self.config.model_copy(update={"model": found})
        return model

    def _connect_registry(self, run: RunDir) -> Store:
        cluster, url = self.config.cluster, self.config.redis.url
        if url is None:
            self._valkey = EmbeddedValkey(cluster.host, run.scratch / "valkey")
            self._valkey.start()
            self._stack.callback(self._valkey.stop)
            url = self._valkey.url
        store = Store.of(self.config, url)
        registry = self._registry = store.registry()
        orders = self._orders = store.orders()
        self._stack.callback(lambda: self._await(registry.close()))
        self._stack.callback(lambda: self._await(orders.close()))
        if self._await(registry.list()):
            raise ConfigError(
                f"redis.url: workers of a cluster named {cluster.name!r} are registered there; "
                "choose another cluster.name, or wait until their leases end"
            )
        self._await(orders.take_failures())  # of an earlier start
        self._await(orders.take_scale())  # for a cluster that died before it looked
        return store

    def _start_ray(self, run: RunDir, model: ResolvedModel, store: Store) -> None:
        self._progress("starting Ray")
        # Imported late: Ray takes seconds, and its settings from the environment.
        from cluster.ray.app import build_app
        from cluster.ray.head import RayRuntime

        runtime = RayRuntime(self.config, run.scratch / "ray")
        self._stack.callback(lambda: runtime.stop(disconnect=not self._has_abandoned))
        runtime.start()
        self._runtime = runtime
        app = build_app(self.config, model, store, kv_token=token_hex(32), cuda=runtime.has_cuda())
        runtime.deploy(app)

    def _write_state(self, cluster_id: str, served_name: str, store: Store | None) -> None:
        assert self._run is not None
        config = self.config
        started = process_started(os.getpid())
        assert started is not None
        self._run.write(
            ClusterState(
                name=config.cluster.name,
                cluster_id=cluster_id,
                pid=os.getpid(),
                pid_started=started,
                phase="starting",
                address=self.address,
                model=served_name,
                store=store,
                start_timeout_s=config.cluster.start_timeout_s,
                stop_grace_s=config.cluster.stop_grace_s,
                max_replicas={pool: config.pool(pool).max_replicas for pool in Pool},
                folders=tuple(map(str, self._run.folders)),
            )
        )

    def _is_ready(self) -> bool:
        ready = self._ready()
        if any(ready[pool] < wanted for pool, wanted in self._wanted.items()):
            return False
        with baton.Client(self.address) as client:
            try:
                return client.health(timeout_s=_HEALTH_TIMEOUT_S)
            except BatonError:
                return False

    def _ready(self) -> dict[Pool, int]:
        records = self.workers()
        return {
            pool: sum(r.pool is pool and r.state is WorkerState.READY for r in records)
            for pool in Pool
        }

    def _waiting_for(self) -> str:
        ready = self._ready()
        if all(ready[pool] == wanted for pool, wanted in self._wanted.items()):
            return "waiting for the router"
        census = ", ".join(f"{pool} {ready[pool]} of {self._wanted[pool]} ready" for pool in Pool)
        return f"starting the workers: {census}"

    def _check_signal(self) -> None:
        if self._signal.requested:
            raise StartInterruptedError

    def _check_failures(self) -> None:
        assert self._orders is not None
        assert self._runtime is not None
        for failure in self._await(self._orders.take_failures()):
            raise self._start_error(failure)
        reason = self._runtime.failure()
        if reason is not None:
            raise InternalError(f"a part did not start: {reason}; {self._where_logs_are()}")

    def _start_error(self, failure: StartFailure) -> Exception:
        if failure.is_config:
            return ConfigError(failure.message)
        message = failure.message.rstrip(".")
        return InternalError(
            f"the {failure.part} could not start: {message}; {self._where_logs_are()}"
        )

    def _where_logs_are(self) -> str:
        """Save the workers' logs, which go with the run folder, and say where."""
        assert self._runtime is not None
        try:
            return f"logs: {keep_logs(self.config.cluster.name, self._runtime.worker_logs())}"
        except (OSError, RuntimeError) as error:  # what failed matters more than that
            return f"logs could not be kept: {error}"

    def _carry_out_orders(self, say: Callable[[str], None]) -> None:
        assert self._orders is not None
        for pool, replicas in self._await(self._orders.take_scale()).items():
            say(f"scaling {pool} from {self._wanted[pool]} to {replicas}")
            try:
                self.scale(pool, replicas)
            except (ConfigError, UnavailableError) as error:
                say(str(error))
        for failure in self._await(self._orders.take_failures()):
            say(f"the {failure.part} could not start: {failure.message}; trying again")

    def _tell_changes(
        self, before: frozenset[str] | None, say: Callable[[str], None]
    ) -> frozenset[str]:
        """Say which workers came and went since the last look; return those that are ready."""
        ready = frozenset(w.id for w in self.workers() if w.state is WorkerState.READY)
        if before is not None:
            for worker_id in sorted(before - ready):
                say(f"{worker_id} takes no more requests")
            for worker_id in sorted(ready - before):
                say(f"{worker_id} is ready")
        return ready

    def _drain(self, runtime: RayRuntime) -> None:
        """Let requests end: first those in the router, so that no worker leaves before."""
        deadline_s = time.monotonic() + self.config.cluster.stop_grace_s

        def left_s() -> float:
            return max(0.1, deadline_s - time.monotonic())

        self._progress("draining")
        self._bounded(lambda: runtime.drain_router(left_s() * _ROUTER_SHARE), deadline_s)
        if runtime.is_alive():  # else Serve cannot, and all of it is killed
            self._progress("stopping the workers")
            self._bounded(lambda: runtime.delete(left_s()), deadline_s)

    def _bounded(self, step: Callable[[], object], deadline_s: float) -> None:
        """Run a step that may hang or fail, until it ends, time is up or the signal hurries. It
        ends in time by itself, but for a call of Ray's that is under way."""

        errors: list[Exception] = []

        def run() -> None:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - what is broken is ended without it
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        deadline_s += _LATE_S
        while thread.is_alive() and time.monotonic() < deadline_s and not self._signal.hurry:
            thread.join(0.05)
        self._has_abandoned |= thread.is_alive()
        for error in errors:
            self._progress(f"not in good order: {type(error).__name__}: {error}")

    def _finish(self, reaper: Reaper, run: RunDir) -> None:
        if not reaper.finish():
            if reaper.is_at_work():
                run.leave_to_reaper()
            self._progress("some processes of the cluster resist being killed")

    def _await(self, call: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(call)
