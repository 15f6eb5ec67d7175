"""Error messages for a configuration, in terms of the fields and values that the user wrote."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from core.config.engine_args import ENGINE_ARGS

# Matches up to the last @, because a password may contain @. redis-py also accepts a password in
# the query.
_USERINFO = re.compile(r"://.*@")
_QUERY_PASSWORD = re.compile(r"(password=)[^&\s'\"]*")


def without_passwords(text: str) -> str:
    """Return ``text`` with "…" in place of the users and passwords in its addresses."""
    return _QUERY_PASSWORD.sub(r"\1…", _USERINFO.sub("://…@", text))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most similar to ``name``. ``known`` must not be empty."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def field_paths(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Map the dotted path of every section and value in a tree of models to its field.

    ``NAME`` in a path stands for a section name that users choose.
    """
    paths: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        paths[path] = field
        section = field.annotation
        if get_origin(section) is dict:
            path, section = f"{path}.NAME", get_args(section)[1]
        if isinstance(section, type) and issubclass(section, BaseModel):
            paths.update(field_paths(section, f"{path}."))
    return paths


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line per mistake: the field's path, what is wrong and what to write instead."""
    return "\n".join(without_passwords(_describe_one(entry, model)) for entry in error.errors())


def _describe_one(entry: Any, model: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"{location}: unknown field; {_suggestion(location, model)}"
    message = str(entry["msg"]).removeprefix("Value error, ")
    if entry["type"] == "value_error":  # raised by the schema, whose messages are complete
        return f"{location}: {message}" if location else message
    is_secret = location == "redis.url"  # may contain a password
    shown = "" if is_secret else f", not {entry['input']!r}"
    return f"{location}: {message}{shown}"


def _suggestion(location: str, model: type[BaseModel]) -> str:
    section, _, name = location.rpartition(".")
    paths = field_paths(model)
    if f"{section}.engine" in paths and name in ENGINE_ARGS:
        return f"as an engine argument, write {section}.engine.{name}"
    elsewhere = [path for path in paths if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    user_named = f"{section.rpartition('.')[0]}.NAME"
    siblings = [path for path in paths if path.rpartition(".")[0] in (section, user_named)]
    return f"the nearest known name is {nearest(location, siblings)}"
