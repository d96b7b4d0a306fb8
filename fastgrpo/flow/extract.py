"""The program in a model's reply, whatever surrounds it: reasoning, prose, fences of any kind, examples of its use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from fastgrpo_sandbox.guest.syntax import parse

_OPENING = re.compile(
    r"^(?P<indent>[ \t>]*)(?P<fence>`{3,}|~{3,})[ \t]*\{?\.?(?P<language>[\w+#-]*)[^\n`]*$", re.MULTILINE
)
_PYTHON = {"", "python", "python2", "python3", "py", "py3", "ipython", "sage"}
_FIRST_LINE = re.compile(r"^(def|async def|class|import|from|@\w|if|for|while|try|with|print\(|\w+ ?=|#)", re.MULTILINE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_CLOSINGS = 4
_STARTS = 8
_FUTURE = re.compile(r"^from __future__ import (\([^)]*\)|.*)", re.MULTILINE)


def without_reasoning(reply: str) -> str:
    """The reply after its `</think>`; nothing of one whose `<think>` never ends."""
    answer = reply.rpartition("</think>")[2]
    return "" if answer.lstrip().startswith("<think>") else answer


def extract_code(reply: str, entry_point: str = "") -> str:
    """The program of a reply: the last block that defines `entry_point`, else that defines anything, else the last.

    An unclosed block runs to the end. Without blocks it is the part of the reply that is Python, else all of it.
    """
    text = without_reasoning(reply).replace("\r\n", "\n").encode(errors="replace").decode().replace("\ufeff", "")
    blocks = [block for block in _blocks(text) if block.strip()]
    program = max(reversed(blocks), key=lambda block: _worth(block, entry_point), default=None)
    return _spaced(program if program is not None else _bare(text)).strip("\n") + "\n"


def program_after(given: str, code: str) -> str:
    """`code` after the imports and helpers that the problem gives; its `from __future__` imports stay the first."""
    future = "\n".join(found[0] for found in _FUTURE.finditer(code))
    return f"{future}\n{given}\n{_FUTURE.sub('', code)}" if given else code


def _blocks(text: str) -> Iterator[str]:
    """The text of each fenced block; those of other languages only where there is none of Python."""
    others: list[str] = []
    position, found = 0, False
    while opening := _OPENING.search(text, position):
        block, position = _closed(text, opening)
        if opening["language"].lower() in _PYTHON:
            found = True
            yield block
        else:
            others.append(block)
    if not found:
        yield from others


def _closed(text: str, opening: re.Match[str]) -> tuple[str, int]:
    """A block's text and where it ends: at the first closing fence with which it is Python, else at the first."""
    start = min(opening.end() + 1, len(text))
    closing = re.compile(rf"^[ \t>]*{re.escape(opening['fence'])}[ \t]*$", re.MULTILINE)
    ends = [found for found, _ in zip(closing.finditer(text, start), range(_CLOSINGS), strict=False)]
    spans = [(end.start(), end.end()) for end in ends] or [(len(text), len(text))]
    blocks = [(_unindented(text[start:stop], opening["indent"]), after) for stop, after in spans]
    return next((block for block in blocks if _tree(block[0]) is not None), blocks[0])


def _unindented(block: str, indent: str) -> str:
    return re.sub(rf"^{re.escape(indent)}", "", block, flags=re.MULTILINE) if indent else block


def _worth(block: str, entry_point: str) -> int:
    """How likely `block` is the program: 4 it defines the entry point, 3 a function or class, 2 it does something else,
    1 it is values and calls alone, as an example of use or an output is, 0 it is no Python."""
    tree = _tree(block)
    if tree is None:
        return 0
    defined = {node.name for node in tree.body if isinstance(node, _DEFINITIONS)}
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if entry_point in defined | assigned:
        return 4
    return 3 if defined else 2 if any(not isinstance(node, ast.Expr) for node in tree.body) else 1


def _bare(text: str) -> str:
    """A reply without blocks from the first line on with which the rest is Python, less prose at its end."""
    if _tree(text) is not None:
        return text
    for start, _ in zip(_FIRST_LINE.finditer(text), range(_STARTS), strict=False):
        rest = text[start.start() :]
        if (end := _python_lines(rest)) and _tree(program := "".join(rest.splitlines(keepends=True)[:end])) is not None:
            return program
    return text


def _python_lines(text: str) -> int:
    """How many lines come before the first that is no Python."""
    try:
        parse(text)
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    except (ValueError, RecursionError, MemoryError):
        return 0
    return text.count("\n") + 1


def _spaced(program: str) -> str:
    """Blanks that a copy has made unbreakable are blanks again where that makes it Python."""
    plain = program.replace("\u00a0", " ")
    return plain if plain != program and _tree(program) is None and _tree(plain) is not None else program


def _tree(code: str) -> ast.Module | None:
    try:
        return parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
