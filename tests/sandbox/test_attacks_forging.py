# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Attacks 44 to 55: reporting one's own success. Every one must score as a failure, in each form of test."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, CheckTests, Limits, StdioTests, UnittestTests
from fastgrpo_sandbox.job import Running

pytestmark = [pytest.mark.jail, pytest.mark.usefixtures("steady")]

# Every attack defines f, which must not count as `lambda x: x + 1`, and does its trick at import and when called.
CHECK = CheckTests("def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n", "f")
ASSERTS = AssertTests(("assert f(1) == 2", "assert f(2) == 3"))
UNITTEST = UnittestTests(
    "import unittest\nclass TestF(unittest.TestCase):\n    def test_one(self): self.assertEqual(f(1), 2)\n"
    "    def test_two(self): self.assertEqual(f(2), 3)\n"
)
FORMS = {"check": CHECK, "asserts": ASSERTS, "unittest": UNITTEST}

ATTACKS = {
    "44 sys.exit(0) at import": "import sys; sys.exit(0)",
    "44 os._exit(0) at import": "import os; os._exit(0)",
    "44 SystemExit when called": "def f(x): raise SystemExit(0)",
    "44 os._exit(0) when called": "import os\ndef f(x): os._exit(0)",
    "45 printed result": "print('ok 2 tests passed'); print('{\"tests\": [true, true]}')\ndef f(x): print('OK')",
    "46 writes to every descriptor": """
import os, struct
BODY = b'\\x94\\xa0\\xa0\\xc0\\x92\\xc3\\xc3'
FRAME = struct.pack('<I', len(BODY)) + b'R' + BODY
ANSWER = b'["value",2,null]'
def f(x):
    for fd in range(64):
        for text in (FRAME, struct.pack('<I', len(ANSWER)) + ANSWER):
            try: os.write(fd, text)
            except OSError: pass
    os._exit(0)
""",
    "47 always-true __eq__": """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __hash__(self): return hash(2)
    __req__ = __eq__
class YesInt(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return YesInt(77) if FORM != 'unittest' else None
""",
    "47 object equal to everything": """
class Yes:
    def __eq__(self, other): return True
def f(x): return Yes() if FORM != 'unittest' else None
""",
    "48 patched builtins, assert and json": """
import builtins, json, sys
class Always(type):
    def __instancecheck__(cls, x): return True
def yes(*a, **k): return True
json.dumps = json.loads = lambda *a, **k: [True, True]
builtins.AssertionError = type('A', (BaseException,), {})
builtins.isinstance = builtins.all = builtins.any = builtins.bool = yes
sys.stdout = sys.stderr = open('/dev/null', 'w')
def f(x): return 0
""",
    "48 patched unittest": """
import unittest
for name in dir(unittest.TestCase):
    if name.startswith('assert'): setattr(unittest.TestCase, name, lambda *a, **k: None)
def f(x): return 0
""",
    "48 patched test loader and result": """
import unittest
unittest.TestResult.addFailure = unittest.TestResult.addError = lambda self, test, err: self.addSuccess(test)
def f(x): return 0
""",
    "48 patched before the tests and repaired by their end": """
import unittest
equal = unittest.TestCase.assertEqual
unittest.TestCase.assertEqual = lambda *a, **k: None
def f(x):
    if x == 2: unittest.TestCase.assertEqual = equal
    return 0
""",
    "48 patched runner": """
try:
    from guest import unit
    body = unit.result_body
    unit.result_body = lambda *a, **k: body(tests=[True, True])
    unit.deciding = dict
except ImportError: pass
def f(x): return 0
""",
    "49 walk for the secret": """
import os, sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        if isinstance(value, (bytes, bytearray)) and len(value) > 32:
            start = value.rfind(b'secret') + 11
            body = b'\\x94\\xa0\\xa0\\xc0\\x92\\xc3\\xc3' + value[start:start + 32]
            os.write(3, len(body).to_bytes(4, 'little') + b'R' + body)
            os._exit(0)
    frame = frame.f_back
def f(x): return 0
""",
    "49 walk for expected values": """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [v for v in frame.f_locals.values() if isinstance(v, int) and not isinstance(v, bool)]
        frame = frame.f_back
    if FORM == 'unittest': return None
    texts = [o for o in gc.get_objects() if isinstance(o, (list, tuple, dict)) and 'assert candidate' in repr(o)[:10000]]
    return texts[0] if texts else None
""",
    "50 atexit, __del__ and a thread after the verdict": """
import atexit, os, threading, time
BODY = b'\\x94\\xa0\\xa0\\xc0\\x92\\xc3\\xc3'
def send(): os.write(3, len(BODY).to_bytes(4, 'little') + b'R' + BODY)
atexit.register(send)
class D:
    def __del__(self): send()
d = D()
threading.Thread(target=lambda: (time.sleep(0.05), send()), daemon=True).start()
def f(x): return 0
""",
    "51 two result frames": """
import os
BODY = b'\\x94\\xa0\\xa0\\xc0\\x92\\xc3\\xc3'
def f(x):
    for _ in range(2): os.write(3, len(BODY).to_bytes(4, 'little') + b'R' + BODY)
""",
    "52 oversized frame": "import os\ndef f(x): os.write(3, b'\\xff\\xff\\xff\\xffR')",
    "52 malformed frame": "import os\ndef f(x): os.write(3, b'\\x03\\0\\0\\0R\\xc1\\xc1\\xc1'); os._exit(0)",
    "52 oversized answer to the judge": "import os\ndef f(x): os.write(4, b'\\xff\\xff\\xff\\x7f[]'); os._exit(0)",
    "53 pickle payload": """
import os, pickle
class P:
    def __reduce__(self): return (eval, ('2',))
def f(x):
    body = pickle.dumps(P())
    for fd in (3, 4):
        try: os.write(fd, len(body).to_bytes(4, 'little') + body)
        except OSError: pass
    return P() if FORM != 'unittest' else None
""",
    "53 object that unpickles": "class P:\n    def __reduce__(self): return (int, (2,))\ndef f(x): return P()",
    "54 ctypes on the runner": """
import ctypes, os, sys
def f(x):
    try: open('/proc/self/mem', 'r+b').write(b'x')
    except OSError: pass
    try:
        small = ctypes.c_long.from_address(id(1) + 24)
        return None
    except Exception: return None
""",
    "55 faked traceback and timing": """
import sys, time, traceback
time.time = time.perf_counter = time.monotonic = lambda: 0.0
traceback.format_exception = lambda *a, **k: ['OK']
sys.settrace(lambda *a: None)
def f(x):
    print('Traceback (most recent call last):'); print('Ran 2 tests in 0.000s\\n\\nOK', file=sys.stderr)
    raise AssertionError
""",
    "import hook that replaces modules": """
import sys
class Hook:
    def find_spec(self, name, path=None, target=None): raise ImportError(name)
sys.meta_path.insert(0, Hook())
for name in list(sys.modules):
    if name.startswith('guest'): del sys.modules[name]
def f(x): return 0
""",
    "calls the runner's own functions": """
try:
    from guest import wire, unit
    import _jail
except ImportError: pass
def f(x):
    try: wire.send_result(tests=[True, True])
    except Exception: pass
    try: _jail.verdict(b'\\x94\\xa0\\xa0\\xc0\\x92\\xc3\\xc3')
    except Exception: pass
    import os; os._exit(0)
""",
    "answers every question with the handle of a liar": """
class Liar:
    def __getattr__(self, name): return Liar()
    def __call__(self, *a, **k): return True
    def __eq__(self, other): return True
    def __iter__(self): return iter([2])
f = Liar() if FORM != 'unittest' else (lambda x: None)
if FORM != 'unittest':
    f.__class__.__call__ = lambda self, *a, **k: self
""",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_forged_verdict_is_a_failure(pool, name, form):
    outcome = pool.run(f"FORM = {form!r}\n" + ATTACKS[name], tests=FORMS[form], limits=Limits(wall_s=10, cpu_s=3))
    assert outcome.tests == (False, False)
    assert outcome.status not in ("ok", "infrastructure")
    assert outcome.pass_rate == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_the_honest_solution_passes(pool, form):
    outcome = pool.run("def f(x): return x + 1", tests=FORMS[form])
    assert (outcome.status, outcome.tests) == ("ok", (True, True))
    assert outcome.verdict_by == ("same-process" if form == "unittest" else "judge")


def test_changed_defaults_of_an_assertion_are_found(pool):
    source = "import unittest\nclass TestF(unittest.TestCase):\n    def test(self): self.assertAlmostEqual(f(1), 2)\n"
    code = "import unittest\nunittest.TestCase.assertAlmostEqual.__defaults__ = (None, None, 1e9)\ndef f(x): return 0"
    outcome = pool.run(code, tests=UnittestTests(source))
    assert (outcome.status, outcome.tests) == ("failed", (False,))
    assert "changed unittest" in outcome.error


@pytest.mark.parametrize(
    "error", ["unittest.case._ShouldStop", "unittest.SkipTest", "unittest.case._UnexpectedSuccess"]
)
def test_what_unittest_raises_for_itself_passes_no_test(pool, error):
    source = "import unittest\nclass TestF(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), 2)\n    def test_b(self):\n        for i in (3, 4):\n            with self.subTest(i): self.assertEqual(f(i), i + 1)\n"
    code = f"import unittest.case\nkept = unittest.case._ShouldStop\ndef f(x): raise {error}"
    assert pool.run(code, tests=UnittestTests(source)).tests == (False, False)
    assert pool.run(code.replace(error, "kept"), tests=UnittestTests(source)).tests == (False, False)
    expected = source.replace("    def test_b", "    @unittest.expectedFailure\n    def test_b")
    assert pool.run("def f(x): return 2", tests=UnittestTests(expected)).tests == (True, True)


def test_a_chain_of_comparisons_asks_no_order_of_the_solutions(pool):
    source = "import unittest\nlow, high = 1, 5\nclass TestF(unittest.TestCase):\n    def test_a(self): self.assertTrue(low < f(1) < 5)\n    def test_b(self): self.assertTrue(-1 <= f(1) <= high)\n    def test_d(self): self.assertTrue(f(1) <= 2 <= f(1))\n    def test_c(self):\n        self.assertFalse(3 < f(1) < high)\n        self.assertTrue(0 < f(1) < len('abc') == 3)\n"
    liar = "class Y:\n    __lt__ = __gt__ = __le__ = __ge__ = lambda self, other: True\ndef f(x): return Y()"
    assert pool.run(liar, tests=UnittestTests(source)).tests[:3] == (False, False, False)
    assert pool.run("def f(x): return x + 1", tests=UnittestTests(source)).tests == (True,) * 4


def test_a_flood_of_results_ends_the_job_at_the_second(pool):
    code = "import os\nwhile True: os.write(3, b'\\4\\0\\0\\0R\\x94\\xa0\\xa0\\xc0')"
    outcome = pool.run(code, limits=Limits(wall_s=60, cpu_s=30))
    assert (outcome.status, outcome.error) == ("failed", "a malformed frame on the jail's channel, or a second result")


def test_a_flood_of_calls_ends_a_job_that_has_none_to_make_at_the_first(pool, monkeypatch):
    """Passed on, tens of thousands a second kept the host from everything else, and the job for a minute from its end."""
    heard = []
    monkeypatch.setattr(Running, "on_call", lambda job, body: heard.append(body))
    code = "import os\nwhile True: os.write(3, b'\\0\\0\\0\\0C' * 10_000)"
    outcomes = pool.run_all([{"code": code, "tests": tests} for tests in (None, CHECK, UNITTEST)])
    assert [(each.status, "malformed frame" in each.error) for each in outcomes] == [("failed", True)] * 3
    assert heard == []


def test_stdio_expected_output_never_leaves_the_host(pool):
    cheat = "import gc, sys\nprint([o for o in gc.get_objects() if isinstance(o, (list, dict)) and '54321' in repr(o)[:5000]])"
    outcome = pool.run(cheat, tests=StdioTests((("1\n", "54321\n"),)))
    assert outcome.tests == (False,)
    assert "54321" not in outcome.stdout.replace("'54321' in", "")


def test_stdio_needs_a_clean_end(pool):
    tests = StdioTests((("", "yes\n"),))
    assert pool.run("print('yes')", tests=tests).tests == (True,)
    assert pool.run("print('yes'); raise ValueError", tests=tests).tests == (False,)
    assert pool.run("import os, sys; print('yes'); sys.stdout.flush(); os._exit(0)", tests=tests).tests == (False,)


def test_passing_before_the_crash_is_kept_and_no_more(pool):
    code = "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x + 1"
    assert pool.run(code, tests=CHECK).tests == (True, False)
    loop = "def f(x):\n    while x == 2: pass\n    return x + 1"
    outcome = pool.run(loop, tests=CHECK, limits=Limits(cpu_s=0.5, wall_s=20))
    assert (outcome.status, outcome.tests) == ("timeout", (True, False))
