"""The configuration on disk: TOML in and out."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.config import Config
from fastgrpo.config_keys import KEYS, checked, resolve
from fastgrpo.errors import UserError
from fastgrpo_sandbox.given import without_login

# Keys whose addresses may hold a user and a password.
ADDRESSES = re.compile(r"workers\.(others\.\w+\.)?base_url|sandbox\.hosts")


def read_saved(folder: Path) -> dict[str, Any]:
    """Dotted, checked values of the configuration that the run in `folder` left.

    Raises `UserError` where there is none, or a damaged one.
    """
    saved = folder / "config.toml"
    if not saved.exists():
        raise UserError(f"nothing to resume: {saved} does not exist; check --name, or leave --resume out")
    if not (values := read_toml(saved)):
        raise UserError(
            f"{saved} is empty: put the run's configuration back, which each checkpoint's manifest.json has too, or "
            "start a new run under another --name"
        )
    try:
        resolve(values)
    except UserError as error:
        raise UserError(
            f"{saved} is no configuration of a run: {error}; mend it in that file, which was cut, or which an older "
            "version passed"
        ) from None
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """Dotted, checked values of a TOML file. Raises `UserError` for a missing, broken or wrong file."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    return checked(dict(_flatten(tables)), source=str(path))


def _flatten(tables: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict) and prefix + name not in KEYS:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def flat(config: Config, *, logins: bool = True) -> dict[str, Any]:
    """The configuration as dotted name to value, in the order of `KEYS`; without `logins` as others may see it."""
    values = dict(_flatten(msgspec.to_builtins(config)))
    if not logins:
        for name in filter(ADDRESSES.fullmatch, values):
            given = values[name]
            values[name] = without_login(given) if isinstance(given, str) else [without_login(each) for each in given]
    return values


def to_toml(config: Config, *, logins: bool = True) -> str:
    """The configuration as TOML that `read_toml` reads back to the same configuration, with `logins` that is."""
    lines, section = [], ""
    for name, value in sorted(flat(config, logins=logins).items(), key=lambda item: "." in item[0]):
        table, _, key = name.rpartition(".")
        if table != section:
            section = table
            lines.append(f"\n[{section}]")
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{key} = {text}")
    return "\n".join(lines).lstrip() + "\n"
