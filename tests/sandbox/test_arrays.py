# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Arrays that are empty agree with empty ones alone, in every form of tests; what else numpy compares stays as it is."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, BlockingSandboxPool, CheckTests, UnittestTests

pytest.importorskip("numpy")
pytestmark = pytest.mark.jail
FORMS = ("asserts", "check", "unittest")
CODE = "import numpy as np\ndef f(*shape, items=None): return np.zeros(shape) if items is None else np.array(items)\ndef a(*items): return np.array(items)\n"
# f(0, 1, 1) and a() are the wrong answers, which leave nothing to compare.
VAIN = (
    "(f(0, 1, 1) == np.array([1, 2])).all()",
    "np.all(np.array([1, 2]) == f(0, 1, 1))",
    "(f(0, 1, 1) == [1, 2]).all()",
    "not (f(0, 1, 1) != np.array([1, 2])).any()",
    "not np.any(f(0, 1, 1) != [1, 2])",
    "(f(0, 1) <= np.array([1, 2])).all()",
    "all(f(0, 1) == np.array([1, 2]))",
    "(a() == 5).all()",
    "(5 == a()).all()",
    "(np.abs(f(0, 1, 1) - np.array([1, 2])) < 1e-6).all()",
    "np.sum(np.abs(f(0, 1) - np.array([1, 2]))) == 0",
    "np.linalg.norm(np.array([1, 2]) - f(0, 1)) < 1e-6",
    "np.allclose(f(0, 1, 1), [1, 2])",
    "np.allclose([1, 2], f(0, 1, 1))",
    "np.allclose(a=f(0, 1, 1), b=[1, 2])",
    "np.allclose(a(), 5)",
    "np.allclose([], a(1))",
    "np.isclose(f(0, 1), np.array([1, 2])).all()",
    "np.all(np.isclose(a(), 5))",
    "np.equal(f(0, 1), [1, 2]).all()",
    "np.array_equal(f(0, 1), [1, 2])",
    "np.array_equiv(f(0, 2), [1, 2])",
    "np.testing.assert_allclose(a(), 5) is None",
    "np.testing.assert_allclose(f(0, 1, 1), np.array([1, 2])) is None",
    "np.testing.assert_array_equal(a(), 5) is None",
    "np.testing.assert_array_equal(f(0, 1, 1), [1, 2]) is None",
    "np.testing.assert_equal(a(), 5) is None",
    "np.testing.assert_array_almost_equal(a(), 5) is None",
    "np.testing.assert_almost_equal(a(), 5) is None",
    "np.testing.assert_array_less(f(0, 1, 1), [1, 2]) is None",
)
HOLDS = (
    "(a() == np.array([])).all()",
    "(f(0, 3) == np.zeros((0, 3))).all()",
    "(a() == []).all()",
    "np.allclose(a(), [])",
    "np.allclose(f(0, 3), np.zeros((0, 3)))",
    "np.array_equal(a(), np.array([]))",
    "np.isclose(a(), np.array([])).all()",
    "np.testing.assert_allclose(a(), []) is None",
    "np.testing.assert_array_equal(f(0, 3), np.zeros((0, 3))) is None",
    "(a() - np.array([])).sum() == 0",
    "(a() - 5).size == 0",
    "(f(2, 2) == 0).all()",
    "(f(2, 2) == [0, 0]).all()",
    "(f(2, 1) <= np.array([1, 2])).all()",
    "(f(2) != 1).all() and not (f(2) != 0).any()",
    "np.allclose(f(2, 2), 0)",
    "np.allclose(a(1, 2), [1, 2 + 1e-9], atol=1e-6)",
    "np.isclose(a(1, 2), [1, 3]).tolist() == [True, False]",
    "np.testing.assert_allclose(f(2, 2), 0) is None",
    "np.testing.assert_array_less(f(2), [1, 2]) is None and np.testing.assert_array_less(a(), 5) is None",
    "(np.abs(a(1, 2) - np.array([1, 2])) < 1e-6).all()",
    "not (a(1, 2) == [1, 3]).all()",
    "not np.allclose(a(), 5) and not np.allclose(a(1), 5)",
    "not (a() == 5).any()",
    "a()[a() > 5].size == 0 and f(0, 3)[f(0, 3) == 1].size == 0",
    "a(1, 7)[a(1, 7) > 5].tolist() == [7]",
    "np.sum(a() == 5) == 0",
    "a(3)[0] == 3 == a(3).sum()",
    "np.equal(a(1), 1).all()",
    "(a() <= 100).all() and all(0 <= a()) and (0 < a()).all()",
)


def passed(pool: BlockingSandboxPool, form: str, code: str, lines: tuple[str, ...], setup: str) -> list[str]:
    """The expressions that hold, each asserted by itself."""
    if form == "asserts":
        tests = AssertTests(tuple(f"assert {line}" for line in lines), setup)
    elif form == "check":
        body = "    a = lambda *items: candidate(items=items)\n" + "".join(f"    assert {line}\n" for line in lines)
        tests = CheckTests("def check(candidate):\n" + body, "f", setup)
    else:
        body = "".join(f"    def test_{n:02}(self): self.assertTrue({line})\n" for n, line in enumerate(lines))
        tests = UnittestTests("import unittest\nclass T(unittest.TestCase):\n" + body, setup)
    outcome = pool.run(code, tests=tests)
    assert len(outcome.tests) == len(lines), outcome
    return [line for line, held in zip(lines, outcome.tests, strict=True) if held]


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_array_agrees_with_empty_ones_alone(numpy_pool, form):
    assert passed(numpy_pool, form, CODE, VAIN, "import numpy as np\n") == []
    assert passed(numpy_pool, form, CODE, HOLDS, "import numpy as np\n") == list(HOLDS)


LIARS = """import numpy as np
class L(np.ndarray):
    size = 0
    def __eq__(self, other): return np.array([True])
    def __array_ufunc__(self, *a, **k): return np.array([True])
    def __array_function__(self, *a, **k): return True
def f(*shape, items=None): return np.zeros(shape).view(L)
def a(*items): return f(2)
"""


@pytest.mark.parametrize("form", FORMS)
def test_an_array_of_the_solutions_class_answers_for_nothing(numpy_pool, form):
    lines = (*(line for line in VAIN if "f(0" in line), "(f(2) == np.array([1, 2])).all()", "np.allclose(f(2), [1, 2])")
    assert passed(numpy_pool, form, LIARS, lines, "import numpy as np\n") == []


MASKED = """import numpy as np
class W(np.ndarray):
    def __array_wrap__(self, made, *a): return np.ones(made.shape, bool)
class M(np.ndarray):
    def all(self, *a, **k): return True
    def any(self, *a, **k): return False
def f(*shape, items=None): return {}
def a(*items): return f()
"""
MASKS = (
    *("np.testing.assert_array_equal(f(), [1, 2]) is None", "np.testing.assert_allclose(f(), [1, 2]) is None"),
    *("np.allclose(f(), [1, 2])", "(f() == np.array([1, 2])).all()", "np.all(f() == np.array([1, 2]))"),
    *("not (f() != np.array([1, 2])).any()", "not np.any(abs(f() - np.array([1, 2])) > 1e-6)"),
)


@pytest.mark.parametrize(
    "answer",
    ["np.ma.masked_all(2)", "np.ma.array([1, 77], mask=[0, 1])", "np.ma.masked", "np.zeros(2).view(W)", "np.zeros(2).view(M)"],
)  # fmt: skip
def test_no_array_leaves_out_what_is_compared(numpy_pool, answer):
    number = ("abs(f() - 2.5) < 1e-6", "not abs(f() - 2.5) > 1e-6", "not f() != 2", "np.isclose(f(), 2)")
    lines = (*MASKS, *(number if answer == "np.ma.masked" else ()))
    for form in ("unittest", "asserts"):
        assert passed(numpy_pool, form, MASKED.format(answer), lines, "import numpy as np\n") == []
    right = (
        *(*MASKS, "(np.ma.array([1, 5], mask=[0, 1]) == np.ma.array([1, 7], mask=[0, 1])).all()"),
        "(f(items=[1, 2]).view(np.ma.MaskedArray) >= 0).all()",
        "np.testing.assert_array_equal(np.ma.masked_invalid([1, np.nan]), np.array([1, np.nan])) is None",
    )
    assert passed(numpy_pool, "unittest", MASKED.format("np.array([1, 2])"), right, "import numpy as np\n") == list(
        right
    )


def test_a_wanted_array_may_stand_first(numpy_pool):
    lines = ("np.all(np.array([0, 0]) == f(2))", "np.all(np.array([0, 1]) == f(2))")
    for form in FORMS:
        assert passed(numpy_pool, form, CODE, lines, "import numpy as np\n") == list(lines[:1])


NUMPYS = (
    "(f(2) == 0).all() and np.allclose(f(2), [0, 0])",
    "np.allclose(f(2), [1, 1])",
    "numpy.allclose(f(2), 1)",
)
SHADOWS = (
    "class {0}:\n    allclose = array = staticmethod(lambda *a, **k: True)\n",
    "import types\n{0} = types.ModuleType('numpy')\n{0}.allclose = lambda *a, **k: True\n",
    "import types\n{0} = types.SimpleNamespace(allclose=lambda *a, **k: True)\n",
    "import numpy\nnumpy.allclose = lambda *a, **k: True\n",
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shadow", SHADOWS)
def test_a_solutions_own_np_is_not_the_tests(numpy_pool, form, shadow):
    for name, wrong in (("np", NUMPYS[1]), ("numpy", NUMPYS[2])):
        code = f"import numpy as n\ndef f(*shape, items=None): return n.zeros(shape)\n{shadow.format(name)}"
        assert passed(numpy_pool, form, code, (wrong,), "") == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("imported", ["import numpy as np\nn = np\n", "import numpy as n\n"])
def test_tests_need_not_import_numpy(numpy_pool, form, imported):
    code = f"{imported}def f(*shape, items=None): return n.zeros(shape)\n"
    assert passed(numpy_pool, form, code, NUMPYS, "") == [NUMPYS[0]]


OWN_MATH = "class math:\n    isclose = staticmethod(lambda *a: True)\ndef f(x): return 77\n"


def test_a_solutions_own_math_is_not_the_tests(pool):
    assert passed(pool, "unittest", OWN_MATH, ("math.isclose(f(1), 2.5)", "math.isclose(f(1), 77)"), "") == [
        "math.isclose(f(1), 77)"
    ]
    code = "from datetime import datetime\ndef f(x): return datetime.strptime(x, '%Y')\n"
    lines = ("f('2020') == datetime.strptime('2020', '%Y')", "f('2020') == datetime.strptime('2021', '%Y')")
    whole = tuple(line.replace("datetime.", "datetime.datetime.") for line in lines)
    for form in FORMS:
        assert passed(pool, form, code, lines, "") == list(lines[:1])
        assert passed(
            pool, form, "import datetime\ndef f(x): return datetime.datetime.strptime(x, '%Y')", whole, ""
        ) == [whole[0]]


def test_what_tests_have_of_a_module_is_not_the_solutions(pool):
    lines = ("f(1) == math.floor(1.5)", "same(f(1))")
    setup = "def same(x): return x == math.floor(1.5)\n"
    for form in FORMS:
        assert passed(pool, form, "import math\ndef f(x): return math.floor(x)", lines, setup) == list(lines)
        assert passed(pool, form, "def f(x): return math.floor(x)", lines, setup) == []  # it has not imported it


FRAMES = "import numpy as np\nimport pandas as pd\ndef f(*rows, items=None): return pd.DataFrame({'x': list(rows)}, dtype=float)\n"
FRAMES_VAIN = (
    "(f() == 1).all().all()",
    "(f()['x'] == 1).all()",
    "not (f()['x'] != 1).any()",
    "np.allclose(f()['x'], 1)",
    "(f().to_numpy() == np.array([[1.0]])).all()",
)
FRAMES_HOLD = (
    "(f(1, 1)['x'] == 1).all()",
    "(f(1) == f(1)).all().all() and (f() == f()).all().all()",
    "f()[f()['x'] == 1].empty and f()[f()['x'] > 1].empty",
    "f(1, 2)[f(1, 2)['x'] == 2]['x'].tolist() == [2]",
    "all(f()['x'] <= 100)",
    "(f()['x'] == f()['x']).all()",
    "'x' in f()",
    "(f(3)['x'] - f(1)['x']).tolist() == [2]",
)


def test_an_empty_column_agrees_with_no_number():
    pytest.importorskip("pandas")
    with BlockingSandboxPool(cells=1, preload=("numpy", "pandas")) as pandas_pool:
        assert passed(pandas_pool, "unittest", FRAMES, FRAMES_VAIN, "import numpy as np\n") == []
        assert passed(pandas_pool, "unittest", FRAMES, FRAMES_HOLD, "import numpy as np\n") == list(FRAMES_HOLD)
