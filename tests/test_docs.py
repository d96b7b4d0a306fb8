"""The snippets of README.md and docs/ run: each python and sh block whose first line is not `# not run: WHY`."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"", "python", "sh", "toml", "json", "text", "mermaid"}


class Block(NamedTuple):
    """A fenced block: where it is, its language and its text."""

    place: str
    language: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("python", "sh") and not self.text.startswith("# not run: ")


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}", *match.groups())
        for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUNNABLE = [block for block in BLOCKS if block.runs]


@pytest.mark.parametrize("block", RUNNABLE, ids=[block.place for block in RUNNABLE])
def test_snippet_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "sh":
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, check=True)
        return
    monkeypatch.chdir(tmp_path)
    code = compile(block.text, block.place, "exec", dont_inherit=True, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    waiting = eval(code, {"__name__": "__main__"})
    if inspect.iscoroutine(waiting):
        asyncio.run(waiting)


def test_every_block_names_a_known_language() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
