"""Says what is wrong with a configuration, in the words of the person who wrote it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from core.config.engine_args import ENGINE_ARGS

# Up to the last @: a password may hold one. In a query, redis-py takes it as well.
_USERINFO = re.compile(r"://.*@")
_QUERY_PASSWORD = re.compile(r"(password=)[^&\s'\"]*")


def without_passwords(text: str) -> str:
    """``text`` without what addresses in it tell about users and passwords."""
    return _QUERY_PASSWORD.sub(r"\1…", _USERINFO.sub("://…@", text))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like ``name``; ``known`` must not be empty."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def field_paths(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted path of a tree of models, with its field, sections included.

    ``NAME`` stands for the names of sections that users choose.
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
    """One line for each thing that is wrong: where, what, and what to write instead."""
    return "\n".join(without_passwords(_describe_one(entry, model)) for entry in error.errors())


def _describe_one(entry: Any, model: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"{location}: unknown field; {_suggestion(location, model)}"
    message = str(entry["msg"]).removeprefix("Value error, ")
    if entry["type"] == "value_error":  # ours: they name the value themselves
        return f"{location}: {message}" if location else message
    shown = "" if location == "redis.url" else f", not {entry['input']!r}"  # it may hold a password
    return f"{location}: {message}{shown}"


def _suggestion(location: str, model: type[BaseModel]) -> str:
    section, _, name = location.rpartition(".")
    paths = field_paths(model)
    if f"{section}.engine" in paths and name in ENGINE_ARGS:
        return f"as an argument of the engine it is {section}.engine.{name}"
    elsewhere = [path for path in paths if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"there is {' and '.join(elsewhere)}"
    named = f"{section.rpartition('.')[0]}.NAME"
    siblings = [path for path in paths if path.rpartition(".")[0] in (section, named)]
    return f"the nearest known name is {nearest(location, siblings)}"
