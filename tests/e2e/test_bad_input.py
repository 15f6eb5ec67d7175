"""Wrong input gets a clear error and does not disturb other requests."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import baton
from cluster.local.ports import free_port
from tests.e2e.conftest import BYSTANDER, HOST, MAX_TOKENS, RunningCluster, run_baton
from tests.support.prompts import random_prompt

# Name, fields of the request, error, words of its message.
BAD_REQUESTS: list[tuple[str, dict[str, Any], type[baton.BatonError], str]] = [
    ("unknown model", {"prompt": "x", "model": "gpt-17"}, baton.NotFoundError, "gpt-17"),
    ("empty prompt", {"prompt": ""}, baton.InvalidArgumentError, "prompt"),
    ("no token ids", {"token_ids": []}, baton.InvalidArgumentError, "token_ids"),
    ("longer than the context", {"token_ids": [5] * 2048}, baton.InvalidArgumentError, "2048"),
    ("id out of range", {"token_ids": [5, 49_152]}, baton.InvalidArgumentError, "49152"),
    ("negative", {"prompt": "x", "temperature": -1}, baton.InvalidArgumentError, "temperature"),
    ("NaN", {"prompt": "x", "top_p": math.nan}, baton.InvalidArgumentError, "top_p"),
    ("NaN", {"prompt": "x", "temperature": math.nan}, baton.InvalidArgumentError, "temperature"),
    ("no tokens", {"prompt": "x", "max_tokens": 0}, baton.InvalidArgumentError, "max_tokens"),
    ("bad id", {"prompt": "x", "request_id": "a b"}, baton.InvalidArgumentError, "request_id"),
    ("too large", {"prompt": "x" * 5_000_000}, baton.InvalidArgumentError, "max_message_bytes"),
]


@pytest.fixture
def bystander(cluster: RunningCluster, reference: dict[str, list[int]]) -> Iterator[None]:
    """Run a good request at the same time as a bad one, and check the tokens of the good one."""
    answers: list[baton.Completion] = []

    def run() -> None:
        with cluster.client() as client:
            answers.append(
                client.complete(
                    token_ids=BYSTANDER.prompt,
                    temperature=0,
                    max_tokens=MAX_TOKENS,
                    ignore_eos=True,
                )
            )

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(60)
    assert [list(answer.token_ids) for answer in answers] == [reference[BYSTANDER.name]]


@pytest.mark.parametrize(
    ("name", "fields", "error", "words"), BAD_REQUESTS, ids=[row[0] for row in BAD_REQUESTS]
)
def test_a_bad_request_is_refused_with_a_clear_message(
    cluster: RunningCluster,
    bystander: None,
    name: str,
    fields: dict[str, Any],
    error: type[baton.BatonError],
    words: str,
) -> None:
    with cluster.client() as client, pytest.raises(error) as caught:
        client.complete(**fields)
    assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_message_over_the_routers_limit(cluster: RunningCluster, bystander: None) -> None:
    """The server refuses a message that the client's own limit lets through."""
    with (
        baton.Client(cluster.address, max_message_bytes=100_000_000) as client,
        pytest.raises(baton.InvalidArgumentError, match="larger than max"),
    ):
        client.complete("x" * 5_000_000)


def test_a_request_id_in_flight_is_refused(cluster: RunningCluster) -> None:
    with cluster.client() as client:
        stream = client.generate(
            token_ids=random_prompt(50, 90), max_tokens=500, ignore_eos=True, request_id="twin"
        )
        next(iter(stream))
        with pytest.raises(baton.AlreadyExistsError, match="twin"):
            client.complete("x", request_id="twin", max_tokens=2)
        assert next(iter(stream)).token_ids, "the first request has stopped"
        stream.close()

    def is_taken() -> bool:
        with cluster.client() as client:
            try:
                client.complete("x", request_id="twin", max_tokens=2)
            except baton.AlreadyExistsError:
                return True
        return False

    cluster.wait(lambda: not is_taken(), "the id of the ended request is free")


def test_unknown_field_in_the_configuration(cluster: RunningCluster, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("router: {prot: 1234}\n")
    done = run_baton("up", "--config", str(file))
    assert done.returncode == 1
    assert "prot" in done.stderr
    assert "port" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_engine_argument(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("decode: {engine: {max_num_seq: 4}}\n")
    done = run_baton("up", "--config", str(file))
    assert done.returncode == 1
    assert "max_num_seqs" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_path_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"cluster: {{name: other, run_dir: {tmp_path}/r}}\nrouter: {{port: {free_port(HOST)}}}\n"
    )
    done = run_baton("up", "--config", str(file), "--model", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use(cluster: RunningCluster, tmp_path: Path) -> None:
    port = cluster.address.rsplit(":", 1)[1]
    file = tmp_path / "c.yaml"
    file.write_text(f"cluster: {{name: other, run_dir: {tmp_path}/r}}\nrouter: {{port: {port}}}\n")
    done = run_baton("up", "--config", str(file))
    assert done.returncode == 1
    assert port in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_cluster_twice(cluster: RunningCluster) -> None:
    done = run_baton("up", "--config", str(cluster.config_file))
    assert done.returncode == 1
    assert "running" in done.stderr or "in use" in done.stderr
    assert "Traceback" not in done.stderr
