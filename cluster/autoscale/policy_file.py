"""A policy as the cluster handles it: its text, a digest of it, and the numbers at the start."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from autoscale.load import check_against, parse_policy, read_policy_text
from autoscale.policy import Policy
from core.config.schema import Config
from core.errors import ConfigError
from core.types import Pool


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A policy that suits the cluster."""

    policy: Policy
    text: str

    @property
    def name(self) -> str:
        return self.policy.metadata.name

    @property
    def is_advisory(self) -> bool:
        """Whether its decisions are logged and not carried out."""
        return self.policy.spec.mode == "Advisory"

    @property
    def digest(self) -> str:
        return digest_of(self.text)


def digest_of(text: str) -> str:
    """Return a short digest, by which the parts of a cluster agree on a policy."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checked_policy(text: str, name: str, config: Config, gpus: Mapping[Pool, float]) -> PolicyFile:
    """Return the policy in ``text``.

    Args:
        name: what to call the text in errors, such as the file's name.
        gpus: what a worker of each pool holds, see ``worker_gpus``.

    Raises:
        ConfigError: the policy is wrong, or does not suit the cluster.
    """
    policy = parse_policy(text, name)
    check_against(policy, gpus, can_change_role=config.cluster.role_change)
    for pool in Pool:
        most, limit = policy.spec.pool(pool).max_replicas, config.pool(pool).max_replicas
        if most > limit:
            raise ConfigError(
                f"{name}: spec.{pool}.maxReplicas: {most} is more than {limit}, the cluster's "
                f"{pool}.max_replicas"
            )
    return PolicyFile(policy, text)


def read_policy(config: Config, gpus: Mapping[Pool, float]) -> PolicyFile | None:
    """Return the policy that the cluster starts with, if ``cluster.policy`` names one.

    Raises:
        ConfigError: the file cannot be read, or see ``checked_policy``.
    """
    path = config.cluster.policy
    if path is None:
        return None
    try:
        text = read_policy_text(path.expanduser())
    except ConfigError as error:
        raise ConfigError(f"cluster.policy: {error}") from None
    return checked_policy(text, str(path), config, gpus)


def first_workers(
    config: Config, policy: PolicyFile | None, gpus: Mapping[Pool, float]
) -> dict[Pool, int]:
    """Return how many workers of each pool a cluster starts with.

    These are the configured ``replicas``, within the bounds of an active policy. If they exceed
    its budget, they are the policy's minimums.
    """
    wanted = {pool: config.pool(pool).replicas for pool in Pool}
    if policy is None or policy.is_advisory:
        return wanted
    spec = policy.policy.spec
    for pool, workers in wanted.items():
        own = spec.pool(pool)
        wanted[pool] = min(max(workers, own.min_replicas), own.max_replicas)
    held = sum(workers * gpus[pool] for pool, workers in wanted.items())
    if spec.budget is not None and not spec.budget.has_room_for(held):
        return {pool: spec.pool(pool).min_replicas for pool in Pool}
    return wanted


@lru_cache(maxsize=1)  # it is asked for once a second
def fixed_policy(prefill: int, decode: int) -> Policy:
    """Return a policy that keeps exactly these numbers of workers."""
    workers = {Pool.PREFILL: prefill, Pool.DECODE: decode}
    pools = {
        pool.value: {
            "minReplicas": count,
            "maxReplicas": max(count, 1),
            "signals": [{"type": "QueueRequests", "target": 1.0}],
            "behavior": {
                "scaleUp": {"policies": [{"type": "Pods", "value": 1000, "periodSeconds": 1}]},
                "scaleDown": {"stabilizationWindowSeconds": 0},
            },
        }
        for pool, count in workers.items()
    }
    return Policy.model_validate(
        {
            "apiVersion": "baton/v1",
            "kind": "AutoscalingPolicy",
            "metadata": {"name": "fixed"},
            "spec": pools,
        }
    )


def worker_gpus(config: Config) -> dict[Pool, float]:
    """Return the GPUs that one worker of each pool holds. Without GPUs, each rank counts as one."""
    pools = {pool: config.pool(pool) for pool in Pool}
    return {
        pool: own.num_gpus_per_replica or float(own.tensor_parallel_size)
        for pool, own in pools.items()
    }
