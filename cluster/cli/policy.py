"""``baton policy``: checks, applies, shows and explains the autoscaling policy of a cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from autoscale.load import parse_policy, read_policy_text
from autoscale.snapshot import PoolDecision
from cluster.autoscale.policy_file import checked_policy, digest_of, worker_gpus
from cluster.autoscale.view import AutoscaleView
from cluster.cli.status import read_view
from cluster.local.run_dir import ClusterState
from core.config.schema import Config
from core.errors import ConfigError, UnavailableError
from core.state.autoscale import AutoscaleStore

_APPLY_TIMEOUT_S = 15.0  # the autoscaler looks once a second; its replacement starts within seconds
_POLL_S = 0.1  # the autoscaler looks once a second

T = TypeVar("T")


def check(path: Path, config: Config | None) -> str:
    """Return the text of a policy file that is correct.

    Args:
        config: if given, the cluster's configuration, which must allow the policy.

    Raises:
        ConfigError: the file cannot be read, or the policy is wrong or does not suit the cluster.
    """
    text = read_policy_text(path)
    if config is None:
        parse_policy(text, str(path))
    else:
        checked_policy(text, str(path), config, worker_gpus(config))
    return text


def apply(state: ClusterState, text: str) -> AutoscaleView:
    """Apply a policy, and return the autoscaler's view when it has taken the policy.

    Raises:
        ConfigError: the cluster cannot run this policy. It goes on with the last one.
        UnavailableError: the store or the autoscaler does not answer.
    """
    digest = digest_of(text)
    _run(state, lambda store: store.apply_policy(text))

    def taken(view: AutoscaleView) -> bool:
        if view.refused_digest == digest:
            raise ConfigError(f"the cluster refuses the policy: {view.refused_why}")
        return view.policy_digest == digest

    return wait_for_view(state, taken)


def remove(state: ClusterState) -> AutoscaleView:
    """Remove the policy, and return the autoscaler's view when it goes on without.

    Raises:
        UnavailableError: the store or the autoscaler does not answer.
    """
    _run(state, lambda store: store.remove_policy())
    return wait_for_view(state, lambda view: not view.policy_digest)


def show(state: ClusterState) -> str:
    """Return the text of the policy that applies.

    Raises:
        ConfigError: the cluster has no policy.
    """
    text = _run(state, lambda store: store.read()).policy
    if not text:
        raise ConfigError(
            f"the cluster {state.name!r} has no policy; apply one with: baton policy apply FILE"
        )
    return text


def explained(state: ClusterState) -> AutoscaleView:
    """Return the autoscaler's latest view.

    Raises:
        UnavailableError: the store or the autoscaler does not answer.
    """
    view = read_view(state)
    if view is None:
        raise UnavailableError("the autoscaler does not answer; the numbers of workers stay")
    return view


def as_json(view: AutoscaleView) -> str:
    """Return the view as one JSON object."""
    return msgspec.json.format(msgspec.json.encode(view), indent=2).decode()


def as_text(view: AutoscaleView) -> str:
    """Explain the view: the numbers now, the decision and why, the workers, the last changes."""
    lines = [_headline(view)]
    for decision in view.pools:
        lines += _explained(decision)
    if view.advice:
        lines.append("The policy is advisory. It would decide:")
        for decision in view.advice:
            lines += _explained(decision)
    lines.append("Workers:")
    lines += [
        f"  {worker.id}: {worker.pool}, {worker.phase}, {worker.requests} requests"
        + (f"; {worker.problem}" if worker.problem else "")
        for worker in view.workers
    ]
    lines.append("Last changes:")
    lines += [f"  {_time_of(change.at_s)}  {change.line}" for change in view.changes] or ["  none"]
    return "\n".join(lines)


def _headline(view: AutoscaleView) -> str:
    name = f"Policy {view.policy}" if view.policy else "No policy: the numbers of workers are fixed"
    if view.demand_age_s is None:
        age = "no router has reported; the numbers of workers stay"
    else:
        age = f"the newest numbers are {view.demand_age_s:.1f} s old"
    refused = f"; a newer policy was refused: {view.refused_why}" if view.refused_digest else ""
    return f"{name}; {age}{refused}"


def _explained(decision: PoolDecision) -> list[str]:
    workers = "worker" if decision.current == 1 else "workers"
    head = f"{decision.pool}: {decision.current} {workers}, target {decision.target}"
    return [head, *(f"  {each.rule}: {each.workers} ({each.text})" for each in decision.reasons)]


def _time_of(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def wait_for_view(state: ClusterState, condition: Callable[[AutoscaleView], bool]) -> AutoscaleView:
    """Return the autoscaler's view once it meets ``condition``.

    Raises:
        UnavailableError: the store or the autoscaler does not answer, or the view does not meet the
            condition in time.
    """
    deadline_s = time.monotonic() + _APPLY_TIMEOUT_S
    while True:
        try:
            view = explained(state)
            if condition(view):
                return view
        except UnavailableError:
            if time.monotonic() > deadline_s:
                raise
        if time.monotonic() > deadline_s:
            raise UnavailableError(
                f"the autoscaler has not taken the change within {_APPLY_TIMEOUT_S:.0f} s"
            )
        time.sleep(_POLL_S)


def _run(state: ClusterState, call: Callable[[AutoscaleStore], Awaitable[T]]) -> T:
    if state.store is None:
        raise UnavailableError(f"the cluster {state.name!r} has no store yet")
    opened = state.store.autoscale()

    async def run() -> T:
        try:
            return await call(opened)
        finally:
            await opened.close()

    return asyncio.run(run())
