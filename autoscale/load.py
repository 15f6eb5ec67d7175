"""Reads an autoscaling policy from YAML. Errors name the line, the field and what to write."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from autoscale.policy import (
    DecodePolicy,
    Policy,
    PrefillPolicy,
    Schedule,
    Spec,
    within,
)
from core.config.errors import nearest
from core.config.load import UniqueKeyLoader
from core.errors import ConfigError
from core.types import Pool

# The largest ready policy is 3 KB. A file with many aliases could be far larger than it looks, so
# its text is bounded, and so is its number of values, where each alias counts as all its values.
MAX_POLICY_CHARS = 100_000
MAX_POLICY_VALUES = 10_000
MAX_VALUE_CHARS = 1000  # Python refuses to print numbers of more than 4300 digits

Location = tuple[str | int, ...]


def load_policy(path: Path) -> Policy:
    """Return the policy in a file.

    Raises:
        ConfigError: the file cannot be read, or see ``parse_policy``.
    """
    return parse_policy(read_policy_text(path), str(path))


def read_policy_text(path: Path) -> str:
    """Return the text of a policy file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text in UTF-8") from None


def parse_policy(text: str, name: str) -> Policy:
    """Return the policy that ``text`` contains, as YAML or JSON.

    Args:
        name: what to call the text in errors, such as the file's name.

    Raises:
        ConfigError: the text is not YAML, or not a policy. It has one line per mistake.
    """
    if len(text) > MAX_POLICY_CHARS:
        raise ConfigError(f"{name}: has more than {MAX_POLICY_CHARS} characters")
    try:
        node, raw = _read(text, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: is not valid YAML: {error.problem}") from None
    # The others: a value that does not fit its tag, such as a malformed date or ``!!bool x``.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{name}: is not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deeply") from None
    if node is None or not isinstance(raw, dict):
        raise ConfigError(
            f"{name}:1: must consist of apiVersion, kind, metadata and spec, not of "
            f"{'nothing' if raw is None else f'a {type(raw).__name__}'}"
        )
    try:
        return Policy.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(entry, node, name) for entry in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _read(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    """Return the root node and its value."""
    loader = UniqueKeyLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _count(node, {}) > MAX_POLICY_VALUES:
            raise ConfigError(
                f"{name}: has more than {MAX_POLICY_VALUES} values, each alias (*) counted as all "
                "its values; write fewer aliases"
            )
        return node, loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Return how many values a node stands for; infinite if it contains itself.

    Args:
        known: the counts so far, so that each node is visited once. Those in progress are infinite.

    Raises:
        yaml.constructor.ConstructorError: a value is too long.
    """
    if node in known:
        return known[node]
    known[node] = math.inf
    parts: Iterable[yaml.Node] = ()
    if isinstance(node, yaml.MappingNode):
        parts = (part for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif len(node.value) > MAX_VALUE_CHARS:
        problem = f"a value has more than {MAX_VALUE_CHARS} characters"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    known[node] = 1 + sum(_count(part, known) for part in parts)
    return known[node]


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a policy file, with which editors check and complete it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Policy.model_json_schema(by_alias=True),
    }


def check_against(
    policy: Policy, gpus_per_worker: Mapping[Pool, float], can_change_role: bool
) -> None:
    """Check what only the cluster's configuration tells.

    Args:
        gpus_per_worker: what a new worker of each pool holds.
        can_change_role: whether a worker's engine can serve the other pool, too.

    Raises:
        ConfigError: the budget has no room for the minimums of both pools or bounds nothing, or
            roles cannot change.
    """
    spec = policy.spec
    if spec.role_change != "Never" and not can_change_role:
        raise ConfigError(
            "spec.roleChange: the workers of this cluster cannot change their role; write Never"
        )
    if spec.budget is None:
        return
    for pool in Pool:
        if gpus_per_worker[pool] <= 0:
            raise ConfigError(
                f"spec.budget.gpus: bounds nothing, because a {pool} worker of this cluster holds "
                "no GPU; remove budget"
            )
    for when, schedule in [("", None), *((f" in schedule {s.name}", s) for s in spec.schedules)]:
        # One worker of each pool must have room even if the minimum is 0.
        least = {pool: max(1, _fewest(spec, schedule, pool)) for pool in Pool}
        gpus = sum(least[pool] * gpus_per_worker[pool] for pool in Pool)
        if not spec.budget.has_room_for(gpus):
            raise ConfigError(
                f"spec.budget.gpus: {spec.budget.gpus:g} is less than the {gpus:g} GPUs of the "
                f"fewest workers{when}: {least[Pool.PREFILL]} prefill and {least[Pool.DECODE]} "
                "decode"
            )


def _fewest(spec: Spec, schedule: Schedule | None, pool: Pool) -> int:
    return within(None if schedule is None else schedule.bounds(pool), spec.pool(pool))[0]


def _describe(entry: Any, node: yaml.Node, name: str) -> str:
    """Return a line for one mistake that pydantic found."""
    context = entry.get("ctx", {})
    location: Location = (*entry["loc"], *context.get("path", ()))
    if entry["type"].startswith("union_tag"):
        location = (*location, "type")
    fields, line = _find(node, location)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fields)
    return f"{name}:{line}: {path.removeprefix('.')}: {_explain(entry, location)}"


def _find(node: yaml.Node, location: Location) -> tuple[Location, int]:
    """Return the path as the file spells it, and the line of the deepest part that exists."""
    path: list[str | int] = []
    line = node.start_mark.line + 1
    for index, part in enumerate(location):
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found and index < len(location) - 1 and _is_tag(location, index):
                continue  # pydantic adds the type of a signal, which is no level of the file
            if found:
                line, node = found[0][0].start_mark.line + 1, found[0][1]
        path.append(part)
    return tuple(path), line


def _is_tag(location: Location, index: int) -> bool:
    return index >= 2 and location[index - 2] == "signals"


def _explain(entry: Any, location: Location) -> str:
    context = entry.get("ctx", {})
    match entry["type"]:
        case "extra_forbidden":
            known = _field_names(location[:-1])
            return f"unknown field; the nearest name is {nearest(str(location[-1]), known)}"
        case "missing":
            return "is missing"
        case "union_tag_invalid":
            return _explain_signal(str(context["tag"]), location)
        case "union_tag_not_found":
            return "is missing; write the signal's type, such as QueueRequests"
        case "literal_error":
            return _explain_choice(entry["input"], str(context["expected"]))
    message = str(entry["msg"]).removeprefix("Value error, ")
    if entry["type"] in ("policy", "value_error"):  # ours; these are complete
        return message
    shown = entry["input"] if not isinstance(entry["input"], dict | list) else "a section or list"
    return f"{message}, not {shown!r}"


def _explain_signal(tag: str, location: Location) -> str:
    pool = Pool(str(location[location.index("signals") - 1]))
    types = {each: list(_signal_types(each)) for each in Pool}
    if tag in types[pool.other]:
        return f"{tag} is a signal of {pool.other}; {pool} has {', '.join(types[pool])}"
    return (
        f"unknown type {tag!r}; the nearest name is {nearest(tag, types[pool])}; "
        f"{pool} has {', '.join(types[pool])}"
    )


def _explain_choice(value: Any, expected: str) -> str:
    choices = expected.replace("'", "").replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; the nearest is {close[0]}" if close and len(choices) > 1 else ""
    return f"must be {expected.replace(chr(39), '')}, not {value!r}{hint}"


def _signal_types(pool: Pool) -> Iterator[str]:
    model: type[BaseModel] = PrefillPolicy if pool is Pool.PREFILL else DecodePolicy
    for signal in _models_in(model.model_fields["signals"]):
        yield from get_args(signal.model_fields["type"].annotation)


def _field_names(location: Location) -> list[str]:
    """Return the names that the section at ``location`` of a policy may contain."""
    models: list[type[BaseModel]] = [Policy]
    for part in location:
        tagged = [m for m in models if m.__name__ == part]
        fields = [field for m in models for field in m.model_fields.values() if field.alias == part]
        if tagged:
            models = tagged
        elif fields:
            models = [each for field in fields for each in _models_in(field)]
    return [str(field.alias) for model in models for field in model.model_fields.values()]


def _models_in(field: Any) -> Iterable[type[BaseModel]]:
    """Yield the models in a field or type, such as those of a union."""
    annotation = getattr(field, "annotation", field)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
