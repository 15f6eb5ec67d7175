"""Applies policies to a live cluster, and reads what its autoscaler did."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tests.support.waiting import wait_until


class Cluster(Protocol):
    """A ``FakeEngineCluster`` or a ``LiveCluster``."""

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]: ...


def small_policy(
    name: str,
    signals: Mapping[str, Mapping[str, Any]],
    behavior: Mapping[str, Any],
    *,
    least: int = 1,
    **spec: Any,
) -> dict[str, Any]:
    """Return a policy with ``least`` to two workers in each pool.

    Args:
        signals: one for each pool.
        spec: fields that are added to the policy's, or replace them.
    """
    pools = {
        pool: {
            "minReplicas": least,
            "maxReplicas": 2,
            "averagingSeconds": 1,
            "behavior": behavior,
            "signals": [signal],
        }
        for pool, signal in signals.items()
    }
    return {
        "apiVersion": "baton/v1",
        "kind": "AutoscalingPolicy",
        "metadata": {"name": name},
        "spec": {"warmupSeconds": 0, **pools, **spec},
    }


def apply(cluster: Cluster, folder: Path, document: Mapping[str, Any]) -> None:
    """Apply a policy. ``folder`` gets its file."""
    file = folder / "policy.yaml"
    file.write_text(json.dumps(document))
    done = cluster.cli("policy", "apply", str(file))
    assert done.returncode == 0, done.stderr


def explain(cluster: Cluster) -> dict[str, Any]:
    """Return the autoscaler's view. Wait for it: engines that load may take all cores."""

    def answer() -> dict[str, Any] | None:
        done = cluster.cli("policy", "explain", "--json")
        assert done.returncode == 0 or "the autoscaler does not answer" in done.stderr, done.stderr
        return json.loads(done.stdout) if done.returncode == 0 else None

    view = wait_until(answer, what="the autoscaler answers", within_s=60)
    assert view is not None
    return view


def wait_until_calm(cluster: Cluster) -> int:
    """Wait until the pools have the workers that they should have.

    Return the number of the latest change. The view has it, because the autoscaler writes a change
    together with the decision that it follows from.
    """

    def calm() -> dict[str, Any] | None:
        view = explain(cluster)
        is_calm = all(each["current"] == each["target"] for each in view["pools"])
        return view if is_calm else None

    view = wait_until(calm, what="no pool has to change", within_s=60)
    assert view is not None
    return max((change["number"] for change in view["changes"]), default=0)


def check_changes(cluster: Cluster, after: int, pool: str) -> None:
    """Check that a worker has come to or left ``pool`` after change number ``after``, and that no
    other pool has changed."""
    changes = explain(cluster)["changes"]
    assert changes[0]["number"] <= after + 1, "the view has forgotten some"
    new = [change for change in changes if change["number"] > after]
    # Changes without a pool are about the policy.
    assert {change["pool"] for change in new} - {None} == {pool}, new
