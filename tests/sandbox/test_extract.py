"""Programs out of chat answers: what models write around them, and that nothing else gets in."""

from __future__ import annotations

import ast
import gc

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastgrpo_sandbox import AssertTests, extract, extract_code
from fastgrpo_sandbox.columns import read_tests
from fastgrpo_sandbox.extract import FIRST_LINE, defined_names
from fastgrpo_sandbox.guest.syntax import parse
from tests.helpers.work import thread_seconds

CODE = "def f(x):\n    return x + 1"
DRAFT = "def f(x):\n    return x"


def fenced(code: str, language: str = "python", fence: str = "```") -> str:
    return f"{fence}{language}\n{code}\n{fence}"


@pytest.mark.parametrize(
    "language", ["python", "Python", "PYTHON", "python3", "Python3", "py", "py3", "python3.11", "{.python}", ""]
)
@pytest.mark.parametrize("fence", ["```", "````", "~~~"])
def test_a_fence_in_any_spelling(language, fence):
    assert extract_code(f"Sure!\n\n{fenced(CODE, language, fence)}\n\nIt adds one.") == CODE


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (CODE, CODE),
        ("    return x + 1\n", "    return x + 1"),
        ("", ""),
        (f"First try:\n{fenced(DRAFT)}\nBetter:\n{fenced(CODE)}", CODE),
        (f"{fenced(CODE)}\nUsage:\n{fenced('print(f(2))')}", CODE),
        (f"{fenced(CODE)}\nUsage:\n{fenced('from solution import f' + chr(10) + 'assert f(2) == 3')}", CODE),
        (f"{fenced(CODE)}\nUsage:\n{fenced('>>> f(2)' + chr(10) + '3')}", CODE),
        (f"{fenced(CODE, '')}\nOutput:\n{fenced('3', '')}", CODE),
        (f"{fenced(CODE, '')}\nOutput:\n{fenced('Hello, world!', '')}", CODE),
        (f"{fenced(CODE)}\nRun it:\n{fenced('python solution.py', 'bash')}\n{fenced('3', 'text')}", CODE),
        (f"{fenced('pip install x', 'sh')}\n{fenced(CODE, '')}", CODE),
        (f"{fenced('print(1)', 'bash')}", ""),
        ("1. Do it:\n\n   ```python\n   def f(x):\n       return x + 1\n   ```\n", CODE),
        (f"```python\n{CODE}\n```<|im_end|>", CODE),
        (f"```python\n{CODE}", CODE),
        (f"```python\n{DRAFT}\n```\nWait.\n```python\ndef f(x):\n    ret", DRAFT),
        (f"```python\n{DRAFT}\nHm, no:\n```python\n{CODE}\n```", CODE),
        (f"```python\r\n{CODE}\r\n```\r\n", CODE),
        (fenced("x = '\u2028\x0c\x1c'"), "x = '\u2028\x0c\x1c'"),
        (fenced("n = int(input())\nprint(n)"), "n = int(input())\nprint(n)"),
        (f"{fenced('def idea(): pass')}\n{fenced('print(int(input()) + 1)')}", "print(int(input()) + 1)"),
        (f"{fenced(DRAFT)}\n{fenced('def f(x)' + chr(10) + '    return x')}", "def f(x)\n    return x"),
        (
            fenced('def f(x):\n    """Like `x` or ``y``."""\n    return x'),
            'def f(x):\n    """Like `x` or ``y``."""\n    return x',
        ),
    ],
)
def test_the_program_of_an_answer(answer, code):
    assert extract_code(answer) == code


def test_helpers_of_earlier_blocks_come_first():
    helper, main, extra = "def one():\n    return 1", "def f(x):\n    return x + one()", "class Unused: ..."
    answer = f"{fenced(extra)}\n{fenced(helper)}\nand then\n{fenced(main)}\nTry\n{fenced('f(3)')}"
    assert extract_code(answer) == f"{helper}\n\n{main}"


@pytest.mark.parametrize("thought", ["", "Hm.", fenced(DRAFT), f"```python\n{DRAFT}", "</think> is a tag.\n"])
@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_what_is_thought_is_no_answer(thought, opening):
    """Templates that open the thought themselves leave its end alone in the answer."""
    assert extract_code(f"{opening}{thought}\n</think>\n\n{fenced(CODE)}") == CODE


@pytest.mark.parametrize("thought", [fenced(CODE), CODE, ""])
def test_a_thought_without_an_end_has_no_program(thought):
    assert extract_code(f" <think>{thought}") == ""


LINE = st.text(st.characters(exclude_characters="`~\0", exclude_categories=["Cs", "Zl", "Zp", "Cc"]), max_size=30)
PROSE = st.lists(LINE, max_size=4).map("\n".join)


@given(PROSE, PROSE, PROSE, st.sampled_from(["python", "Python", "py", ""]))
def test_prose_around_a_block_never_matters(before, between, after, language):
    assume("</think>" not in before + between + after)
    assume(not before.lstrip().startswith("<think>"))
    block = fenced(CODE, language)
    assert extract_code(f"{before}\n{block}\n{after}") == CODE
    assert extract_code(f"{before}\n{fenced(DRAFT, language)}\n{between}\n{block}\n{after}") == CODE


@given(st.text(max_size=200))
def test_any_text_has_an_answer(text):
    assert isinstance(extract_code(text), str)
    assert isinstance(extract_code(fenced(text)), str)


@given(PROSE)
def test_an_answer_without_a_fence_is_itself(text):
    assume(not FIRST_LINE.search(text))
    assume("</think>" not in text)
    assume(not text.lstrip().startswith("<think>"))
    unbreakable, blank = "\u00a0", " "  # which becomes the other where that makes it Python
    assert extract_code(text).replace(unbreakable, blank) == text.strip("\n").replace(unbreakable, blank)


def test_defined_names():
    assert defined_names("def f(): ...\nclass A:\n    def g(self): ...\nasync def h(): ...\nx = 1") == {"f", "A", "h"}
    assert defined_names("def f(:") == set()


def test_a_large_answer_takes_no_time():
    assert extract_code(f"{'`' * 100_000}\n" + "word " * 200_000 + f"\n{'`' * 100_000}") == "word " * 200_000
    assert extract_code("```\n" * 20_000) is not None
    assert extract_code("(" * 100_000) == "(" * 100_000


def test_the_one_block_of_an_answer_is_not_parsed(monkeypatch):
    """Two megabytes of Python take seconds to parse."""
    monkeypatch.setattr(extract, "parse", lambda source: pytest.fail("parsed"))
    assert extract_code(f"Here:\n```python\n{ADD}\n```\nIt adds.", "add") == ADD
    assert isinstance(read_tests({"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}, ADD), AssertTests)


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_is_not_collected_in_the_middle_of_a_tree(monkeypatch, was_on):
    seen = []
    monkeypatch.setattr(ast, "parse", lambda source: seen.append(gc.isenabled()) or 1 / len(source))
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError):
            parse("")
        assert (parse("x"), gc.isenabled(), seen) == (1.0, was_on, [False, False])
    finally:
        gc.enable()


ADD = "def add(a, b):\n    return a + b"
NESTED = 'def add(a, b):\n    """Adds.\n\n```\nadd(1, 2)\n```\n    """\n    return a + b'


@pytest.mark.parametrize(
    "reply",
    [
        ADD,
        f"\n\n{ADD}\n\n",
        f"```python\n{ADD}\n```",
        f"Sure:\n```Python\n{ADD}\n```\nThis adds two numbers.",
        f"```python3\n{ADD}\n```\nDone.",
        f"```PY3\n{ADD}\n```",
        f"``` python \n{ADD}\n```",
        f"```{{.python}}\n{ADD}\n```",
        f"~~~python\n{ADD}\n~~~",
        f"````python\n{ADD}\n````",
        f'```python title="add.py"\n{ADD}\n```\nDone.',
        "1. Code:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n",
        "> ```python\n> def add(a, b):\n>     return a + b\n> ```\n",
        f"```python\n{ADD}\n```\nExample usage:\n```python\nprint(add(1, 2))\n```",
        f"```python\n{ADD}\n```\nFor example:\n```python\ntotal = add(1, 2)\nprint(total)\n```",
        f"```python\n{ADD}\n```\nOutput:\n```\n3\n```",
        f"```\n{ADD}\n```\nOutput:\n```\n3\n```",
        f"```python\n{ADD}\n```\nRun it:\n```bash\npython add.py\n```",
        f"```python\n{ADD}\n```\nTests:\n```python\nassert add(1, 2) == 3\n```",
        f"```python\n{ADD}\n```\nTests:\n```python\ndef test_add():\n    assert add(1, 2) == 3\n```",
        f"```bash\npip install x\n```\n```python\n{ADD}\n```",
        f"```python\ndef add(a, b):\n    return 0\n```\nThat is wrong. Corrected:\n```python\n{ADD}\n```",
        f"```python\n{ADD}",
        f"Here is the code:\n\n{ADD}\n",
        f"Here is the code:\n\n{ADD}\n\nThis function adds two numbers, as was asked.",
        f"<think>maybe\n```python\ndef add(a, b): return 0\n```\n</think>\n```python\n{ADD}\n```",
        f"perhaps\n```python\nx\n```\n</think>\n```python\n{ADD}\n```",
        f"<think>easy</think>\n{ADD}",
        f"```python\n{ADD}\n```".replace("\n", "\r\n"),
        f"```python\n\ufeff{ADD}\n```",
        f"```python\n{ADD}\n```".replace("    ", "\u00a0" * 4),
    ],
)
def test_the_program_whatever_surrounds_it(reply):
    assert extract_code(reply, "add") == ADD


def test_a_fence_in_a_docstring_does_not_end_the_program():
    assert extract_code(f"```python\n{NESTED}\n```\nDone.", "add") == NESTED


@pytest.mark.parametrize(
    "reply", ["", "<think>draft:\n```python\ndef add(a, b): return 0\n```\nwait", "```python\n```"]
)
def test_no_program(reply):
    assert "add" not in extract_code(reply, "add")


def test_blanks_that_are_part_of_a_text_stay():
    assert extract_code("```python\nx = 'a\u00a0b'\n```") == "x = 'a\u00a0b'"


def test_a_lone_surrogate_is_replaced():
    assert extract_code(f"```python\n# \ud83d\n{ADD}\n```") == f"# ?\n{ADD}"


def test_a_long_reply_is_not_parsed_from_each_of_its_lines(monkeypatch):
    """64 KiB of decorators took 17 times as long as to parse them."""
    reply, letters = "@a\n" * 21_845, []
    monkeypatch.setattr(extract, "parse", lambda text: letters.append(len(text)) or parse(text))
    assert extract_code(reply) == reply.strip()
    assert sum(letters) < 7 * len(reply)


@pytest.mark.parametrize(
    "reply",
    [
        *("```\nx\n```\n" * 5_000, "~~~python\n" * 5_000, "x = (\n" * 20_000, "def f():\n" * 5_000),
        f"```python{'.' * 100_000}x\npass\n```",
        f"```python\n{ADD}\n```\n" + "```python\nadd(1, 2)\n```\n" * 1_500,
    ],
)
def test_a_long_reply_is_read_in_no_time(reply):
    assert thread_seconds(lambda: extract_code(reply, "f")) < 4
