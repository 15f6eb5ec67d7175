"""The output for people and programs: JSON, phases, interleaved streams and progress."""

from __future__ import annotations

import io
import itertools
import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace

import pytest

from baton.types import (
    Completion,
    FinishReason,
    KvOutcome,
    KvReport,
    Phases,
    Response,
    TokenLogprobs,
    TopLogprob,
    Usage,
)
from cluster.cli.progress import Progress
from cluster.cli.render import StreamPrinter, phases_line, printable, response_json

KV = KvReport(
    outcome=KvOutcome.TRANSFERRED,
    backend="gloo",
    bytes=29_491_200,
    messages=30,
    tokens=1280,
    transfer_ms=9.94,
    cached_tokens=0,
    computed_tokens=1,
    hidden_bytes=28_016_640,
    tail_ms=1.2,
    stall_ms=0.0,
    retries=0,
)
PHASES = Phases(
    queue_ms=0.42,
    prefill_ms=2150.4,
    ttft_ms=2152.0,
    handoff_ms=38.2,
    decode_ms=1500.0,
    tokens_per_s=31.25,
    kv=KV,
    prefill_worker="prefill-ab12cd",
    decode_worker="decode-9f00aa",
    attempts=1,
)
LAST = Response(
    request_id="r-1",
    sequence=3,
    text=" é",
    token_ids=(7, 8),
    logprobs=(),
    finish_reason=FinishReason.LENGTH,
    usage=Usage(prompt_tokens=1281, completion_tokens=48, cached_prompt_tokens=0),
    phases=PHASES,
)


def still() -> float:
    return 0.0


def ticking(step_s: float) -> Callable[[], float]:
    seconds = itertools.count()
    return lambda: next(seconds) * step_s


def test_json_of_a_response_before_the_last() -> None:
    response = Response(request_id="r-1", sequence=0, text="Hi", token_ids=(1, 2), logprobs=())
    assert json.loads(response_json(response)) == {
        "request_id": "r-1",
        "sequence": 0,
        "text": "Hi",
        "token_ids": [1, 2],
    }


def test_json_of_the_last_response() -> None:
    line = response_json(LAST)
    assert "\n" not in line
    value = json.loads(line)
    assert value["text"] == " é"
    assert value["finish_reason"] == "length"
    assert value["usage"] == {
        "prompt_tokens": 1281,
        "completion_tokens": 48,
        "cached_prompt_tokens": 0,
    }
    assert value["phases"]["prefill_worker"] == "prefill-ab12cd"
    assert value["phases"]["kv"]["outcome"] == "transferred"
    assert value["phases"]["kv"]["bytes"] == 29_491_200


def test_json_with_logprobs() -> None:
    logprobs = (TokenLogprobs(-0.5, (TopLogprob(7, -0.5), TopLogprob(9, -2.0))),)
    value = json.loads(response_json(replace(LAST, logprobs=logprobs)))
    assert value["logprobs"] == [
        {
            "logprob": -0.5,
            "top": [{"token_id": 7, "logprob": -0.5}, {"token_id": 9, "logprob": -2.0}],
        }
    ]


def test_json_cannot_control_a_terminal() -> None:
    text = "a\x1b]52;c;\x07b\x7fc\x9b2Jd\u00a0\N{IDEOGRAPHIC SPACE}é"
    line = response_json(replace(LAST, text=text))
    assert not [char for char in line if unicodedata.category(char) == "Cc"]
    assert "\u00a0\N{IDEOGRAPHIC SPACE}é" in line
    assert json.loads(line)["text"] == text


def test_phases_line() -> None:
    assert phases_line(LAST) == (
        "1281 tokens in, 48 out (length) | queue 0.4 ms | prefill 2150 ms"
        " | KV 28.12 MiB (95% hidden) in 9.9 ms over gloo | hand-off 38 ms | 31.2 tokens/s"
        " | prefill-ab12cd -> decode-9f00aa"
    )


def test_phases_line_of_a_completion_with_cached_tokens_and_a_retry() -> None:
    completion = Completion(
        request_id="r-1",
        text="x",
        token_ids=(1,),
        logprobs=(),
        finish_reason=FinishReason.STOP,
        usage=Usage(prompt_tokens=40, completion_tokens=1, cached_prompt_tokens=32),
        phases=replace(PHASES, attempts=2),
    )
    line = phases_line(completion)
    assert line.startswith("40 tokens in (32 cached), 1 out (stop) | queue")
    assert line.endswith("| 2 attempts")
    assert "hand-off" not in line


@pytest.mark.parametrize(
    ("phases", "shown"),
    [
        (replace(PHASES, kv=None), "no KV report"),
        (replace(PHASES, kv=replace(KV, outcome=KvOutcome.LOCAL)), "no KV sent (local prefill)"),
        (
            replace(PHASES, kv=replace(KV, outcome=KvOutcome.RECOMPUTED)),
            "KV transfer failed, recomputed",
        ),
        (replace(PHASES, prefill_worker=""), "tokens/s | decode-9f00aa"),
    ],
)
def test_phases_line_reports_missing_phases(phases: Phases, shown: str) -> None:
    assert shown in phases_line(replace(LAST, phases=phases))


def test_an_unfinished_response_has_no_phases_line() -> None:
    with pytest.raises(ValueError, match="finished"):
        phases_line(Response(request_id="r-1", sequence=0, text="Hi", token_ids=(1,), logprobs=()))


def test_one_stream_is_written_as_it_arrives() -> None:
    out = io.StringIO()
    printer = StreamPrinter(out, ["a"], clock=still)
    seen = []
    for text in ["The", " cap", "ital"]:
        printer.write("a", text)
        seen.append(out.getvalue())
    assert seen == ["   0.0 s  a | The", "   0.0 s  a | The cap", "   0.0 s  a | The capital"]
    printer.finish("a")
    assert out.getvalue() == "   0.0 s  a | The capital\n"


def test_two_streams_take_turns_by_line_and_nothing_is_lost() -> None:
    out = io.StringIO()
    printer = StreamPrinter(out, ["one", "three"], clock=ticking(0.5), width_columns=10)
    for number in range(8):
        printer.write("one", f" a{number}")
        printer.write("three", f" b{number}")
    printer.finish("one")
    printer.finish("three")
    assert out.getvalue().splitlines() == [
        "   0.5 s    one | a0 a1 a2 a3",
        "   1.0 s  three | b0 b1 b2 b3",
        "   1.5 s    one | a4 a5 a6 a7",
        "   2.0 s  three | b4 b5 b6 b7",
    ]


def test_a_line_break_in_the_text_ends_the_line() -> None:
    out = io.StringIO()
    printer = StreamPrinter(out, ["a"], clock=still)
    printer.write("a", "\n\nFirst.\n")
    printer.write("a", "\n")
    printer.write("a", "Second.")
    printer.finish("a")
    assert out.getvalue() == "   0.0 s  a | First.\n   0.0 s  a | Second.\n"


def test_a_slow_stream_yields_its_line_when_another_has_a_full_one() -> None:
    out = io.StringIO()
    printer = StreamPrinter(out, ["slow", "fast"], clock=still, width_columns=10)
    printer.write("slow", "Well")
    for word in ["one", " two", " three", " four", " five"]:
        printer.write("fast", word)
    assert out.getvalue().splitlines()[:2] == [
        "   0.0 s  slow | Well",
        "   0.0 s  fast | one two three",
    ]


def test_a_stream_without_text_has_no_line() -> None:
    out = io.StringIO()
    printer = StreamPrinter(out, ["a", "b"], clock=still)
    printer.write("a", "")
    printer.finish("a")
    printer.finish("b")
    assert out.getvalue() == ""


def test_stream_output_cannot_control_the_terminal() -> None:
    out = io.StringIO()
    printer = StreamPrinter(out, ["a"], clock=still, colour=True)
    printer.write("a", "x\x1b[2Jy\x07z")
    printer.finish("a")
    assert out.getvalue() == "   0.0 s  \x1b[36ma\x1b[0m | x�[2Jy�z\n"


@pytest.mark.parametrize(
    "text",
    [
        "Qui\N{NO-BREAK SPACE}? Oui\N{NARROW NO-BREAK SPACE}!",
        "東京\N{IDEOGRAPHIC SPACE}大阪",
        "می\N{ZERO WIDTH NON-JOINER}خواهم",
        "👩\N{ZERO WIDTH JOINER}💻",
        "a\n\tb",
    ],
)
def test_characters_that_scripts_and_emoji_need_are_kept(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("char", ["\x1b", "\r", "\x7f", "\x9b", "\ud800", "\u202e", "\u2066"])
def test_characters_that_control_a_terminal_are_replaced(char: str) -> None:
    assert printable(f"a{char}b") == "a\N{REPLACEMENT CHARACTER}b"


def test_a_closed_output_does_not_stop_progress() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = Progress(Gone())
    progress.step("draining")
    progress.done()


def test_progress_counts_seconds() -> None:
    out = io.StringIO()
    now = [100.0]
    progress = Progress(out, clock=lambda: now[0])
    progress.tick()  # no step is running, so nothing is shown
    progress.step("starting")
    for now[0] in (100.9, 101.0, 103.2, 105.0, 106.0):
        progress.tick()
    now[0] = 106.5
    progress.step("starting")
    progress.step("starting, 6 s")
    progress.step("starting (7 s)")
    progress.step("stopping")
    now[0] = 106.6
    progress.done()
    progress.done()
    assert out.getvalue() == "starting ....5. 6.5 s\nstopping 0.1 s\n"


def test_progress_ends_its_thread_and_its_line() -> None:
    out = io.StringIO()
    with Progress(out) as progress:
        progress.step("working")
        thread = progress._thread
    assert not thread.is_alive()
    assert out.getvalue().startswith("working ")
    assert out.getvalue().endswith(" s\n")
