"""The launcher: starts a whole cluster on this machine, watches it, and stops it.

    run folder (reserves the name) ▸ reaper ▸ model ▸ Valkey ▸ Ray ▸ Serve ▸ router and workers

Cheap checks come first. Once the reaper runs, no process, port or folder of the cluster outlives
this process by more than a few seconds, even if this process is killed.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from cluster.autoscale.policy_file import first_workers, read_policy, worker_gpus
from cluster.autoscale.view import decode_view
from cluster.local.draining import Drainer
from cluster.local.environment import applied, cluster_environment
from cluster.local.failure_log import keep_logs
from cluster.local.loop_thread import LoopThread
from cluster.local.ports import with_router_port
from cluster.local.readiness import count_ready, describe_missing, router_serves
from cluster.local.reaper import Reaper
from cluster.local.run_dir import ClusterState, RunDir, process_started
from cluster.local.signals import NeverStop, Signals, StopSignal
from cluster.local.valkey import EmbeddedValkey
from core.config.schema import Config
from core.errors import ConfigError, InternalError, UnavailableError
from core.model.resolve import ResolvedModel, resolve_model
from core.rpc.credentials import ClusterCredentials
from core.state.autoscale import AutoscaleStore
from core.state.orders import Orders, StartFailure
from core.state.registry import RedisRegistry
from core.state.store import Store
from core.types import Pool, WorkerRecord, WorkerState

if TYPE_CHECKING:
    from cluster.ray.head import RayRuntime

Progress = Callable[[str], None]
T = TypeVar("T")

_POLL_S = 0.2  # how soon changes and ended processes are noticed


class StartInterruptedError(Exception):
    """A stop signal came before the cluster was ready."""


class Cluster:
    """One cluster, from its start to its stop.

    Call ``start`` and ``stop`` from the main thread. A process can start only one cluster in
    its life, because Ray keeps the settings that its first start read from the environment.
    ``with`` and ``async with`` start the cluster on entry and stop it on exit. Both block the
    thread. If a signal comes while they start the cluster, they raise KeyboardInterrupt.

    Args:
        progress: called with a description of each step.
        signal: polled during each wait. The default is a signal that never comes. ``with`` and
            ``async with`` ignore this argument.
    """

    def __init__(
        self, config: Config, progress: Progress, signal: StopSignal | None = None
    ) -> None:
        self.config = config
        self._progress = progress
        self._signal = signal or NeverStop()
        gpus = worker_gpus(config)
        self._policy = read_policy(config, gpus)
        self._wanted = first_workers(config, self._policy, gpus)
        self._stack = ExitStack()  # undoes the steps of start, the last one first
        self._drainer = Drainer(progress)
        self._loop = LoopThread()
        self.credentials = ClusterCredentials.create()
        self._run: RunDir | None = None
        self._valkey: EmbeddedValkey | None = None
        self._runtime: RayRuntime | None = None
        self._registry: RedisRegistry | None = None
        self._orders: Orders | None = None
        self._autoscale: AutoscaleStore | None = None
        self._last_change = 0  # number of the latest reported change of the autoscaler

    @property
    def address(self) -> str:
        """The router's "host:port"."""
        return self.config.router_address

    def start(self) -> None:
        """Start everything. Return when the router serves and all workers are ready.

        If a step fails, everything is stopped before the exception is raised.

        Raises:
            ConfigError: the user can correct the cause.
            BatonError: a part does not start, or is not ready within ``cluster.start_timeout_s``.
            StartInterruptedError: the stop signal came.
        """
        try:
            self._start()
        except BaseException:
            self.stop(graceful=False)
            raise

    def workers(self) -> tuple[WorkerRecord, ...]:
        """Return the workers in the registry: those whose lease has not expired.

        Raises:
            UnavailableError: the registry does not answer.
        """
        assert self._registry is not None
        return self._await(self._registry.list())

    def wait_ready(self) -> None:
        """Wait until the router serves and each pool has at least its number of ready workers.

        Raises:
            ConfigError, BatonError, StartInterruptedError: as ``start``.
        """
        timeout_s = self.config.cluster.start_timeout_s
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._check_signal()
            try:
                if self._is_ready():
                    return
                self._check_failures()
                waiting_for = describe_missing(count_ready(self.workers()), self._wanted_now())
            except UnavailableError as error:  # the store may answer at the next poll
                waiting_for = str(error)
                if self._valkey is not None:
                    self._valkey.ensure_running()
            if time.monotonic() > deadline_s:
                raise InternalError(
                    f"the cluster is not ready after {timeout_s:.0f} s: {waiting_for}; "
                    f"{self._keep_logs()}"
                )
            self._progress(waiting_for)
            time.sleep(_POLL_S)

    def watch(self, say: Callable[[str], None]) -> None:
        """Keep the cluster running and report what happens, until the stop signal comes.

        Restarts an embedded Valkey that died. If the registry does not answer, this is reported
        once, and running requests continue.

        Args:
            say: called with one line for each event.

        Raises:
            InternalError: Ray ended, or the embedded Valkey does not start again.
        """
        assert self._runtime is not None
        registry_is_away = False
        ready: frozenset[str] | None = None
        while not self._signal.requested:
            if not self._runtime.is_alive():
                raise InternalError("Ray ended unexpectedly; the cluster is taken down")
            if self._valkey is not None and self._valkey.ensure_running():
                say("the embedded Valkey had ended and was started again")
            try:
                self._report_failures(say)
                self._report_scaling(say)
                ready = self._report_changes(ready, say)
                if registry_is_away:
                    say("the registry answers again")
                registry_is_away = False
            except UnavailableError as error:
                if not registry_is_away:
                    say(f"{error}; running requests go on")
                registry_is_away = True
            time.sleep(_POLL_S)

    def stop(self, *, graceful: bool = True) -> None:
        """Stop everything. Idempotent. A part that has already ended causes no error.

        Args:
            graceful: let running requests end, for at most ``cluster.stop_grace_s``, or until
                the signal says hurry. If False, running requests are aborted immediately.
        """
        try:
            if self._run is not None:
                with suppress(ConfigError, OSError):
                    self._run.set_phase("stopping")
            if graceful and self._runtime is not None and self._runtime.has_replicas():
                grace_s = self.config.cluster.stop_grace_s
                self._drainer.drain(self._runtime, grace_s, self._signal)
        finally:  # also after a Ctrl-C during the drain
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
        """Start the cluster, as ``with`` does. This blocks the event loop."""
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        cluster = self.config.cluster
        self._stack.callback(self._loop.close)
        run = RunDir(cluster.run_path, cluster.name)
        self._stack.callback(run.release)
        self.config = with_router_port(self.config)
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
            self._valkey = EmbeddedValkey(
                cluster.host,
                run.scratch / "valkey",
                journal_bytes=int(self.config.router.journal_max_bytes),
            )
            self._valkey.start()
            self._stack.callback(self._valkey.stop)
            url = self._valkey.url
        store = Store.of(self.config, url)
        registry = self._registry = store.registry()
        orders = self._orders = store.orders()
        autoscale = self._autoscale = store.autoscale()
        for part in (registry, orders, autoscale):
            self._stack.callback(self._close, part)
        if self._await(registry.list()):
            raise ConfigError(
                f"redis.url: workers of a cluster named {cluster.name!r} are registered there; "
                "choose another cluster.name, or wait until their leases end"
            )
        # Drop the unread failures and orders that an earlier cluster of this name left.
        self._await(orders.take_failures())
        self._await(orders.take_scale())
        self._await(autoscale.forget())
        if self._policy is not None:
            self._await(autoscale.apply_policy(self._policy.text))
        return store

    def _close(self, part: RedisRegistry | Orders | AutoscaleStore) -> None:
        self._await(part.close())

    def _start_ray(self, run: RunDir, model: ResolvedModel, store: Store) -> None:
        self._progress("starting Ray")
        # Imported only here for two reasons: the import takes seconds, and during the import Ray
        # reads its settings from the environment, which ``_start`` has set by now.
        from cluster.ray.app import APP, build_app
        from cluster.ray.deployments import WorkerAppSettings
        from cluster.ray.head import RayRuntime

        runtime = RayRuntime(self.config, run.scratch / "ray")
        self._stack.callback(lambda: runtime.stop(disconnect=not self._drainer.has_abandoned_call))
        runtime.start()
        self._runtime = runtime
        settings = WorkerAppSettings(
            self.config, model, store, self.credentials, cuda=runtime.has_cuda(), main_app=APP
        )
        runtime.deploy(build_app(settings))

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
        ready, wanted = count_ready(self.workers()), self._wanted_now()
        if any(ready[pool] < wanted[pool] for pool in Pool):
            return False
        return router_serves(self.address)

    def _wanted_now(self) -> dict[Pool, int]:
        """Return the autoscaler's targets, or those of the start until it has decided."""
        assert self._autoscale is not None
        view = decode_view(self._await(self._autoscale.read_view()))
        targets = {} if view is None else {each.pool: each.target for each in view.pools}
        return {**self._wanted, **targets}

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
            raise InternalError(f"a part did not start: {reason}; {self._keep_logs()}")

    def _start_error(self, failure: StartFailure) -> Exception:
        if failure.is_config:
            return ConfigError(failure.message)
        message = failure.message.rstrip(".")
        return InternalError(f"the {failure.part} could not start: {message}; {self._keep_logs()}")

    def _keep_logs(self) -> str:
        """Save the ends of the workers' logs outside the run folder.

        Return text for the error message: the file's path, or why the logs could not be saved.
        """
        assert self._runtime is not None
        try:
            return f"logs: {keep_logs(self.config.cluster.name, self._runtime.worker_logs())}"
        except (OSError, RuntimeError) as error:  # this error must not hide the failure itself
            return f"logs could not be kept: {error}"

    def _report_failures(self, say: Callable[[str], None]) -> None:
        assert self._orders is not None
        for failure in self._await(self._orders.take_failures()):
            say(f"the {failure.part} could not start: {failure.message}; trying again")

    def _report_scaling(self, say: Callable[[str], None]) -> None:
        """Report the changes that the autoscaler has made since the last call."""
        assert self._autoscale is not None
        view = decode_view(self._await(self._autoscale.read_view()))
        if view is None or not view.changes:
            return
        if view.changes[-1].number < self._last_change:  # its memory was lost: it counts anew
            self._last_change = 0
        for change in view.changes:
            if change.number > self._last_change:
                say(change.line)
                self._last_change = change.number

    def _report_changes(
        self, before: frozenset[str] | None, say: Callable[[str], None]
    ) -> frozenset[str]:
        """Report the workers that became ready or stopped being ready since the last call.

        Args:
            before: the result of the last call; None for the first call, which reports nothing.

        Returns:
            The ids of the ready workers.
        """
        ready = frozenset(w.id for w in self.workers() if w.state is WorkerState.READY)
        if before is not None:
            for worker_id in sorted(before - ready):
                say(f"{worker_id} takes no more requests")
            for worker_id in sorted(ready - before):
                say(f"{worker_id} is ready")
        return ready

    def _finish(self, reaper: Reaper, run: RunDir) -> None:
        if not reaper.finish():
            if reaper.is_at_work():
                run.leave_to_reaper()
            self._progress("some processes of the cluster could not be killed")

    def _await(self, call: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(call)
