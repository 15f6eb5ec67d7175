"""The demo's output and its final check, without a cluster."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from baton import AsyncClient, CapacityError, Completion
from baton.v1 import inference_pb2 as pb
from cluster.cli.demo import REQUESTS, Conversation, check_all_gone, print_answers
from cluster.cli.demo_text import LONG_PROMPT
from cluster.cli.progress import Progress
from cluster.local.ports import free_port
from cluster.local.reaper import CLUSTER_ID_VARIABLE
from cluster.local.run_dir import ClusterState
from core.errors import InternalError
from tests.unit.baton.scripted import (
    WAIT_S,
    Script,
    answer,
    endless,
    fail,
    serve,
)


def converse(address: str, out: io.StringIO) -> dict[str, Completion]:
    async def main() -> dict[str, Completion]:
        async with AsyncClient(address) as client:
            return await Conversation(client, REQUESTS, out, Progress(out)).run()

    return asyncio.run(main())


def by_input(chat: Script, prompt: Script) -> Script:
    def script(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        chosen = chat if request.WhichOneof("input") == "chat" else prompt
        return chosen(request, context)

    return script


def test_two_answers_at_the_same_time() -> None:
    both = threading.Barrier(2)  # each answer waits until both requests have arrived

    def together(*texts: str) -> Script:
        def script(
            request: pb.GenerateRequest, context: grpc.ServicerContext
        ) -> Iterator[pb.GenerateResponse]:
            both.wait(WAIT_S)
            yield from answer(*texts)

        return script

    out = io.StringIO()
    script = by_input(together("The capital", " is Paris."), together(' "Oh', ' dear!"'))
    with serve(script) as server:
        answers = converse(server.address, out)
    print_answers(answers, out)
    assert answers["paris"].text == "The capital is Paris."
    assert sorted(request.WhichOneof("input") or "" for request in server.requests) == [
        "chat",
        "prompt",
    ]
    text = out.getvalue()
    assert text.startswith("waiting for the first token of paris and alice ")
    assert re.search(r"^ +\d+\.\d s  paris \| The capital is Paris\.$", text, re.MULTILINE)
    assert re.search(r"^ +\d+\.\d s  alice \| \"Oh dear!\"$", text, re.MULTILINE)
    assert re.search(r"^paris: 40 tokens in, 2 out \(stop\) \| queue", text, re.MULTILINE)
    assert re.search(
        r"^alice: .* over gloo .* prefill-ab12cd -> decode-9f00aa$", text, re.MULTILINE
    )


def test_a_wrong_answer_is_an_error() -> None:
    out = io.StringIO()
    with serve(lambda request, context: iter(answer("Lyon."))) as server:
        answers = converse(server.address, out)
    with pytest.raises(InternalError, match=r"does not name Paris: 'Lyon\.'"):
        print_answers(answers, out)


def test_a_failed_request_raises_its_own_error_and_ends_the_other_request() -> None:
    ended = []

    def watched(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        done = threading.Event()
        context.add_callback(done.set)
        ended.append(done)
        yield from endless(request, context)

    full = fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", None)
    with serve(by_input(full, watched)) as server:
        with pytest.raises(CapacityError, match="the queue is full"):
            converse(server.address, io.StringIO())
        assert all(done.wait(WAIT_S) for done in ended)


@pytest.fixture
def down(tmp_path: Path) -> ClusterState:
    """The state of a cluster that has left nothing behind."""
    return ClusterState(
        name="demo",
        cluster_id=uuid.uuid4().hex,
        pid=1,
        pid_started=0,
        phase="stopping",
        address=f"127.0.0.1:{free_port('127.0.0.1')}",
        model="m",
        store=None,
        start_timeout_s=1.0,
        stop_grace_s=1.0,
        max_replicas={},
        folders=(str(tmp_path / "gone"),),
    )


def test_nothing_is_left(down: ClusterState) -> None:
    check_all_gone(down)


def test_a_process_that_is_left_is_found(down: ClusterState) -> None:
    environment = {**os.environ, CLUSTER_ID_VARIABLE: down.cluster_id}
    with (
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=environment) as process,
        pytest.raises(InternalError, match=f"processes are left: {process.pid}"),
    ):
        check_all_gone(down)
    check_all_gone(down)


def test_a_folder_that_is_left_is_found(down: ClusterState) -> None:
    Path(down.folders[0]).mkdir()
    with pytest.raises(InternalError, match="folders are left"):
        check_all_gone(down)


def test_a_port_that_is_left_is_found(down: ClusterState) -> None:
    with serve(endless) as server, pytest.raises(InternalError, match="port"):
        check_all_gone(replace(down, address=server.address))


def test_the_long_prompt_is_long() -> None:
    assert len(LONG_PROMPT.split()) > 1000  # a word has at least one token
