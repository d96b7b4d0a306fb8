"""Tool calls in what a policy wrote, and what is none."""

from __future__ import annotations

import pytest

from fastgrpo.rollouts.tool_calls import Call, split_calls
from tests.helpers.work import thread_seconds

ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (ONE, "", ['{"a":1}']),
        (f"<think>so</think>\nI add.\n{ONE}\n{ONE}", "<think>so</think>\nI add.", ['{"a":1}'] * 2),
        ('{"name": "add", "parameters": {}}', "", ["{}"]),
    ],
)
def test_calls_are_read(text: str, said: str, calls: list[str]) -> None:
    assert split_calls(text, ["add"]) == (said, [Call("add", arguments) for arguments in calls])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        ONE.replace("add", "other"),
        ONE.replace("}}", "}"),
        ONE.replace('{"a": 1}', "[1]"),
        ONE.removesuffix("</tool_call>"),
        f"{ONE} <tool_call>nothing</tool_call>",
        '{"name": ["add"], "arguments": {}}',
        "[" * 5000,
        "<tool_call>\ud800</tool_call>",
    ],
)
def test_what_is_no_call_stays_as_written(text: str) -> None:
    assert split_calls(text, ["add"]) == (text, [])


@pytest.mark.parametrize("text", ["<tool_call>" * 30_000, "</tool_call>" + "<tool_call>" * 30_000])
def test_tags_that_are_never_closed_are_read_in_no_time(text: str) -> None:
    assert split_calls(text, ["add"]) == (text, [])
    assert thread_seconds(lambda: split_calls(text, ["add"])) < 2  # was the square of its length: a minute
