"""Traces in both public formats, and what is said of broken lines."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

import simulate
from core.errors import ConfigError
from simulate import trace_file
from simulate.trace_file import parse_trace, read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MOONCAKE = '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
BUNDLED = Path(simulate.__file__).parent / "traces"


def lengths(text: str) -> list[tuple[float, int, int]]:
    trace = parse_trace(text, "trace")
    return [(each.arrival_s, each.prompt_tokens, each.output_tokens) for each in trace.requests]


@pytest.mark.parametrize(
    "times",
    [
        ("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:48.1805900"),
        ("2024-05-10 00:00:00+00:00", "2024-05-10 00:00:01.500000+00:00"),
        ("2024-05-10 01:00:00+01:00", "2024-05-10T00:00:01.5Z"),
        ("2023-11-16 23:59:59.5", "2023-11-17 00:00:01"),
        ("12.25", "13.75"),
    ],
)
def test_azure_times_of_any_form(times: tuple[str, str]) -> None:
    assert lengths(f"{AZURE}{times[0]},374,44\n{times[1]},396,109\n") == [
        (0.0, 374, 44),
        (pytest.approx(1.5), 396, 109),
    ]


def test_crlf_blank_lines_a_byte_order_mark_and_no_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"  # the name does not tell the format
    path.write_bytes(f"\ufeff\r\n{AZURE}1.0,2,3\n\n  \n2.0,4,5".replace("\n", "\r\n").encode())
    trace = read_trace(path)
    assert [each.prompt_tokens for each in trace.requests] == [2, 4]


def test_unsorted_arrivals_are_sorted_and_begin_at_zero() -> None:
    assert lengths(f"{AZURE}9,1,1\n7,2,2\n8,3,3\n") == [(0, 2, 2), (1, 3, 3), (2, 1, 1)]


@pytest.mark.parametrize(
    "header",
    [
        "arrived_at,num_prefill_tokens,num_decode_tokens",
        "Timestamp;Request tokens;Response tokens",
        "timestamp\tinput_length\toutput_length",
        "num_decode_tokens,num_prefill_tokens,arrived_at",
    ],
)
def test_other_headers(header: str) -> None:
    separator = next(char for char in ",;\t" if char in header)
    cells = separator.join(("5.5", "7", "3") if header[0] != "n" else ("3", "7", "5.5"))
    assert lengths(f"{header}\n{cells}\n") == [(0.0, 7, 3)]


def test_azure_without_header() -> None:
    assert lengths("2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:47.68,1,2\n") == [
        (0.0, 374, 44),
        (1.0, 1, 2),
    ]


def test_mooncake_is_in_milliseconds_and_has_blocks() -> None:
    later = MOONCAKE.replace("27482", "28482").replace(', "hash_ids": [46, 47]', "")
    trace = parse_trace(f"\n{MOONCAKE}\r\n{later}", "trace")
    assert [each.arrival_s for each in trace.requests] == [0.0, pytest.approx(1.0)]
    assert [each.block_ids for each in trace.requests] == [(46, 47), ()]


def test_blocks_are_read_if_the_first_line_has_none() -> None:
    first = MOONCAKE.replace(', "hash_ids": [46, 47]', "")
    trace = parse_trace(first + MOONCAKE, "trace")
    assert [each.block_ids for each in trace.requests] == [(), (46, 47)]


def test_an_empty_output_counts_as_one_token() -> None:
    assert lengths(f"{AZURE}0,5,0\n") == [(0.0, 5, 1)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f"{AZURE}1,2,3\n1,2\n", "line 3: 2 columns, but 3 are needed"),
        (f"{AZURE}1,2,3\n\nyesterday,2,3\n", "line 4: the time 'yesterday' is neither"),
        (f"{AZURE}nan,2,3\n", "line 2: the time 'nan' is not finite"),
        (f"{AZURE}1,two,3\n", "line 2: the number of prompt tokens is 'two'"),
        (f"{AZURE}1,2,-3\n", "line 2: the number of output tokens is -3"),
        (
            f"{AZURE}1,1e300,3\n",
            "line 2: the number of prompt tokens is '1e300', .* at most 100,000",
        ),
        (f"{AZURE}1,2,3.5\n", "line 2: the number of output tokens is '3.5'"),
        ("time,tokens\n1,2\n", "line 1: no column with the prompt tokens, such as contexttokens"),
        (f"{MOONCAKE}{MOONCAKE[:40]}\n", "line 2: not JSON"),
        (f"{MOONCAKE}[1, 2]\n", "line 2: .* is no JSON object"),
        (f"{MOONCAKE}{{}}\n", "line 2: no column with the arrival time"),
        (f"{MOONCAKE.replace('52', 'true')}", "line 1: the number of output tokens is True"),
        (f"{MOONCAKE.replace('[46, 47]', '[46, null]')}", "line 1: hash_ids is .*list of numbers"),
        ("", "trace has no request. Azure's CSV begins with"),
        (AZURE, "trace has no request"),
    ],
)
def test_an_error_names_the_line(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_trace(text, "trace")


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "missing")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(AZURE.encode())[:-4])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "cut.gz")
    broken = bytearray(gzip.compress(AZURE.encode()))
    broken[10] ^= 0xFF  # the first byte of the deflated data
    (tmp_path / "broken.gz").write_bytes(broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "broken.gz")


@pytest.mark.parametrize("is_gzip", [False, True])
def test_a_file_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gzip: bool
) -> None:
    monkeypatch.setattr(trace_file, "MAX_BYTES", 100_000)
    data = b" " * 100_001
    (tmp_path / "large").write_bytes(gzip.compress(data) if is_gzip else data)
    with pytest.raises(ConfigError, match="more than 100,000 bytes; shorten it"):
        read_trace(tmp_path / "large")


@pytest.mark.parametrize(
    ("name", "requests", "prompt_tokens"),
    [
        ("AzureLLMInferenceTrace_conv.csv.gz", 19_366, 22_361_870),
        ("mooncake_synthetic_trace.jsonl.gz", 3_993, 61_194_628),
    ],
)
def test_the_bundled_traces_are_whole(name: str, requests: int, prompt_tokens: int) -> None:
    trace = read_trace(BUNDLED / name)
    assert len(trace.requests) == requests
    assert sum(each.prompt_tokens for each in trace.requests) == prompt_tokens
