"""Sets the environment variables that every process of a cluster inherits."""

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
    """Return the variables to set before any process of the cluster is started.

    Args:
        host: address of this machine (``cluster.host``).
        scratch: the cluster's own folder for temporary files. It is removed with the cluster.
        model_is_local: whether the model is on disk, so that no process needs the hub.
    """
    variables = {
        CLUSTER_ID_VARIABLE: cluster_id,
        # A process that changes its title must not overwrite its environment: the reaper reads it.
        "SPT_NOENV": "1",
        "TMPDIR": str(scratch / "tmp"),
        "VLLM_RPC_BASE_PATH": str(scratch / "tmp"),  # sockets between vLLM's processes
        "VLLM_NO_USAGE_STATS": "1",
        # PyTorch's default folder is in TMPDIR, which is removed when the cluster ends. With it,
        # every start would compile again.
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir() / "torchinductor"),
        # At more verbose levels, gRPC logs the text of a GOAWAY frame unescaped. Any peer can send
        # such a frame.
        "GRPC_VERBOSITY": "ERROR",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # A late call from one of Serve's threads must not start a new Ray after this Ray ended.
        "RAY_ENABLE_AUTO_CONNECT": "0",
        # Without a token, Ray runs code for anyone who can reach its ports. Only processes of this
        # cluster have the token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Without this, Ray assumes that the launcher's parent is the raylet. If the parent is
        # process 1, Ray assumes that the raylet died, and ends the launcher without a message. The
        # launcher itself watches the raylet.
        "RAY_RAYLET_PID": str(os.getpid()),
        # Baton does not use Ray's own metrics. Sampling them costs CPU time that engines need.
        "RAY_enable_metrics_collection": "0",
        "RAY_event_stats": "0",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        # How soon Serve says that Ray has found no node for a worker.
        "RAY_SERVE_SLOW_STARTUP_WARNING_S": "5",
        "RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S": "5",
        # A worker that fails its health check has nothing left to drain.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # With user code in a separate thread, a process has two event loops. They share the one
        # completion queue of grpc.aio and would wake each other up with every token.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # By default, Ray gives workers a lower priority than its daemons. Baton's workers serve
        # requests, so they get the same priority.
        "RAY_worker_niceness": "0",
    }
    if is_loopback(host):
        # Despite its name, this variable keeps Ray from replacing 127.0.0.1 by an address that
        # other machines can reach.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if model_is_local:
        variables["HF_HUB_OFFLINE"] = "1"
    return variables


# Settings for another Ray cluster must not affect this one.
_FOREIGN = ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_RUNTIME_ENV", "RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def applied(variables: Mapping[str, str]) -> Iterator[None]:
    """Set ``variables`` in this process's environment during the ``with`` block.

    At the end, the environment is exactly as before. Variables that Ray added are removed.
    """
    before = dict(os.environ)
    for name in _FOREIGN:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
