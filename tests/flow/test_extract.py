"""Replies in the forms that models give them: the program in them, the choice, the verdict."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastgrpo.flow.extract import extract_code, program_after, without_reasoning
from fastgrpo.flow.messages import extract_choice, extract_verdict

CODE = "def add(a, b):\n    return a + b"
NESTED = 'def add(a, b):\n    """Adds.\n\n```\nadd(1, 2)\n```\n    """\n    return a + b'


@pytest.mark.parametrize(
    "reply",
    [
        CODE,
        f"\n\n{CODE}\n\n",
        f"```python\n{CODE}\n```",
        f"Sure:\n```Python\n{CODE}\n```\nThis adds two numbers.",
        f"```python3\n{CODE}\n```\nDone.",
        f"```PY3\n{CODE}\n```",
        f"``` python \n{CODE}\n```",
        f"```{{.python}}\n{CODE}\n```",
        f"~~~python\n{CODE}\n~~~",
        f"````python\n{CODE}\n````",
        f'```python title="add.py"\n{CODE}\n```\nDone.',
        "1. Code:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n",
        "> ```python\n> def add(a, b):\n>     return a + b\n> ```\n",
        f"```python\n{CODE}\n```\nExample usage:\n```python\nprint(add(1, 2))\n```",
        f"```python\n{CODE}\n```\nFor example:\n```python\ntotal = add(1, 2)\nprint(total)\n```",
        f"```python\n{CODE}\n```\nOutput:\n```\n3\n```",
        f"```\n{CODE}\n```\nOutput:\n```\n3\n```",
        f"```python\n{CODE}\n```\nRun it:\n```bash\npython add.py\n```",
        f"```python\n{CODE}\n```\nTests:\n```python\nassert add(1, 2) == 3\n```",
        f"```python\n{CODE}\n```\nTests:\n```python\ndef test_add():\n    assert add(1, 2) == 3\n```",
        f"```bash\npip install x\n```\n```python\n{CODE}\n```",
        f"```python\ndef add(a, b):\n    return 0\n```\nThat is wrong. Corrected:\n```python\n{CODE}\n```",
        f"```python\n{CODE}",
        f"Here is the code:\n\n{CODE}\n",
        f"Here is the code:\n\n{CODE}\n\nThis function adds two numbers, as was asked.",
        f"<think>maybe\n```python\ndef add(a, b): return 0\n```\n</think>\n```python\n{CODE}\n```",
        f"perhaps\n```python\nx\n```\n</think>\n```python\n{CODE}\n```",
        f"<think>easy</think>\n{CODE}",
        f"```python\n{CODE}\n```".replace("\n", "\r\n"),
        f"```python\n\ufeff{CODE}\n```",
        f"```python\n{CODE}\n```".replace("    ", "\u00a0" * 4),
    ],
)
def test_the_program_whatever_surrounds_it(reply: str) -> None:
    assert extract_code(reply, "add") == CODE + "\n"


def test_a_fence_in_a_docstring_does_not_end_the_program() -> None:
    assert extract_code(f"```python\n{NESTED}\n```\nDone.", "add") == NESTED + "\n"


@pytest.mark.parametrize(
    "reply", ["", "<think>draft:\n```python\ndef add(a, b): return 0\n```\nwait", "```python\n```"]
)
def test_no_program(reply: str) -> None:
    assert "add" not in extract_code(reply, "add")


@pytest.mark.parametrize(
    "code",
    [
        "from __future__ import annotations\nx: Later = 1",
        '"""Text."""\nfrom __future__ import annotations\nx: Later = 1',
        "from __future__ import (\n    annotations,\n    division,\n)\nx: Later = 1",
        "x = 1",
    ],
)
def test_a_program_after_its_preamble(code: str) -> None:
    names: dict[str, object] = {}
    exec(program_after("import math", code), names)
    assert names["x"] == 1
    assert "math" in names
    assert program_after("", code) == code


def test_blanks_that_are_part_of_a_text_stay() -> None:
    assert extract_code("```python\nx = 'a\u00a0b'\n```") == "x = 'a\u00a0b'\n"


def test_a_lone_surrogate_is_replaced() -> None:
    assert extract_code(f"```python\n# \ud83d\n{CODE}\n```") == f"# ?\n{CODE}\n"


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["```", "~~~", "python", "\n", "    ", CODE, "text ", "<think>", "</think>"])).map("".join)
)
@example("~~~\n```python\n~~~\n```")
def test_any_reply_gives_a_text(reply: str) -> None:
    assert extract_code(reply, "add").endswith("\n")
    assert without_reasoning(reply) in reply


@pytest.mark.parametrize(
    "reply", ["```\nx\n```\n" * 5_000, "~~~python\n" * 5_000, "x = (\n" * 20_000, "def f():\n" * 5_000, "` " * 50_000]
)
def test_a_long_reply_is_read_in_no_time(reply: str) -> None:
    began = time.process_time()
    extract_code(reply, "f")
    extract_choice(reply, 3)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("**B**", 1),
        ("B.", 1),
        ("Program B", 1),
        ("Answer: B", 1),
        ("The answer is B.", 1),
        ("The answer is **B**.", 1),
        ("Answer: Program B", 1),
        ("I choose B because A program like C fails.", 1),
        ("B is the best: A simple loop is enough.", 1),
        ("B\n\nA is wrong on empty input.", 1),
        ("Most programs share the behaviour of B. A good choice.", 1),
        ("A and C loop for ever. My choice is B", 1),
        ("Program A fails on [] and program C raises. The best one is program B.", 1),
        ("A", 0),
        ("A is right.", 0),
        ("A and C agree", 2),
        ("C. I think so.", 2),
        ("<think>A or B? A. </think>C", 2),
        ("Option (C)", 2),
        ("The programs agree. A tie.", 0),
    ],
)
def test_the_letter_that_is_meant(reply: str, chosen: int) -> None:
    assert extract_choice(reply, 3) == chosen


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: correct", (True, "")),
        ("**Verdict:** incorrect\nIt loops.", (False, "It loops.")),
        ("Verdict: the code is correct.", (True, "")),
        ("<think>Verdict: incorrect</think>Verdict: correct", (True, "")),
        ("Verdict: not correct", (False, "Verdict: not correct")),
    ],
)
def test_the_verdict_that_is_meant(reply: str, verdict: tuple[bool, str]) -> None:
    assert extract_verdict(reply) == verdict
