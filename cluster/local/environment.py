"""The environment that every process of a cluster inherits."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.local.reaper import CLUSTER_ID_VARIABLE
from core.model.resolve import cache_dir
from core.net import is_loopback


def cluster_environment(
    cluster_id: str, host: str, scratch: Path, *, model_is_local: bool
) -> dict[str, str]:
    """Variables to set before anything is started.

    Args:
        scratch: the cluster's own folder, for files that would otherwise stay in /tmp.
        model_is_local: no process needs the hub.
    """
    variables = {
        CLUSTER_ID_VARIABLE: cluster_id,
        # Processes that change their title leave their environment readable for the reaper.
        "SPT_NOENV": "1",
        "TMPDIR": str(scratch / "tmp"),
        "VLLM_RPC_BASE_PATH": str(scratch / "tmp"),  # sockets between vLLM's processes
        "VLLM_NO_USAGE_STATS": "1",
        # TMPDIR would make PyTorch compile anew with each start.
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir() / "torchinductor"),
        # Below it, gRPC logs what strangers send (in their GOAWAY), as they send it.
        "GRPC_VERBOSITY": "ERROR",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # A late call of one of Serve's threads must not start another Ray after ours ended.
        "RAY_ENABLE_AUTO_CONNECT": "0",
        # Ray runs code for whoever reaches its ports; with a token, only our processes do.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # When the raylet dies, the launcher says so and ends its cluster. Without this, Ray ends it
        # without a word if its parent is process 1, which Ray takes for a sign of a dead raylet.
        "RAY_RAYLET_PID": str(os.getpid()),
        # Nobody collects Ray's own metrics; sampling them costs CPU time that engines need.
        "RAY_enable_metrics_collection": "0",
        "RAY_event_stats": "0",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        # A worker that fails its health check has nothing left to drain.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # Two event loops in one process share gRPC's one queue, and wake each other up with
        # every token.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Ray nices its workers so that its own daemons come first; here they carry the tokens.
        "RAY_worker_niceness": "0",
    }
    if is_loopback(host):
        # The name is about other systems; its effect is that Ray does not replace
        # 127.0.0.1 by an address that other machines reach.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if model_is_local:
        variables["HF_HUB_OFFLINE"] = "1"
    return variables


# Settings for another Ray cluster must not reach into ours.
_FOREIGN = ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_RUNTIME_ENV", "RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def applied(variables: Mapping[str, str]) -> Iterator[None]:
    """Put ``variables`` into this process's environment for a while; the end restores it as it
    was, without what Ray has added."""
    before = dict(os.environ)
    for name in _FOREIGN:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
