"""Reads and writes ``LatencyModel`` as YAML or JSON. The keys are the fields; units are in names.

name: 8b-h100
source: baton policy calibrate
prefill: {base_s: 0.008, per_token_s: 4.5e-05, per_square_token_s: 6.6e-10}
decode: {base_s: 0.008, per_stream_s: 5.0e-05, per_kv_token_s: 5.6e-08}
transfer: {base_s: 0.003, bytes_per_s: 25.0e+9, kv_bytes_per_token: 131072}
kv: {prefill_tokens: 400000, decode_tokens: 400000}
cold_start_s: 60
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError
from simulate.latency import PRESETS, LatencyModel


def latency_model(name_or_path: str) -> LatencyModel:
    """Return a preset, or read a file.

    Raises:
        ConfigError: there is neither; or the file is wrong. The message names the field.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"no latency model {name_or_path!r}: write {' or '.join(PRESETS)}, or the path of a "
            "file that `baton policy calibrate` has written"
        )
    try:
        # JSON is YAML.
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        why = getattr(err, "strerror", None) or err
        raise ConfigError(f"the latency model {path} cannot be read: {why}") from err
    try:
        return typing.cast(LatencyModel, _parsed(LatencyModel, raw, ""))
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err


def save_latency_model(model: LatencyModel, path: Path) -> None:
    """Write a file that ``latency_model`` reads."""
    path.write_text(yaml.safe_dump(as_values(model), sort_keys=False, allow_unicode=True))


def as_values(model: LatencyModel) -> dict[str, Any]:
    """Return the model as plain values, for YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items() if each != math.inf}
        return value.value if isinstance(value, enum.Enum) else value

    return typing.cast("dict[str, Any]", plain(dataclasses.asdict(model)))


def _parsed(kind: Any, raw: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _parsed_fields(kind, raw, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(raw)
        except ValueError:
            known = " or ".join(repr(each.value) for each in kind)
            raise ConfigError(f"{where} is {raw!r}; write {known}") from None
    if kind is str:
        if not isinstance(raw, str):
            raise ConfigError(f"{where} is {raw!r}; write a text")
        return raw
    return _number(kind, raw, where)


def _number(kind: Any, raw: Any, where: str) -> float | int:
    # YAML 1.1 reads 4e-5 as text, because the dot is missing.
    try:
        number = float(raw) if isinstance(raw, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(raw, bool) or not math.isfinite(number) or number < 0:
        raise ConfigError(f"{where} is {raw!r}; write a number of at least 0")
    if kind is int:
        if number != int(number):
            raise ConfigError(f"{where} is {raw!r}; write a whole number")
        return int(number)
    return number


def _parsed_fields(kind: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where or 'the file'} must be a mapping of fields, not {raw!r}")
    kinds = typing.get_type_hints(kind)
    for key in raw:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1)
            meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(kinds)}"
            raise ConfigError(f"unknown field {_path(where, key)}; {meant}")
    needed = {
        each.name
        for each in dataclasses.fields(kind)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }
    if missing := sorted(needed - set(raw)):
        raise ConfigError(f"{_path(where, missing[0])} is missing")
    values = {key: _parsed(kinds[key], each, _path(where, key)) for key, each in raw.items()}
    return kind(**values)


def _path(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
