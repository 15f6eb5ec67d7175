"""Reads a YAML file and overrides into the raw values that ``core.config.schema`` checks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a mapping that contains the same key twice. PyYAML would silently use the last one.

    The check happens when a mapping is composed. Merges (<<) are applied later, so a merge may
    repeat keys.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    "a key must be a plain value; if it is {{ }}, a template was not filled in",
                    key.start_mark,
                )
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def read_raw(path: Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file's values with the overrides applied and default CPU bindings filled in.

    Args:
        path: the YAML file. None: start from an empty configuration.
        overrides: values by dotted path.

    Raises:
        ConfigError: the file cannot be read, is not valid YAML or does not consist of sections, or
            a part of an override's path is not a section.
    """
    raw = {} if path is None else _read(path)
    for dotted, value in overrides.items():
        _apply_override(raw, dotted, value)
    _fill_cpu_bindings(raw, sorted(os.sched_getaffinity(0)))
    return raw


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(), UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        # The error's own text quotes the line, which may contain a password.
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: is not valid YAML: {where}{error.problem}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        kind = type(raw).__name__
        raise ConfigError(f"{path}: must consist of sections such as router:, not of a {kind}")
    return {str(key): _section(value) for key, value in raw.items()}


def _section(value: Any) -> Any:
    """Return a copy of a section. YAML reads an empty section as None; it becomes ``{}``.

    Aliases of one YAML section share one object. Without the copy, an override of one section
    would change the others.
    """
    if value is None:
        return {}
    return dict(value) if isinstance(value, dict) else value


def _apply_override(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{dotted}: {section} is a value, not a section")
    raw[name] = value


def _fill_cpu_bindings(raw: dict[str, Any], cores: Sequence[int]) -> None:
    """Bind the initial replicas of every pool without ``cpu_binding`` to equal shares of cores.

    If engines chose their own cores, two engines could choose the same cores and would be several
    times slower. The cores that the other pool names are used only if there are no others.
    If there are more cores than ranks, at least one core is left to the router and Ray.
    """
    pools = [raw.setdefault(name, {}) for name in ("prefill", "decode")]
    if not all(isinstance(pool, dict) for pool in pools):
        return  # the schema reports the mistake
    sizes = [(pool.get("replicas", 1), pool.get("tensor_parallel_size", 1)) for pool in pools]
    if not all(isinstance(size, int) and 1 <= size <= 1024 for pair in sizes for size in pair):
        return  # malformed, or so large that the lists below would be too long
    named = [_named_cores(pool.get("cpu_binding")) for pool in pools]
    unbound = [
        (pool, size) for pool, size, spans in zip(pools, sizes, named, strict=True) if not spans
    ]
    if not unbound:
        return
    taken = [span for spans in named for span in spans]
    free = [core for core in cores if not any(low <= core <= high for low, high in taken)]
    total_ranks = sum(replicas * ranks for _, (replicas, ranks) in unbound)
    shares = iter(share_cores(free or cores, total_ranks))
    for pool, (replicas, ranks) in unbound:
        own = ["|".join(next(shares) for _ in range(ranks)) for _ in range(replicas)]
        # An empty cpu_binding is kept, because it means that vLLM chooses.
        pool.setdefault("cpu_binding", own)


def _named_cores(binding: Any) -> list[tuple[int, int]]:
    """Return the first and last core of each range in a pool's ``cpu_binding``.

    ``binding`` is the raw value, which is not checked yet and may be malformed.
    """
    lists = binding if isinstance(binding, list | tuple) else ()
    parts = re.findall(r"(\d+)(?:-(\d+))?", " ".join(map(str, lists)))
    return [(int(low), int(high or low)) for low, high in parts]


def share_cores(cores: Sequence[int], ranks: int) -> list[str]:
    """Return a core list such as ``"0,1"`` for each rank. If cores are too few, ranks share them.

    If there are more cores than ranks, at least one core stays unassigned.
    """
    spare = 1 if len(cores) > ranks else 0
    share = max(1, (len(cores) - spare) // ranks)
    groups = [cores[start : start + share] for start in range(0, share * ranks, share)]
    usable = [group for group in groups if group]
    return [",".join(map(str, usable[index % len(usable)])) for index in range(ranks)]
