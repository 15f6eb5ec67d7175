"""From a YAML file and overrides to what ``cluster.config`` checks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys in silence; we do not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


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
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold sections such as router:, not {type(raw).__name__}")
    return {str(key): {} if value is None else value for key, value in raw.items()}


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
    choice to each engine is no default. The router and Ray keep a core if there is one.
    """
    pools = [raw.setdefault(name, {}) for name in ("prefill", "decode")]
    if not all(isinstance(pool, dict) for pool in pools):
        return  # the check that follows says so
    sizes = [(pool.get("replicas", 1), pool.get("tensor_parallel_size", 1)) for pool in pools]
    if not all(isinstance(size, int) and 1 <= size <= 1024 for pair in sizes for size in pair):
        return
    ranks = iter(share_cores(cores, sum(replicas * ranks for replicas, ranks in sizes)))
    for pool, (replicas, ranks_each) in zip(pools, sizes, strict=True):
        own = ["|".join(next(ranks) for _ in range(ranks_each)) for _ in range(replicas)]
        pool.setdefault("cpu_binding", own)


def share_cores(cores: Sequence[int], ranks: int) -> list[str]:
    """A core list such as ``"0,1"`` for each rank; too few cores are used in turn."""
    spare = 1 if len(cores) > ranks else 0
    share = max(1, (len(cores) - spare) // ranks)
    groups = [cores[start : start + share] for start in range(0, share * ranks, share)]
    usable = [group for group in groups if group]
    return [",".join(map(str, usable[index % len(usable)])) for index in range(ranks)]
