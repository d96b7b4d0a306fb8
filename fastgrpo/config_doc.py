"""docs/configuration.md, made from the keys themselves: `python -m fastgrpo.config_doc > docs/configuration.md`."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union

from fastgrpo.cli import sections
from fastgrpo.config import LOSS_PRESETS
from fastgrpo.config_keys import Key

INTRODUCTION = """# Configuration

Every key, as `[section]` and `key = value` in a TOML file (`--config FILE`) or as `--section.key VALUE` on the command
line, which wins. An unknown key and a value out of bounds are errors of one sentence. `--dry-run` prints what results.
These are the defaults; without `--config` and `--model` the demo's settings apply (`fastgrpo/demo.toml`).

From Python the keys are those of a dict, for `fastgrpo.train` too:

```python
from fastgrpo.config_keys import resolve

config = resolve({"grpo.loss": "dapo", "grpo.lr": 3e-6})
assert (config.grpo.clip_low, config.grpo.clip_high) == (0.2, 0.28)
```

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
    return f"| `{key.name.rpartition('.')[2]}` | {type_of(key.type)} | `{json.dumps(key.default)}` | {help_line} |"


def type_of(hint: Any, limits: Sequence[Any] = ()) -> str:
    """The words that a key of this type takes, or the type with its bounds: `float > 0, <= 1`."""
    kind = typing.get_origin(hint)
    if kind is Annotated:
        return type_of(hint.__origin__, [*limits, *hint.__metadata__])
    if kind in (Union, UnionType):
        return f"{type_of(typing.get_args(hint)[0], limits)}, or a list"
    if kind is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    signed = [(sign, getattr(meta, name, None)) for meta in limits for name, sign in BOUNDS.items()]
    bounds = ", ".join(f"{sign} {bound}" for sign, bound in signed if bound is not None)
    return f"{hint.__name__} {bounds}".rstrip()


def preset_table() -> list[str]:
    """What each loss sets, of the keys that are not set themselves."""
    names = list(LOSS_PRESETS["grpo"])
    lines = [f"| loss | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    return lines + [
        f"| `{loss}` | {' | '.join(str(preset[name]) for name in names)} |" for loss, preset in LOSS_PRESETS.items()
    ]


if __name__ == "__main__":
    print(document(), end="")
