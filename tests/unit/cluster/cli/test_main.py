"""``baton generate`` and ``baton chat`` against a scripted router."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from baton.v1 import inference_pb2 as pb
from cluster.cli import main as cli
from cluster.local.ports import free_port
from tests.unit.baton.scripted import Script, fail, say, serve

DANGEROUS = "\x1b]52;c;aGk=\x07"  # a terminal copies "hi" to the clipboard
REFUSED = fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", pb.ErrorDetail())

Run = Callable[..., int]


@pytest.fixture
def baton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs ``baton`` in a new run folder. The user types ``lines``."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def run(*arguments: str, lines: str = "") -> int:
        typed = iter(lines.splitlines())

        def read(_prompt: str) -> str:
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)
        return cli.main(arguments)

    return run


def in_turn(*scripts: Script) -> Script:
    turns: Iterator[Script] = iter(scripts)
    return lambda request, context: next(turns)(request, context)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_control_characters_are_replaced_only_on_a_terminal(
    baton: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    terminal: bool,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    with serve(say("a", DANGEROUS, "b\u00a0\n")) as router:
        arguments = ["hi"] if command == "generate" else []
        assert baton(command, *arguments, "--address", router.address, lines="hi") == 0
    shown = capsys.readouterr().out
    text = "a\ufffd]52;c;aGk=\ufffdb\u00a0\n" if terminal else f"a{DANGEROUS}b\u00a0\n"
    assert shown.startswith(text)


def test_a_conversation_survives_an_error(baton: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(in_turn(say("One."), REFUSED, say("Three."))) as router:
        assert baton("chat", "--address", router.address, lines="first\nsecond\nthird") == 0
    printed = capsys.readouterr()
    assert "baton: the queue is full\n" in printed.err
    assert "Three." in printed.out
    contents = [message.content for message in router.requests[-1].chat.messages]
    assert contents == ["first", "One.", "third"]


def test_text_before_an_error_stays_in_the_conversation(
    baton: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(request_id="r-1", sequence=0, text="Half", token_ids=[1])
        yield from REFUSED(request, context)

    with serve(in_turn(broken, say("Whole."))) as router:
        assert baton("chat", "--address", router.address, lines="first\nsecond") == 0
    assert "Half\n" in capsys.readouterr().out
    contents = [message.content for message in router.requests[-1].chat.messages]
    assert contents == ["first", "Half", "second"]


def test_a_conversation_ends_when_no_router_can_be_reached(
    baton: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    assert baton("chat", "--address", address, lines="first\nsecond") == 1
    assert capsys.readouterr().err.count("no connection to a Baton router") == 1


def test_standard_input_that_is_not_text_is_refused(
    baton: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert baton("generate", "-", "--address", "127.0.0.1:1") == 1
    assert capsys.readouterr().err == (
        "baton: standard input holds bytes that are not UTF-8 text\n"
    )


def test_a_line_that_is_not_text_does_not_end_the_conversation(
    baton: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: Iterator[bytes] = iter([b"\xff", b"good"])

    def read(_prompt: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line.decode()

    with serve(say("Yes.")) as router:
        monkeypatch.setattr("cluster.cli.generate.input", read, raising=False)
        assert baton("chat", "--address", router.address) == 0
    assert [request.chat.messages[0].content for request in router.requests] == ["good"]
    assert "not UTF-8 text" in capsys.readouterr().err


def test_without_a_cluster_the_configured_address_is_used(
    baton: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(say("Hello.")) as router:
        host, _, port = router.address.rpartition(":")
        file = tmp_path / "cluster.yaml"
        file.write_text(f"cluster: {{name: far}}\nrouter: {{host: {host}, port: {port}}}\n")
        assert baton("generate", "hi", "--config", str(file)) == 0
        state = tmp_path / "baton" / "far" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{")  # a damaged state file is ignored
        assert baton("generate", "hi", "--config", str(file)) == 0
    assert capsys.readouterr().out.count("Hello.") == 2


def test_without_a_cluster_and_a_fixed_port_the_command_fails(
    baton: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("router: {port: 0}\n")
    assert baton("generate", "hi", "--config", str(file)) == 1
    assert "no cluster named 'baton' is running" in capsys.readouterr().err
