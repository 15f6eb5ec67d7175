"""A whole cluster with fake engines: everything but the model is real.

One cluster serves most tests, in the order of the file; the last ones start their own.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError
from ray.serve.exceptions import RayServeException
from tokenizers import Tokenizer, models, pre_tokenizers

import baton
from cluster.local import reaper
from cluster.local.run_dir import ClusterState, read_state
from cluster.local.valkey import EmbeddedValkey
from cluster.ray import head as ray_runtime
from core.config.schema import Config
from core.errors import UnavailableError
from core.types import Pool
from engine.fake import next_tokens
from tests.support import waiting
from tests.support.live_cluster import RAYLET, parts_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

START_S = 60.0  # Ray, Serve and the router's tokeniser take about 10 s
GONE_S = 15.0  # what the issue of a cluster that ends allows
PROMPT = [5, 6, 7]

CONFIG = """\
cluster: {{name: {name}, run_dir: {run_dir}, start_timeout_s: {start_s}, stop_grace_s: 8}}
model: {{path: {model}}}
router: {{port: {port}}}
prefill: {{engine_kind: fake}}
decode: {{engine_kind: fake}}
"""


@dataclass
class Running:
    """``baton up`` in a process of its own."""

    file: Path
    base: Path
    name: str
    process: subprocess.Popen[str]
    log: Path
    pids: set[int] = field(default_factory=set)

    @property
    def state(self) -> ClusterState:
        state = read_state(self.base, self.name)
        assert state is not None, self.log.read_text()
        return state

    def client(self) -> baton.Client:
        return baton.Client(self.state.address, timeout_s=30)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return cli(*arguments, "--config", str(self.file))

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cluster.cli.main", *arguments, "--config", str(self.file)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def workers(self) -> list[dict[str, Any]]:
        done = self.cli("status", "--json")
        assert done.returncode == 0, done.stderr
        workers: list[dict[str, Any]] = json.loads(done.stdout)["workers"]
        return workers

    def ids(self, pool: str) -> set[str]:
        return {worker["id"] for worker in self.workers() if worker["pool"] == pool}

    def replicas(self) -> dict[int, str]:
        """Processes of Ray Serve's replicas: pid to deployment."""
        found = {}
        for pid in reaper.find(self.state.cluster_id):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode()
            if title.startswith("ray::ServeReplica:"):
                found[pid] = title.rpartition(":")[2]
        return found

    def wait(self, condition: Callable[[], bool], timeout_s: float = 30) -> None:
        wait_until(condition, timeout_s, self.log)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_until(condition: Callable[[], bool], timeout_s: float, log: Path) -> None:
    try:
        waiting.wait_until(condition, what="the cluster gets there", within_s=timeout_s)
    except AssertionError as error:
        raise AssertionError(log.read_text()) from error


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the router needs of a model: a context length, and a word for each token id."""
    folder = tmp_path_factory.mktemp("words")
    words = {"<unk>": 0} | {f"w{number}": number for number in range(1, 1024)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "llama", "vocab_size": 1024, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_config(folder: Path, model: Path, name: str, *, start_s: float = START_S) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(
        CONFIG.format(name=name, run_dir=folder / "run", model=model, port=0, start_s=start_s)
    )
    return file


def start(folder: Path, model: Path, name: str, *arguments: str) -> Running:
    file = write_config(folder, model, name)
    log = folder / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli.main", "up", "--config", str(file), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return Running(file, folder / "run", name, process, log)


def is_ready(cluster: Running) -> bool:
    assert cluster.process.poll() is None, cluster.log.read_text()
    return "ready: gRPC" in cluster.log.read_text()


def assert_nothing_is_left(cluster: Running, state: ClusterState) -> None:
    """No process, folder, port or shared memory of ``state``, within 15 s."""

    def gone() -> bool:
        folders = [cluster.base, *map(Path, state.folders)]
        return not reaper.find(state.cluster_id) and not any(f.exists() for f in folders)

    wait_until(gone, GONE_S, cluster.log)
    host, _, port = state.address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))
    assert not (listening_sockets(cluster.pids))


def listening_sockets(pids: set[int]) -> dict[str, str]:
    """Addresses on which any of ``pids`` listens, with what the kernel says about them."""
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in lines.splitlines():
        if {int(pid) for pid in re.findall(r"pid=(\d+)", line)} & pids:
            found[line.split()[3]] = line
    return found


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    cluster = start(tmp_path_factory.mktemp("cluster"), model, "shared")
    try:
        cluster.wait(lambda: is_ready(cluster), START_S)
        cluster.pids = {cluster.process.pid} | reaper.find(cluster.state.cluster_id)
        yield cluster
    finally:
        cluster.process.kill()
        cluster.process.wait()


def complete(cluster: Running, prompt: list[int], max_tokens: int) -> baton.Completion:
    with cluster.client() as client:
        return client.complete(token_ids=prompt, max_tokens=max_tokens, temperature=0.0)


def test_a_request_goes_through_both_pools(cluster: Running) -> None:
    answer = complete(cluster, PROMPT, 20)
    assert answer.token_ids == next_tokens(PROMPT, 20)
    assert {answer.phases.prefill_worker, answer.phases.decode_worker} == {
        worker["id"] for worker in cluster.workers()
    }
    assert answer.phases.kv is not None
    assert answer.phases.kv.outcome is baton.KvOutcome.TRANSFERRED


def test_status_shows_each_worker(cluster: Running) -> None:
    workers = cluster.workers()
    assert sorted(worker["pool"] for worker in workers) == ["decode", "prefill"]
    for worker in workers:
        assert worker["state"] == "ready"
        assert worker["kv_blocks_free"] == worker["kv_blocks_total"] > 0
        assert worker["queue_depth"] == 0
        assert worker["address"].startswith("127.0.0.1:")
    table = cluster.cli("status").stdout
    assert all(worker["id"] in table for worker in workers)


def test_generate_prints_json_and_text(cluster: Running) -> None:
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


def test_everything_listens_on_loopback_only(cluster: Running) -> None:
    pids = {cluster.process.pid} | reaper.find(cluster.state.cluster_id)
    sockets = listening_sockets(pids)
    assert len(sockets) > 10  # Ray's own, three replicas' and Valkey's
    for address, line in sockets.items():
        host = ipaddress.ip_address(address.rpartition(":")[0].strip("[]").replace("*", "0.0.0.0"))
        if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is not None:
            host = host.ipv4_mapped
        assert host.is_loopback, line


def test_all_processes_of_the_cluster_carry_its_id(cluster: Running) -> None:
    """Found by their folder instead: each has a log file or a socket of the cluster open."""
    state = cluster.state
    known = reaper.find(state.cluster_id) | {cluster.process.pid}
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
        if b"cluster/local/reaper.py" in command:
            continue
        assert not any(file.startswith(state.folders) for file in files), command


def test_secrets_are_for_this_user_only(cluster: Running) -> None:
    assert (cluster.base / cluster.name).stat().st_mode & 0o077 == 0
    assert (cluster.base / cluster.name / "state.json").stat().st_mode & 0o077 == 0


def test_a_second_cluster_of_the_name_is_refused(cluster: Running) -> None:
    done = cluster.cli("up")
    assert done.returncode == 1
    assert done.stderr == (
        f"baton: the cluster 'shared' is running already (pid {cluster.process.pid}, "
        f"{cluster.state.address}); stop it with: baton down --name shared\n"
    )


def test_a_port_in_use_is_refused(cluster: Running) -> None:
    port = cluster.state.address.rpartition(":")[2]
    done = cluster.cli("up", "--name", "other", "--port", port)
    assert done.returncode == 1
    assert done.stderr == (
        f"baton: router.port: port {port} on 127.0.0.1 is in use by another program; "
        "stop it, or choose another port\n"
    )
    assert not (cluster.base / "other").exists()


def test_scale_up_keeps_the_workers_that_are_there(cluster: Running) -> None:
    ids, replicas = {w["id"] for w in cluster.workers()}, cluster.replicas()
    done = cluster.cli("scale", "prefill=2", "decode=2")
    assert done.returncode == 0, done.stderr
    assert {pool: len(cluster.ids(pool)) for pool in ("prefill", "decode")} == {
        "prefill": 2,
        "decode": 2,
    }
    assert ids < {worker["id"] for worker in cluster.workers()}
    assert replicas.items() < cluster.replicas().items()

    served: set[tuple[str, str]] = set()

    def all_pairs_served() -> bool:
        answer = complete(cluster, PROMPT, 3)
        served.add((answer.phases.prefill_worker, answer.phases.decode_worker))
        return len(served) == 4

    cluster.wait(all_pairs_served)


@pytest.mark.parametrize("target", ["prefill=0", "decode=9"])
def test_scale_refuses_numbers_out_of_bounds(cluster: Running, target: str) -> None:
    done = cluster.cli("scale", target)
    assert done.returncode == 1
    assert "is not between 1 and 8" in done.stderr


def test_a_killed_worker_is_replaced(cluster: Running) -> None:
    before = cluster.ids("decode")
    victim = next(pid for pid, name in cluster.replicas().items() if name == "DecodeWorker")
    os.kill(victim, signal.SIGKILL)

    def replaced() -> bool:
        now = cluster.ids("decode")
        return len(now & before) == 1 and len(now - before) == 1

    cluster.wait(replaced)
    assert complete(cluster, PROMPT, 5).token_ids == next_tokens(PROMPT, 5)


def test_a_stream_goes_on_when_its_router_is_killed(cluster: Running) -> None:
    victim = next(pid for pid, name in cluster.replicas().items() if name == "Router")
    with cluster.client() as client:
        stream = client.generate(token_ids=PROMPT, max_tokens=1500, temperature=0.0, timeout_s=60)
        responses = [next(stream) for _ in range(20)]
        os.kill(victim, signal.SIGKILL)
        responses += stream
    tokens = [token for response in responses for token in response.token_ids]
    assert tuple(tokens) == next_tokens(PROMPT, 1500)
    assert [response.sequence for response in responses] == list(range(len(responses)))


def test_a_killed_router_comes_back_to_its_port(cluster: Running) -> None:
    victim = next(pid for pid, name in cluster.replicas().items() if name == "Router")
    os.kill(victim, signal.SIGKILL)

    def serves() -> bool:
        try:
            return complete(cluster, PROMPT, 5).token_ids == next_tokens(PROMPT, 5)
        except baton.UnavailableError:
            return False

    cluster.wait(serves)


def test_drain_moves_streams_to_another_worker_and_replaces_this_one(cluster: Running) -> None:
    before = cluster.ids("decode")
    with cluster.client() as client:
        streams = [
            client.generate(token_ids=[*PROMPT, seed], max_tokens=2000, temperature=0.0)
            for seed in range(4)
        ]
        for stream in streams:
            next(stream)
        (leaving, *_) = sorted(before)
        done = cluster.cli("drain", leaving)  # its grace is shorter than the streams
        assert done.returncode == 0, done.stderr
        assert f"{leaving} has left" in done.stdout
        moved = 0
        for seed, stream in enumerate(streams):
            responses = list(stream)
            tokens = [token for response in responses for token in response.token_ids]
            assert tuple(tokens) == next_tokens([*PROMPT, seed], 2000)[1:]
            assert responses[-1].phases is not None
            moved += responses[-1].phases.attempts == 2
        assert moved == 2, "of four streams on two workers"
    cluster.wait(lambda: len(cluster.ids("decode")) == 2 and leaving not in cluster.ids("decode"))


def test_drain_names_the_workers_there_are(cluster: Running) -> None:
    done = cluster.cli("drain", "decode-0")
    assert done.returncode == 1
    assert all(worker["id"] in done.stderr for worker in cluster.workers())


def test_scale_down_drains_the_worker_that_leaves(cluster: Running) -> None:
    with cluster.client() as client:
        streams = [
            client.generate(token_ids=[*PROMPT, seed], max_tokens=600, temperature=0.0)
            for seed in range(8)
        ]
        for stream in streams:
            next(stream)
        order = cluster.spawn("scale", "decode=1", "prefill=1")
        for seed, stream in enumerate(streams):
            tokens = [token for response in stream for token in response.token_ids]
            assert tuple(tokens) == next_tokens([*PROMPT, seed], 600)[-len(tokens) :]
    order.communicate(timeout=60)
    assert order.returncode == 0
    assert len(cluster.workers()) == 2


def test_valkey_comes_back_and_requests_never_notice(cluster: Running) -> None:
    valkey = next(
        pid
        for pid in reaper.find(cluster.state.cluster_id)
        if b"valkey-server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    with cluster.client() as client:
        stream = client.generate(token_ids=PROMPT, max_tokens=400, temperature=0.0)
        next(stream)
        os.kill(valkey, signal.SIGKILL)
        for _ in stream:
            pass
        assert complete(cluster, PROMPT, 5).token_ids == next_tokens(PROMPT, 5)
    cluster.wait(lambda: len(cluster.workers()) == 2)


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


def test_down_lets_running_requests_end_and_leaves_nothing(cluster: Running) -> None:
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
    assert cluster.process.wait(5) == 0
    assert "SIGTERM received" not in cluster.log.read_text()  # as Ray's own handler prints
    assert_nothing_is_left(cluster, state)
    again = cluster.cli("down")
    assert (again.returncode, again.stderr) == (1, "baton: no cluster named 'shared' is running\n")


def test_no_cluster_is_a_clear_error(tmp_path: Path, model: Path) -> None:
    file = write_config(tmp_path, model, "none")
    for command in (["status"], ["scale", "prefill=2"]):
        done = cli(*command, "--config", str(file))
        assert done.returncode == 1
        assert (
            done.stderr == "baton: no cluster named 'none' is running; start one with: baton up\n"
        )
    done = cli("generate", "hi", "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C", "Ctrl-C twice"])
def test_nothing_is_left_however_the_launcher_ends(tmp_path: Path, model: Path, how: str) -> None:
    cluster = start(tmp_path, model, "victim", "--prefill", "2")
    try:
        cluster.wait(lambda: is_ready(cluster), START_S)
        assert len(cluster.ids("prefill")) == 2
        state = cluster.state
        cluster.pids = {cluster.process.pid} | reaper.find(state.cluster_id)
        with baton.Client(state.address, timeout_s=30, resume_timeout_s=0) as client:
            stream = client.generate(token_ids=PROMPT, max_tokens=8000)  # longer than any wait
            next(stream)
            if how == "kill -9":
                cluster.process.kill()
                cluster.process.wait()
            else:
                cluster.process.send_signal(signal.SIGINT)
            if how == "Ctrl-C twice":
                cluster.wait(lambda: "draining" in cluster.log.read_text())
                cluster.process.send_signal(signal.SIGINT)
                assert cluster.process.wait(5) == 0, cluster.log.read_text()
            elif how == "Ctrl-C":  # and the stream is still there when the grace is over
                assert cluster.process.wait(GONE_S) == 0, cluster.log.read_text()
                _, _, end = cluster.log.read_text().partition("draining")
                said = r"[ .\d]+ s\nstopping the workers[ .\d]+ s\nstopped\n"
                assert re.fullmatch(said, end), cluster.log.read_text()
            with pytest.raises(baton.BatonError):
                list(stream)
        assert_nothing_is_left(cluster, state)
    finally:
        cluster.process.kill()
        cluster.process.wait()


def test_a_launcher_that_init_started_says_why_it_ends(tmp_path: Path, model: Path) -> None:
    """Ray looks at the parent's death, too, and would end it without a word."""
    file, log = write_config(tmp_path, model, "daemon"), tmp_path / "daemon.log"
    started = subprocess.run(
        [
            *("sh", "-c", '"$@" >"$0" 2>&1 & echo $!', str(log)),  # whose parent is gone at once
            *(sys.executable, "-m", "cluster.cli.main", "up", "--config", str(file)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    launcher = psutil.Process(int(started.stdout))
    try:
        wait_until(lambda: "ready: gRPC" in log.read_text(), START_S, log)
        state = read_state(tmp_path / "run", "daemon")
        assert state is not None
        (raylet,) = parts_of(state.cluster_id, RAYLET)
        os.kill(raylet.pid, signal.SIGKILL)
        wait_until(lambda: not reaper.find(state.cluster_id), GONE_S, log)
        said = "baton: Ray ended unexpectedly; the cluster is taken down\n"
        wait_until(lambda: log.read_text().endswith(said), GONE_S, log)
        wait_until(lambda: not Path(state.folders[0]).exists(), GONE_S, log)
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
        cluster.process.send_signal(number)
        status = cluster.process.wait(GONE_S)
        if number is not signal.SIGKILL:
            assert status == 0, cluster.log.read_text()
            assert cluster.log.read_text().endswith("\nstopped\n")
        assert_nothing_is_left(cluster, state)
    finally:
        cluster.process.kill()
        cluster.process.wait()


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
        assert time.monotonic() - ended_s < 5  # no thread of Ray's holds it up
    assert " ".join(map(str, next_tokens(PROMPT, 3))) in lines
    assert lines[-1] == "end"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("ray.get", GetTimeoutError("late")),
        ("ray.get", ActorDiedError()),
        ("cluster.ray.head._get_global_client", RayServeException("no controller")),
    ],
)
def test_serve_that_does_not_answer_a_scale_order_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    monkeypatch.setattr(ray_runtime, "_get_global_client", MagicMock())
    monkeypatch.setattr(call, MagicMock(side_effect=error))
    with pytest.raises(UnavailableError, match="Ray Serve does not answer"):
        ray_runtime.RayRuntime(Config(), tmp_path).scale(Pool.DECODE, 2)


def test_valkey_runs_in_a_folder_with_a_space(tmp_path: Path) -> None:
    folder = tmp_path / 'my "run" folder'
    folder.mkdir()
    server = EmbeddedValkey("127.0.0.1", folder)
    try:
        server.start()
        assert (folder / "valkey.log").exists()
    finally:
        server.stop()


def test_a_part_that_cannot_start_is_one_clear_sentence(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    cluster = start(tmp_path, broken, "broken")
    assert cluster.process.wait(START_S) == 1
    output = cluster.log.read_text()
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("baton: ")]
    assert len(errors) == 1
    assert "model.path: no tokeniser can be loaded" in errors[0]
    assert not cluster.base.exists()
