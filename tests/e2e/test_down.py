"""Nothing of a cluster with real engines is left after its launcher is killed.

The integration tests cover ``baton down``, Ctrl-C and SIGTERM with fake engines.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import RunningCluster
from tests.support.prompts import random_prompt
from tests.support.waiting import wait_until


def marked_processes(cluster_id: str) -> list[int]:
    """Return the pids of the processes whose environment names this cluster."""
    mark = f"BATON_CLUSTER_ID={cluster_id}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
        except OSError:
            continue  # the process has ended or belongs to another user
    return found


@pytest.mark.ends_cluster
def test_kill_9_of_the_launcher_leaves_nothing(cluster: RunningCluster) -> None:
    children = psutil.Process(cluster.launcher.pid).children(recursive=True)
    assert children
    marks = {child.environ().get("BATON_CLUSTER_ID") for child in children} - {None}
    assert len(marks) == 1, marks
    (cluster_id,) = marks
    assert cluster_id is not None
    assert len(marked_processes(cluster_id)) > 5
    ports = {
        connection.laddr.port
        for child in children
        for connection in child.net_connections("tcp")
        if connection.status == "LISTEN"
    }
    ours = set(os.listdir("/dev/shm")) - cluster.foreign_shared_memory
    assert ours

    with cluster.client() as client:
        stream = client.generate(token_ids=random_prompt(50, 95), max_tokens=1000, ignore_eos=True)
        next(iter(stream))
        cluster.launcher.kill()
        cluster.launcher.wait()
        wait_until(lambda: not marked_processes(cluster_id), what="no process is left", within_s=15)
        stream.close()
    wait_until(
        lambda: not cluster.run_dir.exists() or not any(cluster.run_dir.iterdir()),
        what="no temporary folder is left",
    )

    def still_listening() -> set[int]:
        listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
        return ports & listening

    wait_until(lambda: not still_listening(), what="no port of the cluster is open", within_s=15)
    assert not ours & set(os.listdir("/dev/shm"))
