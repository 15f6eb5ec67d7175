"""Requests, commands and access rights of a cluster with fake engines."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import baton
from cluster.local import reaper
from engine.fake import next_tokens
from tests.support.fake_engine_cluster import (
    PROMPT,
    FakeEngineCluster,
    listening_sockets,
    run_baton,
    write_config,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


@pytest.mark.usefixtures("one_of_each")
def test_a_request_goes_through_both_pools(cluster: FakeEngineCluster) -> None:
    answer = cluster.complete(PROMPT, 20)
    assert answer.token_ids == next_tokens(PROMPT, 20)
    assert {answer.phases.prefill_worker, answer.phases.decode_worker} == {
        worker["id"] for worker in cluster.workers()
    }
    assert answer.phases.kv is not None
    assert answer.phases.kv.outcome is baton.KvOutcome.TRANSFERRED


@pytest.mark.usefixtures("one_of_each")
def test_workers_serve_no_stranger(cluster: FakeEngineCluster) -> None:
    for worker in cluster.workers():
        with grpc.insecure_channel(worker["address"]) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=10
                )
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.usefixtures("one_of_each")
def test_the_router_takes_no_memory_for_torch(cluster: FakeEngineCluster) -> None:
    """transformers would import it to render a chat template."""
    maps = Path(f"/proc/{cluster.replica('Router')}/maps").read_text()
    assert "tokenizers" in maps
    assert "libtorch" not in maps


def test_status_shows_each_worker(cluster: FakeEngineCluster) -> None:
    workers = cluster.workers()
    assert sorted(worker["pool"] for worker in workers) == ["decode", "prefill"]
    for worker in workers:
        assert worker["state"] == "ready"
        assert worker["kv_blocks_free"] == worker["kv_blocks_total"] > 0
        assert worker["queue_depth"] == 0
        assert worker["address"].startswith("127.0.0.1:")
    table = cluster.cli("status").stdout
    assert all(worker["id"] in table for worker in workers)


def test_generate_prints_json_and_text(cluster: FakeEngineCluster) -> None:
    lines = cluster.cli("generate", "w5 w6 w7", "--max-tokens", "4", "--json").stdout.splitlines()
    responses = [json.loads(line) for line in lines]
    ids = [token for response in responses for token in response["token_ids"]]
    assert ids == list(next_tokens(PROMPT, 4))
    assert [response["sequence"] for response in responses] == list(range(len(responses)))
    assert responses[-1]["finish_reason"] == "length"
    assert responses[-1]["usage"]["prompt_tokens"] == 3
    assert responses[-1]["phases"]["attempts"] == 1

    plain = cluster.cli("generate", "w5 w6 w7", "--max-tokens", "4")
    assert plain.stdout.split() == [f"w{token}" for token in next_tokens(PROMPT, 4)]
    assert "4 out" in plain.stderr


def test_everything_listens_on_loopback_only(cluster: FakeEngineCluster) -> None:
    pids = {cluster.launcher.pid} | reaper.find(cluster.state.cluster_id)
    sockets = listening_sockets(pids)
    assert len(sockets) > 10  # of Ray, at least three replicas, and Valkey
    for address, line in sockets.items():
        host = ipaddress.ip_address(address.rpartition(":")[0].strip("[]").replace("*", "0.0.0.0"))
        if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is not None:
            host = host.ipv4_mapped
        assert host.is_loopback, line


def test_all_processes_of_the_cluster_carry_its_id(cluster: FakeEngineCluster) -> None:
    """Only the launcher, the processes that carry the id, and descendants of these processes have
    files open in the cluster's folders."""
    state = cluster.state
    known = reaper.find(state.cluster_id) | {cluster.launcher.pid}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in known:
            continue
        try:
            files = [
                os.readlink(f"/proc/{entry}/fd/{fd}") for fd in os.listdir(f"/proc/{entry}/fd")
            ]
            command = Path(f"/proc/{entry}/cmdline").read_bytes()
        except OSError:
            continue
        # The reaper holds <run folder>.lock, whose path begins like the folder's.
        if b"cluster/local/reaper.py" in command:
            continue
        assert not any(file.startswith(state.folders) for file in files), command


def test_only_this_user_can_read_secrets(cluster: FakeEngineCluster) -> None:
    assert (cluster.run_dir / cluster.name).stat().st_mode & 0o077 == 0
    assert (cluster.run_dir / cluster.name / "state.json").stat().st_mode & 0o077 == 0


def test_a_second_cluster_with_the_same_name_is_refused(cluster: FakeEngineCluster) -> None:
    done = cluster.cli("up")
    assert done.returncode == 1
    assert done.stderr == (
        f"baton: the cluster 'shared' is running already (pid {cluster.launcher.pid}, "
        f"{cluster.state.address}); stop it with: baton down --name shared\n"
    )


def test_a_port_in_use_is_refused(cluster: FakeEngineCluster) -> None:
    port = cluster.state.address.rpartition(":")[2]
    done = cluster.cli("up", "--name", "other", "--port", port)
    assert done.returncode == 1
    assert done.stderr == (
        f"baton: router.port: port {port} on 127.0.0.1 is in use by another program; "
        "stop it, or choose another port\n"
    )
    assert not (cluster.run_dir / "other").exists()


def test_commands_that_talk_to_a_cluster_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "import cluster.cli.main, cluster.cli.generate, cluster.cli.status\n"
        "import cluster.cli.scale, cluster.cli.down\n"
        "print([m for m in ('ray', 'vllm', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip() == "[]"


def test_commands_without_a_cluster_fail_with_a_clear_message(tmp_path: Path, model: Path) -> None:
    file = write_config(tmp_path, model, "none")
    for command in (["status"], ["scale", "prefill=2"]):
        done = run_baton(*command, "--config", str(file))
        assert done.returncode == 1
        assert (
            done.stderr == "baton: no cluster named 'none' is running; start one with: baton up\n"
        )
    done = run_baton("generate", "hi", "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
