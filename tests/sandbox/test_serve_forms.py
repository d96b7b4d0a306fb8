"""What the server answers in the forms of SandboxFusion, Ai2 and the E2B router: right values for each kind of end."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastgrpo_sandbox.serving.e2b import showing_value
from tests.sandbox.server import Server, running_server

pytestmark = pytest.mark.jail
DOUBLE = "def double(x):\n    return 2 * x"
FENCED = f"Here it is:\n\n```python\n{DOUBLE}\n```\nDone."


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--cells", "2") as server:
        yield server


# ---- SandboxFusion ----


def run_code(server: Server, code: str, **more: object) -> dict:
    answer = server.post("/run_code", {"code": code, "language": "python", **more})
    assert answer.status == 200, answer
    return answer.body


@pytest.mark.parametrize(
    ("code", "status", "run_status", "return_code", "stream", "said"),
    [
        ("print('out')", "Success", "Finished", 0, "stdout", "out\n"),
        ("import sys; sys.exit(0)", "Success", "Finished", 0, "stdout", ""),
        ("import sys; sys.exit(3)", "Failed", "Finished", 3, "stderr", ""),
        ("import sys; sys.exit('no\\nway')", "Failed", "Finished", 1, "stderr", "no\nway\n"),
        ("try: exit(3)\nfinally: 1 / 0", "Failed", "Finished", 1, "stderr", "ZeroDivisionError"),
        ("1 / 0", "Failed", "Finished", 1, "stderr", "ZeroDivisionError"),
        ("def", "Failed", "Finished", 1, "stderr", "SyntaxError"),
        ("while True: pass", "Failed", "TimeLimitExceeded", None, "stdout", ""),
        ("x = b'.' * (400 << 20)", "Failed", "Finished", -9, "stdout", ""),
    ],
)
def test_run_code_tells_how_it_ended(server, code, status, run_status, return_code, stream, said):
    answer = run_code(server, code, run_timeout=1, memory_limit_MB=128)
    assert (answer["status"], answer["compile_result"], answer["message"]) == (status, None, "")
    result = answer["run_result"]
    assert (result["status"], result["return_code"]) == (run_status, return_code)
    assert said in result[stream]
    assert "sys.exit" not in result["stderr"]
    assert result["execution_time"] >= 0


def test_run_code_has_stdin_and_files(server):
    files = {"data/words.txt": base64.b64encode(b"one two").decode(), "helper.py": base64.b64encode(b"n = 3").decode()}
    code = "import helper\nprint(open('data/words.txt').read().split(), helper.n, input())"
    answer = run_code(server, code, files={**files, "absent": None}, stdin="in", compile_timeout=10, fetch_files=[])
    assert answer["run_result"]["stdout"] == "['one', 'two'] 3 in\n"
    assert run_code(server, "print(1)", stdin=None)["run_result"]["stdout"] == "1\n"


def submitted(server: Server, completion: str, row: object, **config: object) -> dict:
    body = {"dataset": "any", "id": 7, "completion": completion, "config": {"provided_data": row, **config}}
    answer = server.post("/submit", body)
    assert answer.status == 200, answer
    return answer.body


HUMAN_EVAL = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 4\n"


@pytest.mark.parametrize(
    ("test", "labels", "passed"),
    [
        (["assert double(1) == 2", "assert double(2) == 5"], {}, [True, False]),
        (json.dumps(["assert double(1) == 2"]), json.dumps({"test_setup_code": ""}), [True]),
        (["assert double(one) == 2"], {"test_setup_code": "one = 1"}, [True]),
        (HUMAN_EVAL, {"entry_point": "double"}, [True, True]),
        ({"code": HUMAN_EVAL + "check(double)"}, {}, [True]),
        ({"code": "if double(1) != 2: raise SystemExit(1)"}, {}, [True]),
        ({"code": "if double(1) == 2: raise SystemExit(1)"}, {}, [False]),
        ({"code": "import sys\nsys.exit(0 if double(1) == 3 else 1)"}, {}, [False]),
        ({"code": "assert double(1) == int(open('two').read())", "asset": {"two": "Mg=="}}, {}, [False]),
    ],
)
def test_submit_judges_by_the_row(server, test, labels, passed):
    """The last row's file is the solution's, which the judge never reads."""
    answer = submitted(server, FENCED, {"id": 7, "content": "Double it.", "test": test, "labels": labels})
    assert answer["extracted_code"] == DOUBLE
    assert ([case["passed"] for case in answer["tests"]], answer["accepted"]) == (passed, all(passed))
    assert answer["id"] == 7


def test_submit_judges_calls_as_their_sets_own_graders_do(server):
    code = "```python\nclass Solution:\n    def f(self, xs: List[int]):\n        return sum(xs)\n```"
    test = json.dumps({"fn_name": "f", "inputs": ["[1, 2]"], "outputs": ["3"]})
    assert submitted(server, code, {"id": 7, "content": "", "test": test, "labels": {}})["accepted"]


def test_submit_compares_input_and_output(server):
    rows = [
        {"id": 6, "test": ["assert False"]},
        {
            "id": "7",
            "test": [
                {"input": {"stdin": "4"}, "output": {"stdout": "8\n"}},
                {"input": {"stdin": "1"}, "output": {"stdout": "3"}},
            ],
        },
    ]
    answer = submitted(server, "```py\nprint(2 * int(input()))\n```", rows)
    assert [case["passed"] for case in answer["tests"]] == [True, False]
    assert [case["exec_info"]["status"] for case in answer["tests"]] == ["Success", "Failed"]


def test_a_solution_cannot_end_its_way_to_acceptance(server):
    """By exit status alone this is a pass."""
    row = {"id": 7, "test": {"code": "assert double(1) == 2"}}
    assert submitted(server, "```python\nimport os\nos._exit(0)\n```", row)["accepted"] is False


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "provided_data"),
        ({"provided_data": []}, "provided_data"),
        ({"provided_data": {"id": 7}}, "test"),
        ({"provided_data": {"id": 7, "test": ["assert ("]}}, "test"),
        ({"provided_data": {"id": 7, "test": ["assert 1"], "labels": "3"}}, "labels"),
        ({"provided_data": {"id": 7, "test": [{"input": 1}]}}, "test"),
        ({"provided_data": {"id": 7, "test": {"inputs": [[1]], "outputs": [[1]], "fn_name": 3}}}, "fn_name 3 is not"),
        ({"language": "cpp"}, "python"),
        ({"custom_extract_logic": "x"}, "custom_extract_logic"),
    ],
)
def test_a_submission_without_readable_tests_is_refused(server, config, said):
    answer = server.post("/submit", {"dataset": "humaneval", "id": 7, "completion": FENCED, "config": config})
    assert answer.status == 422
    assert said in answer.body["error"]


# ---- Ai2 ----


@pytest.mark.parametrize(
    ("program", "tests", "results"),
    [
        (DOUBLE, ["assert double(1) == 2", "assert double(1) == 3", "assert double('a') == 'aa'"], [1, 0, 1]),
        (DOUBLE, ["assert double(1) == 2", "while True: assert double(1) == 2"], [1, 0]),
        (
            "def double(x):\n    while x > 1: pass\n    return 2 * x",
            ["assert double(1) == 2", "assert double(2) == 4"],
            [1, 0],
        ),
        (DOUBLE, ["assert (", "assert double(1) == 2"], [0, 1]),
        (DOUBLE, ["double(1)", "double()"], [1, 0]),
        (DOUBLE, json.dumps(["assert double(1) == 2"]), [1]),
        ("syntax error", ["assert double(1) == 2"], [0]),
        ("import os; os._exit(0)", ["assert double(1) == 2"], [0]),
        (DOUBLE, [], []),
    ],
)
def test_test_program_judges_each_test(server, program, tests, results):
    answer = server.post("/test_program", {"program": program, "tests": tests, "max_execution_time": 0.5})
    assert answer.status == 200, answer
    assert answer.body["results"] == results
    assert [runtime >= 0 for runtime in answer.body["runtimes"]] == [bool(result) for result in results]


def test_test_program_stdio(server):
    program = "n = int(input())\nwhile n == 3: pass\nprint(n + 1)"
    tests = [{"input": "1\n", "output": "2\n"}, {"input": "100", "output": "101"}, {"input": "2", "output": "2"}]
    tests += [{"input": "3", "output": "4"}]
    answer = server.post("/test_program_stdio", {"program": program, "tests": tests, "max_execution_time": 0.5})
    assert answer.body["results"] == [1, 1, 0, 0]
    assert answer.body["runtimes"][2:] == [-1.0, -1.0]


@pytest.mark.parametrize("path", ["/test_program", "/test_program_stdio"])
@pytest.mark.parametrize("tests", ["eJxLYQAAAGsAKA==", 3, [3], [["a", "b"]]])
def test_tests_of_another_kind_are_refused(server, path, tests):
    """Among them a pickle, which would run code in the server."""
    answer = server.post(path, {"program": "", "tests": tests})
    assert (answer.status, "tests must be" in answer.body["error"]) == (422, True)


# ---- the E2B router ----


def batch(server: Server, *scripts: str, **more: object) -> list[dict]:
    answer = server.post("/execute_batch", {"scripts": scripts, "timeout": 2, "request_timeout": 2, **more})
    assert answer.status == 200, answer
    return answer.body


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("0.25", "0.25"),
        ("x = 3\nprint('a')\nx * 2  # six", "6"),
        ("import math; math.floor(2.5)", "2"),
        ("(1,\n 2)", "(1, 2)"),
        ("'\u00e9' + 'a'", "'\u00e9a'"),
        ("def f():\n    return 0.5\nf()\n", "0.5"),
        ("None", None),
        ("x = 3", None),
        ("", None),
        ("if True:\n    3", None),
    ],
)
def test_the_last_expression_is_the_main_result(server, script, text):
    (result,) = batch(server, script)
    assert result["exception_str"] is None
    shown = [part["text"] for part in result["execution"]["results"] if part["is_main_result"]]
    assert shown == ([] if text is None else [text])
    assert result["execution"]["error"] is None
    assert result["execution"]["logs"]["stdout"] == (["a\n"] if "print" in script else [])


def test_a_batch_has_each_end_of_its_own(server):
    raises, late, broken = batch(server, "print('a')\n\n1 / 0", "while True: pass", "def", languages=["python"] * 3)
    error = raises["execution"]["error"]
    assert (error["name"], error["value"]) == ("ZeroDivisionError", "division by zero")
    assert "line 3" in error["traceback"]
    assert raises["execution"]["logs"]["stdout"] == ["a\n"]
    assert (late["execution"], late["exception_str"]) == (None, "the script ran out of time")
    assert broken["execution"]["error"]["name"] == "SyntaxError"


def test_a_batch_in_another_language_is_refused(server):
    answer = server.post("/execute_batch", {"scripts": ["1"], "languages": ["javascript"], "timeout": 1})
    assert (answer.status, "python" in answer.body["error"]) == (422, True)
    assert server.post("/execute_batch", {"scripts": ["1"], "languages": [], "timeout": 1}).status == 200
    assert server.post("/execute_batch", {"scripts": ["1"], "languages": ["python"] * 2}).status == 422


@given(
    st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=40),
    st.sampled_from(["1 + 1", "f(\n'\u20ac')", "(x for x in y)", "a; b"]),
    st.booleans(),
)
@example("", "1", False)
def test_showing_a_value_keeps_every_line_before_it(before, last, comment):
    script = "".join(f"# {line}\n" for line in before.split("\n")) + last + ("  # end" if comment else "")
    shown = showing_value(script, "M")
    compile(shown, "solution.py", "exec")
    assert shown.encode().splitlines()[: before.count("\n")] == script.encode().splitlines()[: before.count("\n")]


# ---- whatever is sent ----

BODIES: dict[str, dict] = {
    "/run": {"code": "print(1)", "stdin": "", "files": {}, "tests": None, "limits": {"wall_s": 1}},
    "/run_code": {"code": "1", "language": "python", "run_timeout": 1, "memory_limit_MB": 64, "stdin": "", "files": {}},
    "/submit": {
        "dataset": "d",
        "id": 1,
        "completion": FENCED,
        "config": {"provided_data": {"id": 1, "test": ["assert double(1) == 2"]}},
    },
    "/test_program": {"program": DOUBLE, "tests": ["assert double(1) == 2"], "max_execution_time": 1},
    "/test_program_stdio": {"program": "1", "tests": [{"input": "1", "output": ""}], "max_execution_time": 1},
    "/execute_batch": {"scripts": ["1"], "languages": ["python"], "language": "python", "timeout": 1},
}
ODD = (None, -1, 1e308, 10**30, True, "\0", "\ud800", [[]], {"a": 1}, "[" * 5000, [{"input": None, "output": {}}])


@pytest.mark.parametrize("path", BODIES)
def test_odd_values_and_missing_fields_never_fail_the_server(server, path):
    whole = BODIES[path]
    bodies = [{**whole, name: value} for name in whole for value in ODD]
    bodies += [{k: v for k, v in whole.items() if k != name} for name in whole]
    for body in [*bodies, *ODD, b"", b"{", b"\xff", b'{"a": NaN}', b"[" * 5000]:
        answer = server.post(path, body)
        assert answer.status in (200, 422), (body, answer)
        if answer.status == 422:
            assert isinstance(answer.body["error"], str), body
            assert "\n" not in answer.body["error"], body
