"""Clusters with fake engines start, end, and leave nothing behind.

The test marked ``ends_cluster`` ends the shared cluster. The test of Valkey starts only a Valkey
server. Each other test starts its own cluster.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import baton
from cluster.local import reaper
from cluster.local.run_dir import read_state
from cluster.local.valkey import EmbeddedValkey
from engine.fake import next_tokens
from tests.support.fake_engine_cluster import (
    GONE_S,
    PROMPT,
    START_S,
    FakeEngineCluster,
    check_nothing_is_left,
    start,
    wait_or_show_log,
    write_config,
)
from tests.support.live_cluster import RAYLET, processes_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


@pytest.mark.ends_cluster
def test_down_lets_running_requests_end_and_leaves_nothing(cluster: FakeEngineCluster) -> None:
    state = cluster.state
    cluster.pids |= reaper.find(state.cluster_id)
    with cluster.client() as client:
        stream = client.generate(token_ids=PROMPT, max_tokens=300, temperature=0.0)
        tokens = list(next(stream).token_ids)
        down = cluster.spawn("down")
        tokens += [token for response in stream for token in response.token_ids]
    assert tuple(tokens) == next_tokens(PROMPT, 300)
    output, _ = down.communicate(timeout=30)
    assert down.returncode == 0
    assert output.endswith("shared is down\n")
    assert cluster.launcher.wait(5) == 0
    assert "SIGTERM received" not in cluster.log.read_text()  # Ray's own handler prints this
    check_nothing_is_left(cluster, state)
    again = cluster.cli("down")
    assert (again.returncode, again.stderr) == (1, "baton: no cluster named 'shared' is running\n")


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C", "Ctrl-C twice"])
def test_nothing_is_left_however_the_launcher_ends(tmp_path: Path, model: Path, how: str) -> None:
    cluster = start(tmp_path, model, "victim", "--prefill", "2")
    try:
        cluster.wait(cluster.is_ready, START_S)
        assert len(cluster.ids("prefill")) == 2
        state = cluster.state
        cluster.pids = {cluster.launcher.pid} | reaper.find(state.cluster_id)
        with baton.Client(state.address, timeout_s=30, resume_timeout_s=0) as client:
            stream = client.generate(token_ids=PROMPT, max_tokens=8000)  # 24 s, longer than GONE_S
            next(stream)
            if how == "kill -9":
                cluster.launcher.kill()
                cluster.launcher.wait()
            else:
                cluster.launcher.send_signal(signal.SIGINT)
            if how == "Ctrl-C twice":
                cluster.wait(lambda: "draining" in cluster.log.read_text())
                cluster.launcher.send_signal(signal.SIGINT)
                assert cluster.launcher.wait(5) == 0, cluster.log.read_text()
            elif how == "Ctrl-C":  # the stream outlasts stop_grace_s
                assert cluster.launcher.wait(GONE_S) == 0, cluster.log.read_text()
                _, _, end = cluster.log.read_text().partition("draining")
                expected = r"[ .\d]+ s\nstopping the workers[ .\d]+ s\nstopped\n"
                assert re.fullmatch(expected, end), cluster.log.read_text()
            with pytest.raises(baton.BatonError):
                list(stream)
        check_nothing_is_left(cluster, state)
    finally:
        cluster.kill()


def test_a_launcher_that_init_adopted_says_why_it_ends(tmp_path: Path, model: Path) -> None:
    """The launcher's parent is process 1.

    If the launcher did not set RAY_RAYLET_PID, Ray would take process 1 for a dead raylet and end
    the launcher without a message.
    """
    file, log = write_config(tmp_path, model, "daemon"), tmp_path / "daemon.log"
    started = subprocess.run(
        [
            *("sh", "-c", '"$@" >"$0" 2>&1 & echo $!', str(log)),  # the shell does not wait
            *(sys.executable, "-m", "cluster.cli.main", "up", "--config", str(file)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    launcher = psutil.Process(int(started.stdout))
    try:
        wait_or_show_log(lambda: "ready: gRPC" in log.read_text(), START_S, log)
        state = read_state(tmp_path / "run", "daemon")
        assert state is not None
        (raylet,) = processes_of(state.cluster_id, RAYLET)
        os.kill(raylet.pid, signal.SIGKILL)
        wait_or_show_log(lambda: not reaper.find(state.cluster_id), GONE_S, log)
        reason = "baton: Ray ended unexpectedly; the cluster is taken down\n"
        wait_or_show_log(lambda: log.read_text().endswith(reason), GONE_S, log)
        wait_or_show_log(lambda: not Path(state.folders[0]).exists(), GONE_S, log)
    finally:
        with suppress(psutil.NoSuchProcess):
            launcher.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_nothing_is_left_when_the_start_is_interrupted(
    tmp_path: Path, model: Path, number: signal.Signals
) -> None:
    cluster = start(tmp_path, model, "early")
    try:
        cluster.wait(lambda: "starting the workers" in cluster.log.read_text(), START_S)
        state = cluster.state
        cluster.launcher.send_signal(number)
        status = cluster.launcher.wait(GONE_S)
        if number is not signal.SIGKILL:
            assert status == 0, cluster.log.read_text()
            assert cluster.log.read_text().endswith("\nstopped\n")
        check_nothing_is_left(cluster, state)
    finally:
        cluster.kill()


EMBEDDED = """
import asyncio, os, signal, sys
from pathlib import Path
from core.config.schema import load_config
from cluster.local.launch import Cluster
import baton

async def main():
    before = dict(os.environ)
    async with Cluster(load_config(Path(sys.argv[1])), print) as cluster:
        async with baton.AsyncClient(cluster.address) as client:
            answer = await client.complete(token_ids=[5, 6, 7], max_tokens=3)
        print(*answer.token_ids, flush=True)
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

asyncio.run(main())
print("end", flush=True)
"""


def test_a_program_can_run_a_cluster_of_its_own(tmp_path: Path, model: Path) -> None:
    file = write_config(tmp_path, model, "inside")
    command = [sys.executable, "-c", EMBEDDED, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        lines = [line.rstrip() for line in program.stdout]
        ended_s = time.monotonic()
        assert program.wait(GONE_S) == 0
        assert time.monotonic() - ended_s < 5  # no thread of Ray delays the exit
    assert " ".join(map(str, next_tokens(PROMPT, 3))) in lines
    assert lines[-1] == "end"
    assert not (tmp_path / "run").exists()


def test_valkey_runs_in_a_folder_with_a_space(tmp_path: Path) -> None:
    folder = tmp_path / 'my "run" folder'
    folder.mkdir()
    server = EmbeddedValkey("127.0.0.1", folder, journal_bytes=2**20)
    try:
        server.start()
        assert (folder / "valkey.log").exists()
    finally:
        server.stop()


def test_a_cluster_that_cannot_start_says_why_in_one_sentence(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    cluster = start(tmp_path, broken, "broken")
    try:
        cluster.wait(lambda: cluster.launcher.poll() is not None, START_S + GONE_S)
    finally:
        cluster.kill()
    assert cluster.launcher.returncode == 1
    output = cluster.log.read_text()
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("baton: ")]
    assert len(errors) == 1
    assert "model.path: no tokeniser can be loaded" in errors[0]
    assert not cluster.run_dir.exists()
