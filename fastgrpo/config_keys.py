"""The keys of the configuration by their dotted names: types, defaults, help lines, and the check of what is given."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from fastgrpo.config import Config, Section
from fastgrpo.errors import UserError


class Key(NamedTuple):
    """One key of the configuration: dotted name, value type, default and help line."""

    name: str
    type: Any
    default: Any
    help: str


def _keys(section: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    hints = typing.get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        if isinstance(field.default, Section):
            yield from _keys(type(field.default), f"{prefix}{field.name}.")
        elif meta := getattr(hint := hints[field.name], "__metadata__", ()):
            help_line = next(each.description or "" for each in meta if isinstance(each, Meta))
            yield Key(prefix + field.name, hint, field.default, help_line)


KEYS: dict[str, Key] = {key.name: key for key in _keys()}
# Another worker has the keys of the section but those that say what all of them are.
_OF_ANOTHER_WORKER = re.compile(r"workers\.others\.\w{1,64}\.(?!(kind|name|cache_dir|latency_scale)$)(?=\w+$)")
SECTIONS: tuple[str, ...] = tuple(dict.fromkeys(name.split(".")[0] for name in KEYS if "." in name))


def checked(values: dict[str, Any], *, source: str, strict: bool = True) -> dict[str, Any]:
    """Dotted `values` with types and bounds checked; `strict=False` also converts a command line's text.

    Raises `UserError` naming `source`, the key, what was expected and what was there.
    """
    result = {}
    for name, value in values.items():
        key = KEYS.get(_OF_ANOTHER_WORKER.sub("workers.", name))
        if key is None:
            raise UserError(f"{source}: {_unknown(name)}")
        listed = not strict and "," in str(value) and takes_several(key)
        given = [item.strip() for item in value.split(",")] if listed else value
        try:
            result[name] = msgspec.convert(given, key.type, strict=strict)
        except msgspec.ValidationError as error:
            wanted = choices_of(key) or str(error).removeprefix("Expected ").split(", got")[0].replace("`", "")
            raise UserError(f"{source}: {name} must be {wanted}, got {value!r} ({type(value).__name__})") from None
        if isinstance(result[name], float) and not math.isfinite(result[name]):
            raise UserError(f"{source}: {name} must be a finite number, got {value!r}")
    return result


def choices_of(key: Key) -> str:
    """`a | b | c` for a key that takes one of a few words, else empty."""
    choices = key.type.__origin__
    return " | ".join(typing.get_args(choices)) if typing.get_origin(choices) is Literal else ""


def takes_several(key: Key) -> bool:
    """True for a key whose value may be a list, which a command line gives separated by commas."""
    return any(typing.get_origin(choice) is tuple for choice in typing.get_args(key.type.__origin__))


def _unknown(name: str) -> str:
    if name in SECTIONS:
        return f"{name!r} is a section, not a key: set keys such as {next(k for k in KEYS if k.startswith(name))!r}"
    spellings = {known: known for known in KEYS} | {known.split(".")[-1]: known for known in KEYS}
    for spelling in (name, name.split(".")[-1]):
        if match := difflib.get_close_matches(spelling, spellings, n=1, cutoff=0.6):
            return f"unknown key {name!r}; did you mean {spellings[match[0]]!r}?"
    return f"unknown key {name!r}; --help lists all keys"
