"""A completion into a workflow, or the one reason why it is none.

The format: `<think>reasoning</think>`, then one ```python block that defines `async def workflow(problem)`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Literal

from fastgrpo_sandbox.guest.syntax import parse

Reason = Literal[
    "no reasoning", "no code block", "several code blocks", "too long", "syntax", "too deep", "no workflow"
]

MAX_CODE_CHARS = 8_000
MAX_DEPTH = 60

_FENCE = re.compile(r"^```(?:python3?|py3?)[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_END = re.compile(r"^```[ \t]*$", re.MULTILINE)


class InvalidWorkflow(ValueError):
    """A completion without a well-formed workflow; `reason` is its type, the text one sentence for the policy."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Workflow:
    """A well-formed completion: its reasoning, its code and the code's syntax tree."""

    reasoning: str
    source: str
    tree: ast.Module


def parse_completion(completion: str) -> Workflow:
    """The workflow of `completion`. Raises `InvalidWorkflow`.

    An opening `<think>` may be missing, because some chat templates put it in the prompt. Text around the code block is
    ignored.
    """
    reasoning, closed, answer = completion.replace("\r\n", "\n").partition("</think>")
    if not closed:
        raise InvalidWorkflow("no reasoning", "The reasoning is not closed by </think>.")
    source = _code_block(answer)
    return Workflow(reasoning.strip().removeprefix("<think>").strip(), source, parse_code(source))


def _code_block(answer: str) -> str:
    *_, end = 0, *(mark.end() for mark in _END.finditer(answer))
    blocks = _FENCE.findall(answer, 0, end)  # where no end follows, each beginning would be read to the end
    if not blocks:
        raise InvalidWorkflow("no code block", "There is no closed ```python block after </think>.")
    if len(blocks) > 1:
        raise InvalidWorkflow("several code blocks", f"There are {len(blocks)} ```python blocks instead of one.")
    if len(blocks[0]) > MAX_CODE_CHARS:
        raise InvalidWorkflow("too long", f"The code has {len(blocks[0])} characters; {MAX_CODE_CHARS} are allowed.")
    return blocks[0].rstrip()


def parse_code(source: str) -> ast.Module:
    """The syntax tree of code that defines `async def workflow(problem)`. Raises `InvalidWorkflow` for any other."""
    try:
        tree = parse(source)
    except SyntaxError as error:
        where = f" in line {error.lineno}" if error.lineno else ""
        raise InvalidWorkflow("syntax", f"Syntax error{where}: {error.msg}.") from None
    except ValueError as error:
        raise InvalidWorkflow("syntax", f"The code cannot be parsed: {type(error).__name__}.") from None
    if _depth(tree) > MAX_DEPTH:
        raise InvalidWorkflow("too deep", f"The code is nested more than {MAX_DEPTH} levels deep.")
    definitions = [node for node in tree.body if isinstance(node, ast.AsyncFunctionDef) and node.name == "workflow"]
    if not definitions or not _takes_one(definitions[-1].args):
        raise InvalidWorkflow("no workflow", "The code does not define `async def workflow(problem)`.")
    return tree


def _takes_one(arguments: ast.arguments) -> bool:
    required = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    accepts = len(arguments.posonlyargs) + len(arguments.args) >= 1 or arguments.vararg is not None
    return accepts and required <= 1 and all(default is not None for default in arguments.kw_defaults)


def _depth(tree: ast.AST) -> int:
    """Levels of the tree, counted without recursion: the code may be hostile."""
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth
