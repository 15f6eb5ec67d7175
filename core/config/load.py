"""From a YAML file and overrides to what ``core.config.schema`` checks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys in silence; we do not.

    Looked for as each mapping is read: later ones merged into it (<<) bring keys of their own.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    "a key must be a plain value; {{ }} is a template that was not filled in",
                    key.start_mark,
                )
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"{key.value!r} is there twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def read_raw(path: Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the file and the overrides say, and this machine's cores where they say nothing.

    Raises:
        ConfigError: the file cannot be read, or an override's path leads through a value.
    """
    raw = {} if path is None else _read(path)
    for dotted, value in overrides.items():
        _put(raw, dotted.split("."), value, dotted)
    _fill_cpu_bindings(raw, sorted(os.sched_getaffinity(0)))
    return raw


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(), _UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        # Not its own text: that quotes the line, which may hold a password.
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: is not YAML: {where}{error.problem}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold sections such as router:, not {type(raw).__name__}")
    return {str(key): _section(value) for key, value in raw.items()}


def _section(value: Any) -> Any:
    """An empty section is None in YAML, and an alias the same object as what it refers to."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, dict) else value


def _put(raw: dict[str, Any], parts: Sequence[str], value: Any, dotted: str) -> None:
    *sections, name = parts
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{dotted}: {section} is a value, not a section")
    raw[name] = value


def _fill_cpu_bindings(raw: dict[str, Any], cores: Sequence[int]) -> None:
    """Where a pool says nothing, share the cores evenly among all first replicas.

    Two engines on the same cores slow each other down several times, so leaving the
    choice to each engine is no default, and cores that the other pool names are left to it
    as long as there are others. The router and Ray keep a core if there is one.
    """
    pools = [raw.setdefault(name, {}) for name in ("prefill", "decode")]
    if not all(isinstance(pool, dict) for pool in pools):
        return  # the check that follows says so
    sizes = [(pool.get("replicas", 1), pool.get("tensor_parallel_size", 1)) for pool in pools]
    if not all(isinstance(size, int) and 1 <= size <= 1024 for pair in sizes for size in pair):
        return
    named = [_named_cores(pool.get("cpu_binding")) for pool in pools]
    open_pools = [each for each in zip(pools, sizes, named, strict=True) if not each[2]]
    if not open_pools:
        return
    taken = [span for spans in named for span in spans]
    free = [core for core in cores if not any(low <= core <= high for low, high in taken)]
    wanted = sum(replicas * ranks for _, (replicas, ranks), _ in open_pools)
    shares = iter(share_cores(free or cores, wanted))
    for pool, (replicas, ranks), _ in open_pools:
        own = ["|".join(next(shares) for _ in range(ranks)) for _ in range(replicas)]
        pool.setdefault("cpu_binding", own)


def _named_cores(binding: Any) -> list[tuple[int, int]]:
    """First and last core of each part of a pool's bindings; not checked yet."""
    lists = binding if isinstance(binding, list | tuple) else ()
    parts = re.findall(r"(\d+)(?:-(\d+))?", " ".join(map(str, lists)))
    return [(int(low), int(high or low)) for low, high in parts]


def share_cores(cores: Sequence[int], ranks: int) -> list[str]:
    """A core list such as ``"0,1"`` for each rank; too few cores are used in turn."""
    spare = 1 if len(cores) > ranks else 0
    share = max(1, (len(cores) - spare) // ranks)
    groups = [cores[start : start + share] for start in range(0, share * ranks, share)]
    usable = [group for group in groups if group]
    return [",".join(map(str, usable[index % len(usable)])) for index in range(ranks)]
