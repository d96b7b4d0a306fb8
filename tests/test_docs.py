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

from fastgrpo.config_keys import KEYS, SECTIONS

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


def anchors(page: Path) -> set[str]:
    """What `#` may name on `page`: its headings as GitHub spells them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_a_file_and_its_heading() -> None:
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "bench").rglob("*.md")]
    links = {(page, link) for page in pages for link in re.findall(r"\]\((?!http)(.*?)\)", page.read_text("utf-8"))}
    wrong = []
    for page, link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            wrong.append(f"{page.relative_to(ROOT)}: {link}")
    assert wrong == []


def test_keys_that_the_docs_name_are_keys() -> None:
    """But for those of verl, in its section and beside its name."""
    verls = r"(?s)\n### From verl\n.*?\n##|\n- verl: .*?\n"
    keys = rf"(?:--|`)((?:{'|'.join(SECTIONS)})\.(?!py\b|digest\b|others\b)[a-z_0-9]+)(?=[`= ])"
    named = {
        (page.name, key) for page in PAGES for key in re.findall(keys, re.sub(verls, "\n", page.read_text("utf-8")))
    }
    assert {(page, key) for page, key in named if key not in KEYS} == set()
