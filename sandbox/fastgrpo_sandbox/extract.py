"""The program in a chat answer: fenced blocks, reasoning before them, usage after them. Standard library only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from fastgrpo_sandbox.guest.syntax import parse

THOUGHT, END_OF_THOUGHT = "<think>", "</think>"
FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$")
END_MARKS = re.compile(r"[ \t]*(<[^>\n]*>[ \t]*)*")  # a chat template's end tokens may stand behind the last fence
PYTHON = re.compile(r"\W*(python|py)[\d.]*\W*", re.IGNORECASE)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class _Block(NamedTuple):
    language: str
    text: str
    complete: bool

    @property
    def is_python(self) -> bool:
        return PYTHON.fullmatch(self.language) is not None


def extract_code(answer: str) -> str:
    """The program that `answer` gives; "" where it gives none.

    What is thought before the last `</think>` is left out, and all of an answer that never ends its thought. Of the
    fenced blocks those marked as Python count (python, Python, python3, py), else those without a mark, and complete
    ones before one cut off at the end. The last of them is the program, unless it only uses or shows what an earlier
    one defines; earlier blocks whose functions or classes it needs are put before it. An answer without a fence is a
    program itself and returned as it is.
    """
    if answer.lstrip().startswith(THOUGHT) and END_OF_THOUGHT not in answer:
        return ""
    answer = answer.rpartition(END_OF_THOUGHT)[2]
    blocks = list(_blocks(answer))
    if not blocks:
        return answer.strip("\n")
    texts = [block.text for block in _candidates(blocks)]
    return _program(texts) if texts else ""


def defined_names(code: str) -> set[str]:
    """Functions and classes at the top level of `code`; none where it does not parse."""
    tree = _parsed(code)
    return {node.name for node in tree.body if isinstance(node, DEFINITIONS)} if tree else set()


def _blocks(answer: str) -> Iterator[_Block]:
    """Fenced blocks in order. A fence with a language inside a block begins a new one: the first was never closed."""
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in answer.replace("\r\n", "\n").split("\n"):
        if opened is not None and _closes(line, opened):
            yield _Block(opened[3], _dedented(lines, opened[1]), True)
            opened = None
        elif (fence := FENCE.match(line)) and (opened is None or fence[3]):
            opened, lines = fence, []
        elif opened is not None:
            lines.append(line)
    if opened is not None:
        yield _Block(opened[3], _dedented(lines, opened[1]), False)


def _closes(line: str, opened: re.Match[str]) -> bool:
    mark = line.strip(" \t")
    rest = mark.lstrip(opened[2][0])
    return len(mark) - len(rest) >= len(opened[2]) and END_MARKS.fullmatch(rest) is not None


def _dedented(lines: list[str], indent: str) -> str:
    return "\n".join(line.removeprefix(indent) for line in lines)


def _candidates(blocks: list[_Block]) -> list[_Block]:
    """The blocks that may be the program, best kind only: marked before unmarked, complete before cut off."""
    marked = [block for block in blocks if block.is_python]
    kind = marked or [block for block in blocks if not block.language]
    kind = [block for block in kind if block.complete] or kind
    if marked:
        return [block for block in kind if not block.text.lstrip().startswith(">>>")]
    return [block for block in kind if _parsed(block.text)] or kind


def _program(texts: list[str]) -> str:
    while len(texts) > 1 and _only_shows(texts[-1], texts[:-1]):
        texts.pop()
    if len(texts) == 1:
        return texts[0]
    program, needed = texts[-1], _free_names(texts[-1])
    for text in reversed(texts[:-1]):
        if needed & defined_names(text):
            program, needed = f"{text}\n\n{program}", needed | _free_names(text)
    return program


def _only_shows(text: str, earlier: list[str]) -> bool:
    """Whether a block defines nothing and calls what an earlier one defines, or is only a value: an output."""
    tree = _parsed(text)
    if tree is None or defined_names(text):
        return False
    if not any(isinstance(node, ast.Call | ast.stmt) and not isinstance(node, ast.Expr) for node in ast.walk(tree)):
        return True
    return bool(_free_names(text) & set().union(*map(defined_names, earlier)))


def _free_names(text: str) -> set[str]:
    """Names that `text` reads or imports, less the functions and classes that it defines."""
    tree = _parsed(text)
    if tree is None:
        return set()
    nodes = list(ast.walk(tree))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    read |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return read - defined_names(text)


def _parsed(text: str) -> ast.Module | None:
    try:
        return parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return None
