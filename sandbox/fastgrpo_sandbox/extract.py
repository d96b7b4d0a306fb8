"""The program in a chat answer: fenced blocks, reasoning before them, usage after them. Standard library only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from fastgrpo_sandbox.guest.syntax import parse

THOUGHT, END_OF_THOUGHT = "<think>", "</think>"
FENCE = re.compile(r"^([ \t>]*)(`{3,}(?!`)|~{3,}(?!~))(?=[^`]*$)[ \t]*([^\s`]*)")
END_MARKS = re.compile(r"[ \t]*(<[^>\n]*>[ \t]*)*")  # a chat template's end tokens may stand behind the last fence
PYTHON = re.compile(r"\W*(python|py)[\d.]*+\W*", re.IGNORECASE)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FIRST_LINE = re.compile(r"^(?:(?:def|async def|class|import|from) |@\w|\w+ ?=)", re.MULTILINE)
STARTS = 8  # lines at which a program without fences is looked for
MOST_LOOKED = 1 << 17  # letters of what is looked at from these lines on; a long answer has one start


class _Block(NamedTuple):
    language: str
    text: str
    complete: bool

    @property
    def is_python(self) -> bool:
        return PYTHON.fullmatch(self.language) is not None


def extract_code(answer: str, entry_point: str = "") -> str:
    """The program that `answer` gives; "" where it gives none.

    What is thought before the last `</think>` is left out, and all of an answer that never ends its thought. Of the
    fenced blocks those marked as Python count (python, Python, python3, py), else those without a mark, and complete
    ones before one cut off at the end. The last of them is the program, unless it only uses or shows what an earlier
    one defines, or an earlier one alone defines `entry_point`; earlier blocks whose functions or classes it needs are
    put before it. An answer without a fence is a program itself, less the prose around it.
    """
    answer = without_thought(answer).replace("\ufeff", "").encode(errors="replace").decode()
    blocks = list(_blocks(answer, strings=True))
    if not all(block.complete for block in blocks):
        blocks = list(_blocks(answer, strings=False))
    if not blocks:
        return _spaced(_bare(answer)).strip("\n")
    texts = [_spaced(block.text) for block in _candidates(blocks)]
    return _program(texts, entry_point).strip("\n") if texts else ""


def without_thought(answer: str) -> str:
    """`answer` after its last `</think>`; "" of one that begins with a thought and never ends it."""
    if answer.lstrip().startswith(THOUGHT) and END_OF_THOUGHT not in answer:
        return ""
    return answer.rpartition(END_OF_THOUGHT)[2]


def defined_names(code: str) -> set[str]:
    """Functions and classes at the top level of `code`; none where it does not parse."""
    tree = _parsed(code)
    return {node.name for node in tree.body if isinstance(node, DEFINITIONS)} if tree else set()


def _blocks(answer: str, *, strings: bool) -> Iterator[_Block]:
    """Fenced blocks in order. A fence with a language inside a block begins a new one: the first was never closed.

    With `strings` a fence between three quotes, as in a docstring with an example, is none.
    """
    opened: re.Match[str] | None = None
    lines: list[str] = []
    quoted = False
    for line in answer.replace("\r\n", "\n").split("\n"):
        if opened is not None and not quoted and _closes(line, opened):
            yield _Block(opened[3], _dedented(lines, opened[1]), True)
            opened = None
        elif not quoted and (fence := FENCE.match(line)) and (opened is None or fence[3]):
            opened, lines = fence, []
        elif opened is not None:
            lines.append(line)
            quoted ^= strings and (line.count('"""') + line.count("'''")) % 2 == 1
    if opened is not None:
        yield _Block(opened[3], _dedented(lines, opened[1]), False)


def _closes(line: str, opened: re.Match[str]) -> bool:
    mark = line.lstrip(" \t>")
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


def _program(texts: list[str], entry_point: str) -> str:
    if len(texts) == 1:  # which need not be parsed, at seconds for a megabyte
        return texts[0]
    defined = [defined_names(text) for text in texts]
    while len(texts) > 1 and (_only_shows(texts[-1], defined) or _is_beside(entry_point, defined)):
        texts.pop()
        defined.pop()
    if len(texts) == 1:
        return texts[0]
    program, needed = texts[-1], _free_names(texts[-1])
    for text, names in zip(reversed(texts[:-1]), reversed(defined[:-1]), strict=True):
        if needed & names:
            program, needed = f"{text}\n\n{program}", needed | _free_names(text)
    return program


def _only_shows(text: str, defined: list[set[str]]) -> bool:
    """Whether the last block defines nothing and calls what an earlier one does, or is only a value: an output."""
    tree = _parsed(text)
    if tree is None or defined[-1]:
        return False
    if not any(isinstance(node, ast.Call | ast.stmt) and not isinstance(node, ast.Expr) for node in ast.walk(tree)):
        return True
    free = _free_names(text)
    return any(free & names for names in defined)


def _is_beside(entry_point: str, defined: list[set[str]]) -> bool:
    """Whether an earlier block defines the entry point and the last does not, as tests of it do."""
    return entry_point not in defined[-1] and any(entry_point in names for names in defined)


def _bare(answer: str) -> str:
    """An answer without a fence, from the first line on with which the rest is Python, less the prose behind it."""
    if _parsed(answer) is not None:
        return answer
    starts = min(STARTS, MOST_LOOKED // len(answer) or 1)
    for start, _ in zip(FIRST_LINE.finditer(answer), range(starts), strict=False):
        rest = answer[start.start() :]
        lines = _first_error(rest)
        if lines is None:
            return rest
        program = "\n".join(rest.split("\n")[:lines])
        if program.strip() and _parsed(program) is not None:
            return program
    return answer


def _first_error(text: str) -> int | None:
    """Lines before the first that is no Python; None where all are."""
    try:
        parse(text)
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    except (ValueError, SystemError):
        return 0
    return None


def _spaced(program: str) -> str:
    """Blanks that a copy has made unbreakable are blanks again where that makes it Python."""
    plain = program.replace("\u00a0", " ")
    return plain if plain != program and _parsed(program) is None and _parsed(plain) is not None else program


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
    except (SyntaxError, ValueError, SystemError):
        return None
