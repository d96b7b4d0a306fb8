"""docs/configuration.md, made from the keys themselves: `python -m fastgrpo.config_doc > docs/configuration.md`."""

from __future__ import annotations

import json
import typing
from typing import Literal

from msgspec import Meta

from fastgrpo.cli import sections
from fastgrpo.config import LOSS_PRESETS, Key

INTRODUCTION = """# Configuration

Every key, as `[section]` and `key = value` in a TOML file (`--config FILE`) or as `--section.key VALUE` on the command
line, which wins. An unknown key and a value out of bounds are errors of one sentence. `--dry-run` prints what results.
These are the defaults; without `--config` and `--model` the demo's settings apply (`fastgrpo/demo.toml`).

Made by `python -m fastgrpo.config_doc > docs/configuration.md`: change `fastgrpo/config.py`, not this file."""

HEADER = ("| key | type | default | meaning |", "| --- | --- | --- | --- |")
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def document() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for section, title, keys in sections():
        lines += ["", f"## `[{section}]` {title}" if section else f"## {title}", "", *HEADER, *map(row, keys)]
    lines += ["", "## What grpo.loss sets", "", *preset_table(), ""]
    return "\n".join(lines)


def row(key: Key) -> str:
    """The key's line of its section's table."""
    help_line = key.help.replace("|", "\\|")
    return f"| `{key.name.rpartition('.')[2]}` | {type_of(key)} | `{json.dumps(key.default)}` | {help_line} |"


def type_of(key: Key) -> str:
    """The words that the key takes, or its type with its bounds: `float > 0, <= 1`."""
    kind = key.type.__origin__
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    limits = [meta for meta in key.type.__metadata__ if isinstance(meta, Meta)]
    bounds = [f"{sign} {limit}" for meta in limits for name, sign in BOUNDS.items()
              if (limit := getattr(meta, name)) is not None]  # fmt: skip
    return f"{kind.__name__} {', '.join(bounds)}".rstrip()


def preset_table() -> list[str]:
    """What each loss stands for, where the five keys are not set themselves."""
    names = list(LOSS_PRESETS["grpo"])
    lines = [f"| loss | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    return lines + [
        f"| `{loss}` | {' | '.join(str(preset[name]) for name in names)} |" for loss, preset in LOSS_PRESETS.items()
    ]


if __name__ == "__main__":
    print(document(), end="")
