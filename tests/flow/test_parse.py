"""Completions into workflows, hostile ones included."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastgrpo.flow.parse import MAX_CODE_CHARS, InvalidWorkflow, parse_completion

CODE = "async def workflow(problem):\n    return await generate(problem)"


def completion(code: str, reasoning: str = "Draft once.") -> str:
    return f"<think>{reasoning}</think>\n```python\n{code}\n```"


def test_a_well_formed_completion() -> None:
    workflow = parse_completion(completion(CODE))
    assert workflow.reasoning == "Draft once."
    assert workflow.source == CODE


def test_the_chat_template_may_have_opened_the_reasoning() -> None:
    assert parse_completion(completion(CODE).removeprefix("<think>")).reasoning == "Draft once."


def test_a_code_block_in_the_reasoning_is_reasoning() -> None:
    assert parse_completion(completion(CODE, reasoning="```python\nx\n```")).source == CODE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no reasoning"),
        (f"```python\n{CODE}\n```", "no reasoning"),
        ("<think>a</think>", "no code block"),
        (f"<think>a</think>```python\n{CODE}", "no code block"),
        (f"<think>a</think>\n```\n{CODE}\n```", "no code block"),
        (completion(CODE) + f"\n```python\n{CODE}\n```", "several code blocks"),
        (completion(CODE + " " + "#" * MAX_CODE_CHARS), "too long"),
        (completion("async def workflow(problem:"), "syntax"),
        (completion("x = '\0'"), "syntax"),
        (completion("(" * 500 + ")" * 500), "syntax"),
        (completion(CODE + "\nx = " + "-" * 3000 + "1"), "too deep"),
        (completion(CODE + "\nx = " + "1 + " * 1500 + "1"), "too deep"),
        (completion("x = 1"), "no workflow"),
        (completion("def workflow(problem):\n    return ''"), "no workflow"),
        (completion("async def workflow():\n    return ''"), "no workflow"),
        (completion("async def workflow(a, b):\n    return ''"), "no workflow"),
        (completion("async def workflow(a, *, b):\n    return ''"), "no workflow"),
        (completion("class A:\n    async def workflow(self):\n        return ''"), "no workflow"),
    ],
)
def test_reasons_of_invalidity(text: str, reason: str) -> None:
    with pytest.raises(InvalidWorkflow) as caught:
        parse_completion(text)
    assert caught.value.reason in {reason, "syntax"} if reason == "too deep" else caught.value.reason == reason
    assert str(caught.value).endswith(".")


def test_code_that_the_parser_does_not_read_has_no_line_of_its_fault() -> None:
    with pytest.raises(InvalidWorkflow) as caught:
        parse_completion(completion("-" * 7_000 + "1"))
    assert str(caught.value) == "Syntax error: nested too deeply."


@settings(deadline=None)
@given(st.text(max_size=300))
@example("</think>\n```python\n" + "a." * 3000 + "b\n```")
@example("</think>\n```python\n" + "[" * 90 + "]" * 90 + "\n```")
@example("</think>\n```python\n" + "lambda: " * 900 + "0\n```")
def test_any_text_is_a_workflow_or_an_invalid_one(text: str) -> None:
    for candidate in (text, completion(text), completion(f"{CODE}\n{text}")):
        try:
            workflow = parse_completion(candidate)
        except InvalidWorkflow:
            continue
        assert "workflow" in workflow.source


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="`<\r"), max_size=100))
def test_reasoning_comes_back(reasoning: str) -> None:
    assert parse_completion(completion(CODE, reasoning)).reasoning == reasoning.strip()
