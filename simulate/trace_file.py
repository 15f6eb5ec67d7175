"""Reads traces in the two public formats, told apart by their content.

Azure (github.com/Azure/AzurePublicDataset), CSV with a header. The times are dates in UTC, with any
number of fractional digits and with or without an offset, or seconds:

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44

Mooncake (github.com/kvcache-ai/Mooncake), a JSON object per line. ``timestamp`` is in ms, and each
of ``hash_ids`` names a block of 512 prompt tokens:

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}

Other names of the same columns, such as vidur's ``arrived_at`` (seconds), are known as well. A file
may be compressed with gzip.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from simulate.trace import MAX_REQUESTS, Trace, TraceRequest, ordered

MAX_BYTES = 2**30  # of a trace file, without its compression
MAX_TOKENS = 10**8  # of a prompt or an output
_GZIP_MAGIC = b"\x1f\x8b"
_SHOWN_CHARS = 60  # of a broken value, in an error message

# Names are compared without case, spaces and punctuation. The number is seconds per unit, if the
# value is a number; None: as the format says.
_TIMES: Mapping[str, float | None] = {
    "timestamp": None,
    "time": None,
    "arrival": None,
    "arrivaltime": None,
    "arrivaltimestamp": None,
    "requesttimestamp": None,
    "starttime": None,
    "timestampms": 1e-3,
    "arrivalms": 1e-3,
    "arrivedat": 1.0,
    "timestamps": 1.0,
    "arrivals": 1.0,
    "arrivaltimes": 1.0,
}
_PROMPTS = (
    *("contexttokens", "inputlength", "inputtokens", "numprefilltokens", "prompttokens"),
    *("promptlength", "requesttokens", "inputlen", "promptlen", "numinputtokens"),
)
_OUTPUTS = (
    *("generatedtokens", "outputlength", "outputtokens", "numdecodetokens", "completiontokens"),
    *("responsetokens", "outputlen", "numoutputtokens", "generationtokens"),
)
_BLOCKS = ("hashids", "blockhashes", "blockids")
_FORMATS = (
    "Azure's CSV begins with TIMESTAMP,ContextTokens,GeneratedTokens; a line of Mooncake's JSON "
    'lines is {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}'
)


class _LineError(Exception):
    """What is wrong with a line."""


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a row holds each value: an index of a CSV row, or a key of a JSON object."""

    time: Any
    seconds_per_unit: float
    prompt: Any
    output: Any
    blocks: Any = None


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    An output of 0 tokens counts as 1, because a server produces one before it can stop. The same
    holds for an empty prompt.

    Raises:
        ConfigError: the file cannot be read, has no request, or has a line that is neither format.
            The message names the line.
    """
    try:
        text = _bytes(path).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as err:
        why = getattr(err, "strerror", None) or err  # gzip raises OSErrors without one
        raise ConfigError(f"the trace {path} cannot be read: {why}") from err
    return parse_trace(text, name=path.name.removesuffix(".gz"))


def _bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed."""
    with path.open("rb") as file:
        is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    with gzip.open(path) if is_gzip else path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"the trace {path} has more than {MAX_BYTES:,} bytes; shorten it")
    return data


def parse_trace(text: str, name: str) -> Trace:
    """Read a trace from the content of a file. ``read_trace`` says what is raised."""
    rows = _json_rows if text.lstrip().startswith("{") else _csv_rows
    requests: list[TraceRequest] = []
    for request in rows(text, name):
        if len(requests) == MAX_REQUESTS:
            raise ConfigError(f"{name} has more than {MAX_REQUESTS:,} requests; shorten it")
        requests.append(request)
    if not requests:
        raise ConfigError(f"{name} has no request. {_FORMATS}")
    return Trace(name, ordered(requests))


def _json_rows(text: str, name: str) -> Iterator[TraceRequest]:
    columns: _Columns | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _object(line)
            if columns is None or not _fits(columns, row):
                columns = _columns({_plain(key): key for key in row}, default_unit_s=1e-3)
            request = _request(row, columns)
        except _LineError as err:
            raise ConfigError(f"{name}, line {number}: {err}") from None
        yield request


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise _LineError(f"not JSON: {err}") from None
    if not isinstance(row, dict):
        raise _LineError(f"{_shown(row)} is no JSON object")
    return row


def _csv_rows(text: str, name: str) -> Iterator[TraceRequest]:
    head = text.lstrip().partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
    columns: _Columns | None = None
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                columns = _header(row)
                if columns is not _NO_HEADER:
                    continue
            needed = 1 + max(columns.time, columns.prompt, columns.output)
            if len(row) < needed:
                raise _LineError(f"{len(row)} columns, but {needed} are needed: {_shown(row)}")
            yield _request(row, columns)
    except (csv.Error, _LineError) as err:
        hint = f". {_FORMATS}" if columns is None else ""
        raise ConfigError(f"{name}, line {max(1, reader.line_num)}: {err}{hint}") from None


_NO_HEADER = _Columns(time=0, seconds_per_unit=1.0, prompt=1, output=2)  # Azure's order


def _header(row: list[str]) -> _Columns:
    names = {_plain(cell): index for index, cell in enumerate(row)}
    try:
        return _columns(names, default_unit_s=1.0)
    except _LineError:
        try:
            _request(row, _NO_HEADER)
        except (_LineError, IndexError):
            pass
        else:
            return _NO_HEADER
        raise


def _columns(names: Mapping[str, Any], default_unit_s: float) -> _Columns:
    """Find the columns. ``names`` maps plain names to indexes or keys."""
    time = next((name for name in _TIMES if name in names), None)
    if time is None:
        raise _LineError(f"no column with the arrival time, such as timestamp, in {_known(names)}")
    return _Columns(
        time=names[time],
        seconds_per_unit=_TIMES[time] or default_unit_s,
        prompt=_column(names, _PROMPTS, "prompt tokens"),
        output=_column(names, _OUTPUTS, "output tokens"),
        blocks=next((names[name] for name in _BLOCKS if name in names), None),
    )


def _column(names: Mapping[str, Any], wanted: Sequence[str], what: str) -> Any:
    for name in wanted:
        if name in names:
            return names[name]
    raise _LineError(f"no column with the {what}, such as {wanted[0]}, in {_known(names)}")


def _fits(columns: _Columns, row: Mapping[str, Any]) -> bool:
    needed = (columns.time, columns.prompt, columns.output, columns.blocks)
    return all(key in row for key in needed)


def _request(row: Any, columns: _Columns) -> TraceRequest:
    blocks: Any = ()
    if columns.blocks is not None and isinstance(row, dict):
        blocks = row.get(columns.blocks) or ()
        if not isinstance(blocks, (list, tuple)) or not all(type(each) is int for each in blocks):
            raise _LineError(f"{columns.blocks} is {_shown(blocks)}, but must be a list of numbers")
    return TraceRequest(
        arrival_s=_time_s(row[columns.time], columns.seconds_per_unit),
        prompt_tokens=max(1, _tokens(row[columns.prompt], "the number of prompt tokens")),
        output_tokens=max(1, _tokens(row[columns.output], "the number of output tokens")),
        block_ids=tuple(blocks),
    )


def _time_s(value: Any, seconds_per_unit: float) -> float:
    """Convert a number in the format's unit, or a date, to seconds. Dates without offset: UTC."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _LineError(f"the time {_shown(value)} is neither a number nor a date")
    try:
        seconds = float(value) * seconds_per_unit
    except (ValueError, OverflowError):
        seconds = _date_s(str(value).strip())
    if not math.isfinite(seconds):
        raise _LineError(f"the time {_shown(value)} is not finite")
    return seconds


def _date_s(text: str) -> float:
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise _LineError(
            f"the time {_shown(text)} is neither a number nor a date such as 2023-11-16 18:15:46.68"
        ) from None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _tokens(value: Any, what: str) -> int:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
        tokens = int(number)
        if tokens != number:
            raise ValueError
    except (ValueError, OverflowError):
        raise _LineError(f"{what} is {_shown(value)}, but must be a whole number") from None
    if tokens < 0:
        raise _LineError(f"{what} is {tokens}, but must not be negative")
    if tokens > MAX_TOKENS:
        raise _LineError(f"{what} is {_shown(value)}, but must be at most {MAX_TOKENS:,}")
    return tokens


def _plain(name: object) -> str:
    return "".join(char for char in str(name).lower() if char.isalnum())


def _known(names: Mapping[str, Any]) -> str:
    return _shown(", ".join(names)) if names else "an empty line"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
