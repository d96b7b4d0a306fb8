"""docs/configuration.md is the configuration."""

from __future__ import annotations

from pathlib import Path

from fastgrpo.config_doc import document, type_of
from fastgrpo.config_keys import KEYS

PAGE = Path(__file__).parents[1] / "docs/configuration.md"


def test_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), f"run: python -m fastgrpo.config_doc > {PAGE}"


def test_every_key_has_its_type_and_bounds() -> None:
    found = {name: type_of(KEYS[name].type) for name in ("seed", "grpo.ratio", "data.weights", "grpo.temperature")}
    assert found == {
        "seed": "int >= 0, < 4294967296",
        "grpo.ratio": "`token`, `sequence`, `cispo`",
        "data.weights": "float > 0, or a list",
        "grpo.temperature": "float >= 0.01, <= 2",
    }
