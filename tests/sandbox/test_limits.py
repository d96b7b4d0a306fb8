"""Limits are checked where they are made: a wrong one never reaches a jail."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fastgrpo_sandbox import (
    AssertTests,
    CheckTests,
    Limits,
    RemotePool,
    SandboxPool,
    StdioTests,
    Tests,
    UnittestTests,
    refusal,
)

WRONG = {
    "wall_s": (0, -1, 86401, math.nan, math.inf, True, "1", None),
    "cpu_s": (0.0, -0.5, 1e9, math.nan, False, "1"),
    "memory_mb": (0, -1, 256.5, 256.0, (1 << 20) + 1, True, "256", None),
    "processes": (0, 257, 1.5, True),
    "output_bytes": (-1, (4 << 20) + 1, 0.5),
    "tmp_mb": (0, 4097, 16.0),
    "files": (15, 4097, 64.0),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_limit_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^Limits\.{name} is {value!r}: give .*\.$"):
        Limits(**{name: value})
    with pytest.raises(ValueError, match=name):
        msgspec.structs.replace(Limits(), **{name: value})
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({name: value}, Limits)


def test_the_outermost_right_limits():
    assert (
        Limits(wall_s=86400, cpu_s=1e-3, memory_mb=1, processes=1, output_bytes=0, tmp_mb=1, files=16).wall_s == 86400
    )
    Limits(memory_mb=1 << 20, processes=256, output_bytes=4 << 20, tmp_mb=4096, files=4096)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: AssertTests("assert f(1)"), "AssertTests.asserts must be a list of texts, got str"),
        (lambda: AssertTests((b"assert f(1)",)), r"AssertTests.asserts\[0\] must be text \(str\), got bytes"),
        (lambda: AssertTests((), setup=None), "AssertTests.setup must be text"),
        (lambda: CheckTests("", entry_point=None), "CheckTests.entry_point must be text"),
        (lambda: CheckTests("", "f", select="0"), "CheckTests.select must be list or tuple, got str"),
        (lambda: CheckTests("", "f", select=(0, 1.0)), r"CheckTests.select\[1\] must be a whole number .*, got 1.0"),
        (lambda: UnittestTests(3), "UnittestTests.source must be text"),
        (lambda: StdioTests("ab"), r"StdioTests.cases must be a list of \(stdin, stdout\), got str"),
        (lambda: StdioTests((("1", "2"), (1, 2))), r"StdioTests.cases\[1\] must be two texts .*, got \(1, 2\)"),
        (lambda: StdioTests([{"input": "1", "output": "2"}]), r"StdioTests.cases\[0\] must be two texts"),
        (lambda: StdioTests((), compare="fuzzy"), "StdioTests.compare must be 'tokens' or 'exact', got 'fuzzy'"),
        (lambda: SandboxPool(preload="numpy"), "preload must be a list of texts, got str"),
        (lambda: SandboxPool(limits={"wall_s": 1}), "limits must be Limits, got dict"),
        (lambda: SandboxPool(cells=-1), "cells must be a whole number of at least 1, got -1"),
        (lambda: SandboxPool(sessions=0), "sessions must be a whole number of at least 1, got 0"),
        (lambda: RemotePool(["http://a:1"], in_flight=0), "in_flight must be a whole number of at least 1, got 0"),
        (lambda: RemotePool([3]), r"urls\[0\] must be text"),
        (lambda: RemotePool(["a:8080"]), "urls must be addresses as http://HOST:PORT, got 'a:8080'"),
        (lambda: RemotePool(["http://"]), "urls must be addresses"),
    ],
)
def test_tests_and_pools_of_another_form_are_refused_by_name(made: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        made()


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        ({"code": None}, r"code must be text \(str\), got NoneType"),
        ({"stdin": b"a"}, "stdin must be text"),
        ({"files": ["a"]}, "files must be Mapping, got list"),
        ({"files": {"a": 3}}, r"files\['a'\] must be text or bytes, got int"),
        ({"tests": "assert f(1)"}, "tests must be CheckTests or AssertTests or UnittestTests or StdioTests, got str"),
        ({"limits": {"wall_s": 1}}, "limits must be Limits, got dict"),
        ({"order": "first"}, "order must be a whole number of at least 0, got 'first'"),
    ],
)
@pytest.mark.parametrize("pool", [SandboxPool(), RemotePool(["http://a:1"])], ids=["here", "remote"])
def test_a_job_of_another_form_is_refused_by_name(pool: Any, job: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        asyncio.run(pool.run(**{"code": "print(1)", **job}))


@pytest.mark.jail
def test_a_case_has_room_for_what_it_is_to_print(pool: Any) -> None:
    wanted = "\n".join(map(str, range(200)))
    tests, few = StdioTests(cases=(("200", wanted), ("1", "0"))), Limits(output_bytes=100)
    outcome = pool.run("for i in range(int(input())):\n    print(i, ' ')", tests=tests, limits=few)
    assert (outcome.status, outcome.tests) == ("ok", (True, True))
    flood = pool.run("while True: print(0)", tests=tests, limits=few)
    assert (flood.status, flood.tests) == ("output_limit", (False, False))


SUITE = """
import unittest
class T(unittest.TestCase):
    def test_a(self):
        for i in range(40): self.assertEqual(f(i), i + 1)
"""
PRINTED = {
    "asserts": AssertTests(asserts=tuple(f"assert f({i}) == {i + 1}" for i in range(40))),
    "check": CheckTests("def check(candidate):\n    for i in range(40): assert candidate(i) == i + 1\n", "f"),
    "unittest": UnittestTests(SUITE),
}


@pytest.mark.jail
def test_a_small_tmp_does_not_shorten_what_may_be_printed(pool: Any) -> None:
    code, limits = "print('x' * 3_500_000)\ndef f(x): return x", Limits(tmp_mb=1, output_bytes=4 << 20)
    for tests in (None, StdioTests((("", "x" * 3_500_000),)), AssertTests(("assert f(1) == 1",))):
        outcome = pool.run(code, tests=tests, limits=limits)
        assert (outcome.status, len(outcome.stdout)) == ("ok", 3_500_001), outcome.error
    assert pool.run("while True: print('x' * 9999)", limits=limits).status == "output_limit"


@pytest.mark.jail
@pytest.mark.parametrize("form", PRINTED)
def test_what_is_printed_on_the_way_decides_nothing(pool: Any, form: str) -> None:
    code = (
        "import sys\ndef f(x):\n    print('é' * 20_000, file=sys.stderr if x % 2 else sys.stdout)\n    return x + 1\n"
    )
    outcome = pool.run(code, tests=PRINTED[form], limits=Limits(output_bytes=1001))
    assert (outcome.status, outcome.pass_rate) == ("ok", 1.0)
    assert outcome.stdout.startswith("é" * 500)
    assert len(outcome.stdout) <= 501
    for flood in ("while True: print('y' * 99)", "sys.stderr.write('y' * (5 << 20))"):
        outcome = pool.run(f"import sys\ndef f(x):\n    {flood}\n    return x + 1\n", tests=PRINTED[form])
        assert outcome.status == "output_limit"
        assert not any(outcome.tests)
        assert max(len(outcome.stdout), len(outcome.stderr)) == 65536


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        (StdioTests(cases=(("1", "2"),)), ""),
        (AssertTests(asserts=("assert f(1) == 2",)), ""),
        (StdioTests(cases=(("1", "2"), ("1" * (9 << 20), "2"))), "the job has 94371"),
        (StdioTests(cases=(("1", "2" * (5 << 20)),)), "a case is to print 5242880 characters; at most 4194304 are"),
        (StdioTests(cases=(("1", "2" * (5 << 20)),), checker="def checker(*_): return True"), ""),
        (AssertTests(asserts=("assert f(1) ==",)), "the tests cannot be compiled: "),
        (UnittestTests(source="def"), "the tests cannot be counted: "),
        (UnittestTests(source="x = " + "-" * 20_000 + "1"), "the tests cannot be counted: nested too deeply"),
        (CheckTests("def check(f): assert f" + ".f" * 30_000, "f"), "the tests cannot be counted: nested too deeply"),
        (CheckTests("def check(f): assert 1" + "+1" * 700, "f"), "the tests cannot be counted: maximum recursion"),
        (AssertTests(("assert f",), setup="x = " + "lambda: " * 5_000 + "1"), "the tests cannot be compiled: nested"),
    ],
    ids=range(11),
)
def test_tests_that_no_code_can_pass_are_known_before_any_runs(tests: Tests, said: str) -> None:
    assert refusal(tests).startswith(said)
    assert bool(refusal(tests)) == bool(said)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        *(
            ({path: ""}, "is not a relative path inside the jail's /tmp")
            for path in ("", ".", "a/", "a/.", "a/..", "/a")
        ),
        ({"x" * 256: ""}, "is not a relative path"),
        ({"é" * 128: ""}, "is not a relative path"),
        ({"a/b/" * 400 + "c": ""}, "is not a relative path"),
        ({"a\0": ""}, "is not a relative path"),
        ({"\ud800": ""}, "is not valid Unicode"),
        ({"a": "", "a/b": ""}, "file 'a' is to be a folder, too, of 'a/b'"),
        ({"./a//b": "", "a": ""}, "file 'a' is to be a folder, too, of './a//b'"),
        ({"./a": "", "a/./b": ""}, "file 'a' is to be a folder, too, of 'a/./b'"),
        ({"a/b/c/d": "", "a/b": ""}, "file 'a/b' is to be a folder, too"),
        ({"a/b": "", "a.b": "", "a": ""}, "file 'a' is to be a folder, too, of 'a/b'"),
        ({str(number): "" for number in range(4097)}, "the job has 4097 files; the limit is 4096"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_and_no_failure_of_the_code(pool, files, said):
    outcome = pool.run("print(1)", files=files)
    assert outcome.status == "rejected"
    assert said in outcome.error


def test_deep_paths_are_looked_at_in_no_time(pool):
    """8 MB of them took the host half a minute."""
    files = {"a/" * 490 + str(number): "" for number in range(4096)}
    began = time.process_time()
    assert pool.run("print(1)", files=files, limits=Limits(tmp_mb=1)).status != "infrastructure"
    assert time.process_time() - began < 1.5


def test_files_may_lie_in_folders(pool):
    files = {"./a": "1", "b/c/d": b"2", "b/c/e": "3", "f" * 255: "4"}
    code = "import os\nprint(open('a').read(), open('b/c/d').read(), open('b/c/e').read(), open('f' * 255).read())"
    assert pool.run(code, files=files).stdout == "1 2 3 4\n"
