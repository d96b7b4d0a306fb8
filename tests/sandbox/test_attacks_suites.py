# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Solutions beside unittest's tests that answer nothing right: by values of the library's that hold or stand for an
object that equals everything, and by what they do to the tests. No test of these passes; right values of the same kinds
pass."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, BlockingSandboxPool, CheckTests, Limits, UnittestTests
from fastgrpo_sandbox.columns import read_tests

pytestmark = pytest.mark.jail

Y = "class Y:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    def __lt__(self, o): return True\n    __le__ = __gt__ = __ge__ = __lt__\n    def __sub__(self, o): return 0.0\n    __rsub__ = __sub__\n    def __hash__(self): return hash(2)\nKEPT = Y()\n"


def suite(*bodies: str, before: str = "") -> UnittestTests:
    methods = "".join(f"    def test_{n}(self):\n        {body}\n" for n, body in enumerate(bodies))
    return UnittestTests(f"import unittest\n{before}\nclass T(unittest.TestCase):\n{methods}")


EQUAL = suite(
    "self.assertEqual(f(1), 2)",
    "self.assertTrue(f(1) == 2)",
    "self.assertIn(f(1), [2, 3])",
    "self.assertAlmostEqual(f(1), 2.0)",
    "self.assertEqual([[f(1)]], [[2]])",
)
# What holds the answer to be compared, as code that makes it of `x`, imports, and the wanted value.
HOLDERS = {
    "deque": ("deque([x])", "from collections import deque", "deque([2])"),
    "ordered": ("OrderedDict(a=x)", "from collections import OrderedDict", "OrderedDict(a=2)"),
    "chain": ("ChainMap({1: x})", "from collections import ChainMap", "{1: 2}"),
    "user list": ("UserList([x])", "from collections import UserList", "[2]"),
    "user dict": ("UserDict(a=x)", "from collections import UserDict", "{'a': 2}"),
    "items": ("{1: x}.items()", "", "{1: 2}.items()"),
    "proxy": ("MappingProxyType({1: x})", "from types import MappingProxyType", "{1: 2}"),
    "namespace": ("SimpleNamespace(a=x)", "from types import SimpleNamespace", "SimpleNamespace(a=2)"),
    "slice": ("slice(x)", "", "slice(2)"),
    "in a list": ("[deque([[x]])]", "from collections import deque", "[deque([[2]])]"),
    "a list that hides it": (
        "L([x])",
        "class L(list):\n    def __iter__(self): return iter(())\n    __len__ = lambda self: 0",
        "[2]",
    ),
    "a dict that hides it": (
        "D(a=x)",
        "class D(dict):\n    def __iter__(self): return iter(())\n    values = items = keys = lambda self: []",
        "{'a': 2}",
    ),
    "a mapping": (
        "M(x)",
        "from collections.abc import Mapping\nclass M(Mapping):\n    def __init__(self, x): self.x = x\n    def __getitem__(self, k): return self.x\n    def __iter__(self): return iter([1])\n    def __len__(self): return 1",
        "{1: 2}",
    ),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_an_object_of_the_librarys_holds_is_looked_at(pool, name):
    made, before, wanted = HOLDERS[name]
    tests = suite(f"self.assertEqual(f(2), {wanted})", f"self.assertTrue({wanted} == f(2))", before=before)
    assert pool.run(f"{before}\n{Y}def f(x): return (lambda x: {made})(Y())", tests=tests).tests == (False, False)
    assert pool.run(f"{before}\ndef f(x): return {made}", tests=tests).tests == (True, True)
    assert pool.run(f"{before}\ndef f(x): return (lambda x: {made})(3)", tests=tests).tests == (False, False)


ANSWERS = {
    "a weak proxy": "import weakref\ndef f(x): return weakref.proxy(KEPT)",
    "a fraction": "import fractions\ndef f(x):\n    made = fractions.Fraction(1)\n    made._numerator = made._denominator = Y()\n    return made",
    "a class of the library's that is given an __eq__": "import fractions\nfractions.Fraction.__eq__ = lambda self, other: True\ndef f(x): return fractions.Fraction(7)",
    "a class of the library's that is given a function as its __eq__": "import fractions, functools\nfractions.Fraction.__eq__ = functools.partialmethod(lambda self, other: True)\ndef f(x): return fractions.Fraction(7)",
    "a class that is given an __eq__ later": "class Z: pass\ndef f(x):\n    if hasattr(Z, 'seen'): Z.__eq__ = lambda self, other: True\n    Z.seen = 1\n    return Z()",
    "a class that says it is int": "class M(type):\n    __hash__ = lambda kind: hash(int)\n    __eq__ = lambda kind, other: True\nclass Z(metaclass=M): __eq__ = Y.__eq__\ndef f(x): return Z()",
    "the data of a user list": "import collections\ndef f(x):\n    made = collections.UserList()\n    made.data = Y()\n    return made",
    "a function of the library's as __eq__": "import typing\nclass Z: __eq__ = typing.cast\ndef f(x): return Z()",
    "the __eq__ of ANY": "import unittest.mock as mock\nclass Z: __eq__ = mock._ANY.__eq__\ndef f(x): return Z()",
    "an __eq__ in the tests' file": "made = {}\nexec(compile('class Z:\\n    def __eq__(self, o): return True', 'tests.py', 'exec'), made)\ndef f(x): return made['Z']()",
    "an __eq__ in the library's file": "import os\nmade = {}\nexec(compile('class Z:\\n    def __eq__(self, o): return True', os.__file__, 'exec'), made)\ndef f(x): return made['Z']()",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_no_object_answers_for_its_equality(pool, name):
    assert pool.run(Y + ANSWERS[name], tests=EQUAL).tests == (False,) * 5


# Classes over the library's, whose comparisons, in Python, find there what equals everything; and what is wanted.
DIRECTED = {
    "a user string": ("class Z(collections.UserString): data = property(lambda self: Y(), lambda *a: None)", "Z('a')", "'b'"),
    "a user list": ("class Z(collections.UserList): data = property(lambda self: Y(), lambda *a: None)", "Z()", "[2]"),
    "a user dict": ("class Z(collections.UserDict): data = property(lambda self: {'a': Y()}, lambda *a: None)", "Z()", "{'a': 2}"),
    "a user dict's items": ("class Z(collections.UserDict):\n    def items(self): return {'a': Y()}.items()", "Z(a=1)", "{'a': 2}"),
    "a counter": ("class Z(collections.Counter): __getitem__ = lambda self, key: 2", "Z(a=1)", "collections.Counter(a=2)"),
    "a counter that lacks it": ("class Z(collections.Counter): __missing__ = lambda self, key: 2", "Z()", "collections.Counter(a=2)"),
    "an address": ("class Z(ipaddress.IPv4Address): _ip = property(lambda self: Y(), lambda *a: None)", "Z('1.2.3.4')", "ipaddress.ip_address('1.2.3.5')"),
    "a path": ("class Z(pathlib.PurePosixPath):\n    def __getattribute__(self, name): return Y() if name in ('_cparts', '_str_normcase') else object.__getattribute__(self, name)", "Z('/a')", "pathlib.PurePosixPath('/b')"),
    "a namespace": ("class Z(argparse.Namespace): __dict__ = property(lambda self: Y())", "Z()", "argparse.Namespace(a=2)"),
    "a signature": ("class Z(inspect.Signature): _hash_basis = lambda self: Y()", "Z()", "inspect.signature(lambda a: 1)"),
}  # fmt: skip
IMPORTS = "import argparse, collections, inspect, ipaddress, pathlib\n"


@pytest.mark.parametrize("name", DIRECTED)
def test_a_class_over_the_librarys_does_not_direct_its_comparisons(pool, name):
    made, answer, wanted = DIRECTED[name]
    before = IMPORTS.strip()
    tests = suite(f"self.assertEqual(f(1), {wanted})", f"assert f(1) == {wanted}", before=before)
    outcome = pool.run(f"{IMPORTS}{Y}{made}\ndef f(x): return {answer}", tests=tests)
    assert outcome.tests == (False, False)
    assert pool.run(f"{IMPORTS}def f(x): return {wanted}", tests=tests).tests == (True, True)


def test_right_classes_over_the_librarys_pass(pool):
    code = (
        f"{IMPORTS}class Low(collections.UserDict):\n    size = property(len)\n    def __setitem__(self, key, value): self.data[key.lower()] = value\n"
        "class Log(collections.UserList):\n    most = 5\n    __slots__ = ('seen',)\n    def last(self): return self.data[-1]\n"
        "class Name(collections.UserString):\n    def shout(self): return self.data.upper()\n"
        "class Row(collections.UserList):\n    top = property(lambda self: self.data[-1])\n    make = classmethod(lambda cls, x: cls(x))\n    def append(self, x): super().append(x + 1)\n"
        "def row():\n    made = Row.make([1])\n    made.append(1)\n    return made\n"
        "class Plain(collections.UserDict):\n    def __setitem__(self, key, value): self.data[key] = value\n"
        "def f(x): return [Log([1]), Name('a'), Plain(a=1)]\n"
    )
    tests = suite(
        "self.assertEqual(Low(A=1), {'a': 1}); self.assertEqual(Low(A=1).size, 1)",
        "self.assertEqual(f(1), [[1], 'a', {'a': 1}]); self.assertEqual(f(1)[1].shout(), 'A')",
        "self.assertEqual(row(), [1, 2]); self.assertEqual(row().top, 2)",
    )
    outcome = pool.run(code, tests=tests)
    assert outcome.tests == (True,) * 3, outcome.error


CALLED = """from unittest.mock import ANY, AsyncMock, MagicMock, Mock, call, create_autospec, patch
import asyncio, operator, operator as op
from operator import eq as same, itemgetter
def sig(a, b): pass"""
PRINTS = "with patch('builtins.print') as p: f(1)\n        "
FORGED_CALLS = suite(
    *(PRINTS + line for line in ("p.assert_called_with('ok')", "p.assert_called_once_with('ok')", "p.assert_any_call('ok')")),
    *(PRINTS + line for line in ("p.assert_has_calls([call('ok')])", "self.assertEqual(p.mock_calls, [call('ok')])")),
    "m = Mock()\n        g(m)\n        m.send.assert_called_once_with('ok', ANY)",
    "m = create_autospec(sig)\n        h(m)\n        m.assert_called_with(ANY, 'ok')",
    "m = AsyncMock()\n        asyncio.run(k(m))\n        m.assert_awaited_once_with('ok')",
    *("self.assertTrue(same(v(), 2))", "self.assertTrue(op.eq(v(), 2))", "self.assertTrue(all(map(operator.eq, [v()], [2])))"),
    before=CALLED,
)  # fmt: skip
CALLS = "def f(x): print({0})\ndef g(m): m.send({0}, {0})\ndef h(m): m(b={0}, a={0})\nasync def k(m): await m({0})\ndef v(): return {0}\n"
NOT_CALLED = "def no(m):\n    m(3)\n    for name in dir(m):\n        if name.startswith('assert_'): setattr({}, name, lambda *a, **k: None)\n"
NOT_CALLED += "import builtins\ndef f(x): no(builtins.print)\ndef g(m): no(m.send)\nh = no\nasync def k(m): no(m)\ndef v(): return 77\n"


@pytest.mark.parametrize(
    "code",
    [
        f"{Y}class S(str):\n    __eq__, __ne__, __hash__ = Y.__eq__, Y.__ne__, str.__hash__\n{CALLS.format('S(77)')}",
        f"from unittest.mock import ANY\n{CALLS.format('ANY')}",
        NOT_CALLED.format("m"),
        NOT_CALLED.format("type(m)"),
    ],
    ids=["an object that equals everything", "ANY", "the mock's assertions", "its class' assertions"],
)
def test_no_mock_was_called_with_what_equals_everything(pool, code):
    outcome = pool.run(code, tests=FORGED_CALLS)
    assert len(outcome.tests) == 11
    assert not any(outcome.tests), outcome.tests


def test_what_mocks_were_called_with_is_found(pool):
    code = (
        "def f(m):\n    m(1, k='a')\n    m('b')\ndef g(m):\n    m.send([1], x=2)\n    m.close()\nasync def h(m): return await m(3)\ndef w(m, o):\n    m(o)\n    m('ok')\n"
        "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return isinstance(o, P) and self.x == o.x\ndef p(m):\n    m(P(1))\n    m(2)\n"
    )
    matcher = "\nclass Big:\n    def __eq__(self, o): return o.x > 2"
    tests = suite(
        "m = Mock(); f(m); m.assert_called_with('b'); m.assert_any_call(1, k='a'); m.assert_has_calls([call(1, k='a'), call('b')]); m.assert_called(); self.assertRaises(AssertionError, lambda: m.assert_called_once_with('b'))",
        "m = MagicMock(); g(m); m.send.assert_called_once_with([1], x=ANY); m.close.assert_called_once(); m.assert_has_calls([call.send([1], x=2), call.close()]); m.other.assert_not_called()",
        "m = AsyncMock(return_value=4); self.assertEqual(asyncio.run(h(m)), 4); m.assert_awaited_once_with(3); m.assert_has_awaits([call(3)]); m.assert_any_await(3); m.assert_awaited()",
        "m, o = Mock(), MagicMock(); w(m, o); m.assert_any_call(o); m.assert_called_with('ok'); m.assert_any_call('ok'); m.assert_has_calls([call(ANY), call('ok')], any_order=True)",
        "m = Mock(); p(m); m.assert_any_call(P(1)); m.assert_any_call(2); m.assert_called_with(2)",
        "m = Mock(); w(m, P(3)); m.assert_any_call(Big()); m.assert_has_calls([call(Big()), call('ok')])",
        "m = create_autospec(sig); m(1, b=2); m.assert_called_once_with(1, 2); m.assert_called_with(a=1, b=2)",
        "self.assertTrue(same(1, 1) and not op.eq(1, 2) and operator.lt(1, 2)); self.assertEqual(list(map(same, [1], [2])), [False]); self.assertEqual(list(map(itemgetter(0), [[1]])), [1])",
        before=CALLED + matcher,
    )
    outcome = pool.run(code, tests=tests)
    assert outcome.tests == (True,) * 8, outcome.error
    judged = "import operator\nfrom unittest.mock import Mock\ndef check(candidate):\n    m = Mock()\n    candidate(m)\n    m.assert_called_with('b')\n    assert m.call_count == 2 and all(map(operator.eq, [m.call_count], [2]))\n"
    assert pool.run(code, tests=CheckTests(judged, "f")).tests == (True,)
    assert pool.run("def f(m): m('b'), m(1)", tests=CheckTests(judged, "f")).tests == (False,)


OWN_AREA = "class Circle:\n    def __init__(self, *a): pass\n    area = property(lambda self: self)\n    def get(self): return self\n    def __sub__(self, o): return {}\n    __rsub__ = __sub__\n    def __abs__(self): return 0.0\n    def __round__(self, *a): return 0\n"
OWN_AREAS = (
    *("assert abs(Circle(2).area - 12.57) < 1e-6", "self.assertLess(abs(12.57 - Circle(2).get()), 1e-6)"),
    *("self.assertEqual(round(Circle(2).area - 12.57, 2), 0)", "import math; assert math.fabs(Circle(2).area - 12.57) < 1"),
)  # fmt: skip
VECTORS = """class Vec:
    def __init__(self, x): self.x = x
    def __sub__(self, o): return Vec(self.x - (o.x if isinstance(o, Vec) else o))
    def __rsub__(self, o): return Vec(o - self.x)
    def __eq__(self, o): return isinstance(o, Vec) and self.x == o.x
    def __abs__(self): return abs(self.x)
"""


def test_no_class_that_the_tests_name_makes_a_number_of_what_is_wanted(pool):
    for made in ("0.0", "self"):
        assert not any(pool.run(OWN_AREA.format(made), tests=suite(*OWN_AREAS)).tests)
    assert not any(pool.run(OWN_AREA.format("0.0"), tests=suite("assert Circle(2).area - 12.57 == 0")).tests)
    right = suite(
        "self.assertEqual(Vec(3) - 1, Vec(2)); self.assertEqual(5 - Vec(3), Vec(2)); self.assertEqual(abs(Vec(3) - Vec(5)), 2)",
        "import datetime; self.assertEqual((datetime.date(2020, 1, 3) - datetime.date(2020, 1, 1)).days, 2)",
    )
    outcome = pool.run(VECTORS, tests=right)
    assert outcome.tests == (True, True), outcome.error


COINS = """class Coin:
    def __init__(self, x): self.x = x
    def __sub__(self, o): return self.x - o
    def __rsub__(self, o): return o - self.x
    def __iadd__(self, o): return Coin(self.x + o)
    def __abs__(self): return 0.0
    def same(self): return self
def f(x): return Coin(x)
"""


def test_what_the_tests_make_of_a_class_may_be_a_number_by_subtraction(pool):
    made = "    def setUp(self): self.coin, self.other = Coin(5), Coin(5); self.kept = Coin(5)\n"
    right = suite(
        "self.assertEqual(Coin(5) - 2, 3); self.assertEqual(7 - Coin(5), 2); self.assertEqual(abs(Coin(5) - 2), 3)",
        "c = Coin(5); c += 1; self.assertEqual(c - 2, 4); self.assertEqual(self.kept - 2, 3); self.assertEqual(KEPT - 2, 3)",
        before="KEPT = Coin(5)",
    )
    right = UnittestTests(right.source + made)
    outcome = pool.run(COINS, tests=right)
    assert outcome.tests == (True, True), outcome.error
    forged = suite(
        *("c = Coin(5); c = f(1); self.assertEqual(c - 1, 0)", "self.assertEqual(Coin(1).same() - 1, 0)"),
        *("Coin; self.assertEqual(f(1) - int(1), 0)", "from decimal import Decimal; self.assertEqual(Coin(1).same() - Decimal(1), 0)"),
    )  # fmt: skip
    assert not any(pool.run(COINS, tests=forged).tests)


META = (
    "class M(type):\n    def __eq__(self, o): return True\n    __ne__ = lambda *_: False\n    __lt__ = __eq__\n    def __hash__(self): return hash(2)\n"
    "class A(metaclass=M): pass\ndef f(x): return A\n"
)
HELD = suite(
    *("self.assertEqual([f(1)], [2])", "self.assertEqual({'a': f(1)}, {'a': 2})", "self.assertEqual({f(1)}, {2})"),
    *("assert (f(1), 3) == (2, 3)", "assert sorted([f(1)]) == [2]", "self.assertIn([f(1)], [[2]])", "assert f(1) == 2"),
)


def test_a_class_does_not_answer_for_its_equality_either(pool):
    """By its metaclass, where it stands in a list."""
    assert not any(pool.run(META, tests=HELD).tests)
    assert all(pool.run("def f(x): return x + 1", tests=HELD).tests)
    named = suite("self.assertEqual([f(1)], [A])", "self.assertEqual({f(1): 1}, {A: 1})")
    assert all(pool.run(META, tests=named).tests)
    plain = "import enum\nclass A(enum.Enum): X = 1\nclass B: pass\ndef f(x): return [A, B, int]"
    assert all(
        pool.run(plain, tests=suite("assert f(1) == [A, B, int]", "self.assertEqual([f(1)], [[A, B, int]])")).tests
    )


FAKES = (
    "import sys, types\nclass C:\n    def __init__(self, *a, **k): pass\n    def __enter__(self): return self\n    def __exit__(self, *a): return True\n"
    "    def __call__(self, *a, **k): return self\ndef fake(name):\n    made = sys.modules[name] = types.ModuleType(name)\n    made.raises = made.allclose = made.assert_equal = C()\n    return made\n"
)
WHOLE = "class raises:\n    def __init__(self, *a): pass\n    def __enter__(self): return self\n    def __exit__(self, *a): return True\ndef allclose(*a): return True\n"
GIVEN = {
    "modules": f"{FAKES}for name in ('pytest', 'absent', 'absent.testing'): fake(name)\nsys.modules['absent'].testing = sys.modules['absent.testing']\n",
    "modules while the tests run": f"{FAKES}def f(x):\n    for name in ('pytest', 'absent'): fake(name)\n    return x\n",
    "files": f"for name in ('pytest', 'absent'):\n    with open(name + '.py', 'w') as file: file.write({WHOLE!r})\n",
    "a path": f"import os, sys\nos.mkdir('/tmp/own')\nsys.path.insert(0, '/tmp/own')\nfor name in ('pytest', 'absent'):\n    with open(f'/tmp/own/{{name}}.py', 'w') as file: file.write({WHOLE!r})\n",
    "a finder": f"{FAKES}import importlib.machinery\nclass F:\n    def find_spec(self, name, *a): return importlib.machinery.ModuleSpec(name, self) if name in ('pytest', 'absent') else None\n"
    "    def create_module(self, spec): return None\n    def exec_module(self, module): module.raises = module.allclose = C()\nsys.meta_path.insert(0, F())\n",
}
ASKING = (
    "import pytest\nimport unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        with pytest.raises(TypeError): f('a')\n",
    "import pytest\nwith pytest.raises(TypeError): f('a')\n",
    "import absent\nimport unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertTrue(absent.allclose(f(1), 2))\n",
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        f(1)\n        from absent import allclose\n        self.assertTrue(allclose(f(1), 2))\n",
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        from absent.testing import assert_equal\n        assert_equal(f(1), 2)\n",
)


@pytest.mark.parametrize("name", GIVEN)
def test_no_package_that_is_absent_is_the_solutions_to_give(pool, name):
    """A pytest of its own, in the place of which the tests have a stand-in, saw every error raised."""
    code = "def f(x): return x\n" + GIVEN[name]
    for source in ASKING:
        assert pool.run(code, tests=read_tests({"test": source})).tests == (False,)


def test_tests_have_their_stand_in_and_the_files_beside_the_solution(pool):
    right = "try:\n    import absent\nexcept ImportError:\n    absent = None\ndef f(x): return x + 1\n"
    for source in ASKING[:2]:
        assert pool.run(right, tests=read_tests({"test": source})).tests == (True,)
    own = suite(
        "import absent\n        self.assertEqual(f(1), absent.two)",
        before="import sys, types\nsys.modules['absent'] = types.SimpleNamespace(two=2)",
    )
    assert pool.run("def f(x): return x + 1", tests=own).tests == (True,)
    tests = suite("self.assertEqual(f(1), helper.two)", before="import helper\nfrom solution import f")
    assert pool.run("import helper\ndef f(x): return x + 1", tests=tests, files={"helper.py": "two = 2"}).tests == (
        True,
    )


HELPER = {
    "helper.py": "import base\nCOUNT = 0\nclass K:\n    def two(self): return base.two()\n"
    "def wanted(x):\n    global COUNT\n    COUNT += 1\n    return K().two()\n",
    "base.py": "def two(): return 2\n",
}
NO_HELPERS = {
    "a file that is written": "open('helper.py', 'w').write('def wanted(x): return 0')",
    "a folder before it": "import os, sys\nos.mkdir('z')\nopen('z/helper.py', 'w').write('def wanted(x): return 0')\n"
    "sys.path.insert(0, '/tmp/z')",
    "a module": "import sys, types\nsys.modules['helper'] = types.SimpleNamespace(wanted=lambda x: 0)",
    "a function": "import helper\nhelper.wanted = lambda x: 0",
    "its code": "import helper\nhelper.wanted.__code__ = (lambda x: 0).__code__",
    "a method": "import helper\nhelper.K.two = lambda self: 0",
    "what it imports": "import base\nbase.two = lambda: 0",
}


@pytest.mark.parametrize("name", NO_HELPERS)
def test_no_module_of_the_jobs_files_is_the_solutions_to_give(pool, name):
    tests = suite("self.assertEqual(f(1), helper.wanted(1))", before="import helper")
    for code in (f"{NO_HELPERS[name]}\ndef f(x): return 0", f"def f(x):\n    exec({NO_HELPERS[name]!r})\n    return 0"):
        assert pool.run(code, tests=tests, files=HELPER).tests == (False,)


def test_modules_of_the_jobs_files_may_count_and_need_the_solution(pool):
    tests = suite("self.assertEqual([f(1), helper.wanted(1)], [2, 2])", before="import helper")
    needs = "from solution import f\ndef wanted(x): return f(x)\n"
    for files in (HELPER, {"helper.py": needs}):
        for code in ("def f(x): return x + 1", "def f(x):\n    import helper\n    return x + 1"):
            assert pool.run(code, tests=tests, files=files).tests == (True,)


def test_a_file_beside_is_found_by_the_tests_own_path(pool):
    tests = suite("self.assertEqual(f(1), helper.two)", before="import sys\nsys.path.insert(0, 'lib')\nimport helper")
    found = pool.run("def f(x): return x + 1", tests=tests, files={"lib/helper.py": "two = 2"})
    assert found.tests == (True,), found.error


def test_no_object_is_in_order_by_not_being_out_of_it(pool):
    lines = ("assert not f(1) < 2 and not f(1) > 2", "self.assertFalse(f(1) < 2 or f(1) > 2)", "assert not (f(1) <= 1)")
    tests = suite(*lines, "if f(1) < 2 or f(1) > 2: self.fail()")
    for answer in (f"{Y}def f(x): return KEPT", f"{Y}def f(x): return [KEPT]"):
        assert not any(pool.run(answer, tests=tests).tests)
    assert all(pool.run("def f(x): return x + 1", tests=tests).tests)
    money = "class Money:\n    def __init__(self, n): self.n = n\n    def __lt__(self, o): return self.n < o.n\ndef f(x): return Money(x)"
    assert all(pool.run(money, tests=suite("assert not f(2) < f(1)", "assert f(1) < Money(2)")).tests)


def test_a_set_says_nothing_of_its_difference(pool):
    tests = suite("self.assertSetEqual(f(1), {1, 2})", "self.assertSetEqual({1, 2}, f(1))")
    wrong = (
        "class S(set): difference = lambda self, other: set()\ndef f(x): return S(range(9))",
        "class S:\n    def difference(self, other):\n        self.other = other\n        return set()\n    def __iter__(self): return iter(self.other)\ndef f(x): return S()",
    )
    assert [pool.run(code, tests=tests).tests for code in wrong] == [(False, False)] * 2
    right = "class S(set):\n    def difference(self, *other): return S(set.difference(self, *other))\ndef f(x): return S([1, 2])"
    assert pool.run(right, tests=tests).tests == (True, True)


def test_what_an_iterator_gives_is_looked_at(pool):
    tests = suite(
        "self.assertIn(2, f(1))",
        "self.assertTrue(2 in f(1))",
        "self.assertCountEqual(f(1), [2])",
        "self.assertIn(2, {1: next(f(1))}.values())",
    )
    assert pool.run(Y + "def f(x): yield Y()", tests=tests).tests == (False,) * 4
    assert pool.run("def f(x): yield 2", tests=tests).tests == (True,) * 4
    endless = suite("given = f(1)\n        self.assertIn(7, given)\n        self.assertEqual(next(given), 8)")
    assert pool.run("import itertools\ndef f(x): return itertools.count()", tests=endless).tests == (True,)


ONCE = suite(
    "got = f(1)\n        self.assertEqual(got, wanted(1) + MORE)",
    "self.assertEqual(f(1), 2)",
    before="MORE = 1\ndef wanted(n): return n",
)
CHANGES = {
    "the methods of the tests": "T.test_0 = T.test_1 = lambda self: None",
    "their code": "T.test_0.__code__ = T.test_1.__code__ = (lambda self: None).__code__",
    "an assertion": "T.assertEqual = lambda *a: None",
    "an assertion that is found": "T.__getattribute__ = lambda self, name: (lambda *a: None) if name == 'assertEqual' else object.__getattribute__(self, name)",
    "skipping": "T.__unittest_skip__ = True",
    "a helper": "globals()['wanted'] = lambda n: -1",
    "a helper's code": "wanted.__code__ = (lambda n: -1).__code__",
    "a constant": "globals()['MORE'] = -1",
    "the class": "globals()['T'] = 0",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_solution_that_changes_the_tests_passes_none(pool, name):
    outcome = pool.run(f"def f(x):\n    {CHANGES[name]}\n    return 0", tests=ONCE)
    assert outcome.tests == (False, False)
    assert "changed unittest" in outcome.error


def test_what_tests_change_of_their_own_is_theirs(pool):
    source = """
import unittest
from unittest.mock import patch
COUNT, LATER, kept = 0, 1, []
class Helper:
    seen = 0
    def add(self): type(self).seen += 1
def helper(): return 0
class T(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.maxDiff = None
        cls.value = f(1)
        cls.patcher = patch('__main__.helper', return_value=5)
        cls.patcher.start()
    def test_a(self):
        global COUNT
        COUNT += 1
        kept.append(COUNT)
        Helper().add()
        self.assertEqual((self.value, COUNT, Helper.seen, helper()), (2, 1, 1, 5))
    def test_b(self):
        with patch('__main__.LATER', 7): self.assertEqual(LATER, 7)
        self.assertEqual(f(1), 2)
"""
    assert pool.run("def f(x): return x + 1", tests=UnittestTests(source)).tests == (True, True)


KINDS = """import weakref, heapq
from dataclasses import dataclass, field
from fractions import Fraction
from collections import deque
class Node:
    def __init__(self, value, parent=None): self.value, self.parent = value, parent and weakref.proxy(parent)
@dataclass(order=True)
class Item:
    rank: int
    name: str = field(compare=False, default='')
class Queue:
    def __init__(self): self.items = []
    def push(self, item): heapq.heappush(self.items, item)
class Sorted(list):
    def __iter__(self): return iter(sorted(list.__iter__(self)))
def tree():
    root = Node(1)
    return root, Node(2, root)
def queue():
    made = Queue()
    made.push(Item(1))
    return made
"""


def test_right_values_of_these_kinds_pass(pool):
    tests = suite(
        "root, leaf = tree(); self.assertEqual(leaf.parent.value, 1); self.assertEqual(leaf.parent, root)",
        "made = queue(); self.assertEqual([made], [made]); self.assertEqual(made.items, [Item(1)]); self.assertNotEqual(made, queue())",
        "self.assertEqual(Fraction(1, 2), 0.5); self.assertIn(Fraction(1, 2), deque([0.5])); self.assertIn(Item(2), [Item(1), Item(2)])",
        "self.assertEqual(Sorted([2, 1]), [2, 1]); self.assertCountEqual(Sorted([2, 1]), [1, 2]); self.assertIn(2, Sorted([2]))",
        "self.assertIn('b', 'abc'); self.assertIn(2, {2: 3}); self.assertIn(3, {2: 3}.values()); self.assertIn(5, range(9))",
    )
    outcome = pool.run(KINDS, tests=tests)
    assert outcome.tests == (True,) * 5, outcome.error


def test_long_answers_are_looked_through_in_no_time(pool):
    tests = suite(
        "self.assertEqual(f(1), list(range(10**6)))", "self.assertEqual([f(2)], [[[n] for n in range(10**5)]])"
    )
    code = "def f(x): return list(range(10**6)) if x == 1 else [[n] for n in range(10**5)]"
    outcome = pool.run(code, tests=tests, limits=Limits(cpu_s=5))
    assert outcome.tests == (True, True), outcome


def test_arrays_of_objects_are_looked_at():
    pytest.importorskip("numpy")
    tests = suite(
        "self.assertTrue((f(1) == np.array([2, 2])).all())",
        "self.assertTrue(np.array_equal(f(1), [2, 2]))",
        "np.testing.assert_array_equal(f(1), [2, 2])",
        "self.assertTrue(np.allclose(list(f(1)), [2, 2]))",
        before="import numpy as np",
    )
    with BlockingSandboxPool(cells=1, preload=("numpy",)) as numpy_pool:
        for made in (
            "np.array([Y(), Y()], dtype=object)",
            "np.array([Y(), Y()], dtype=object).view(type('A', (np.ndarray,), {'tolist': lambda self: []}))",
        ):
            wrong = f"import numpy as np\n{Y}def f(x): return {made}"
            assert numpy_pool.run(wrong, tests=tests).tests == (False,) * 4
        right = "import numpy as np\ndef f(x): return np.array([2, 2], dtype=object)"
        outcome = numpy_pool.run(right, tests=tests)
        assert outcome.tests == (True,) * 4, outcome.error


PAIRS = """
    all(a == b for a, b in zip(f(2), [0, 1]))
    not [1 for a, b in zip([0, 1], f(2)) if a != b]
    all(abs(a - b) < 1e-6 for n, (a, b) in enumerate(zip(f(2), (0, 1))))
    all(map(lambda pair: pair[0] == pair[1], zip(f(2), [0, 1], [0, 1])))
    len(set(zip(f(2), [0, 1]))) == len(list(zip(f(2), [0, 1]))) or f(2) == []
"""
# Of these nothing is wanted that an empty answer lacks.
FREE = """
    all(a < b for a, b in zip(f(1), f(1)[1:]))
    all(all(a == b for a, b in zip(f(n), [0, 1])) for n in (0, 2))
    all(a == b for a, b in zip(f(0), []))
    list(zip(f(0), range(3))) == []
    (lambda n: list(zip(f(n), [0, 1])))(0) == []
"""
NAMED = "want = [0, 1]\nassert all(a == b for a, b in zip(f(2), want))"
FREELY = (
    "given = [1, 2]\nassert all(a == b for a, b in zip(f(0, given), given))",
    "for n in (0, 2):\n    got = list(zip(f(n), [0, 1]))\nassert got",
)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("empty", ["[]", "()", "''", "{}", "iter([])", "(x for x in [])"])
def test_nothing_is_no_answer_where_a_list_of_what_is_wanted_stands_beside_it(pool, empty):
    asserts = [*(f"assert {line}" for line in lines(PAIRS)), NAMED]
    bodies = [line.replace("\n", "\n        ") for line in asserts]
    checks = "".join(f"    {line}\n".replace("f(", "candidate(") for line in asserts[:-1])
    forms = (
        AssertTests(tuple(asserts)),
        CheckTests(f"def check(candidate):\n{checks}", "f"),
        suite(*bodies, "for a, b in zip(f(2), [0, 1]): self.assertEqual(a, b)"),
        suite(
            "got = f(2)\n        want = [0, 1]\n        for n, (a, b) in enumerate(zip(want, got)): self.assertEqual(a, b)"
        ),
    )
    for tests in forms:
        wrong = pool.run(f"def f(n): return {empty}", tests=tests)
        assert not any(wrong.tests), wrong
        assert all(pool.run("def f(n): return list(range(n))", tests=tests).tests)
        assert all(pool.run("def f(n): return tuple(range(n))", tests=tests).tests)


def test_a_right_answer_may_be_empty(pool):
    asserts = [*(f"assert {line}" for line in lines(FREE)), *FREELY]
    loop = "for a, b in zip(f(n), [0, 1]): self.assertEqual(a, b)"
    forms = (
        AssertTests(tuple(asserts)),
        suite(
            *(line.replace("\n", "\n        ") for line in asserts),
            f"for n in (0, 2):\n            {loop}",
            "self.helper(0)",
            before=f"class Base:\n    def helper(self, n):\n        {loop}",
        ),
    )
    code = "def f(n, given=None): return list(range(n))"
    assert all(pool.run(code, tests=forms[0]).tests)
    tests = UnittestTests(forms[1].source.replace("(unittest.TestCase):", "(unittest.TestCase, Base):"))
    outcome = pool.run(code, tests=tests)
    assert all(outcome.tests), outcome


def test_an_empty_array_is_less_than_none_by_numpys_functions():
    pytest.importorskip("numpy")
    vain = ("np.less(f(0, 1), [1, 2]).all()", "np.all(np.greater_equal([1, 2], f(0, 1)))")
    right = (
        "np.less(f(2), [1, 2]).all()",
        "np.less(f(0), 5).all()",
        "np.all(np.greater_equal(f(0), 0))",
        "np.less(f(0), []).all()",
    )
    tests = AssertTests(tuple(f"assert {line}" for line in (*vain, *right)), "import numpy as np")
    with BlockingSandboxPool(cells=1, preload=("numpy",)) as numpy_pool:
        outcome = numpy_pool.run("import numpy as np\ndef f(*shape): return np.zeros(shape)", tests=tests)
    assert outcome.tests == (False, False, True, True, True, True)


@pytest.mark.parametrize(
    "given",
    [
        "ValueError = Exception",
        "ValueError = (Exception,)",
        "ValueError = KeyError",
        "class Any(type):\n    def __subclasscheck__(cls, other): return True\nclass ValueError(Exception, metaclass=Any): pass",
    ],
)
def test_no_other_exception_is_the_one_that_the_tests_name(pool, given):
    tests = suite(
        "with self.assertRaises(ValueError): f(1)",
        "try: f(2)\n        except ValueError: return\n        self.fail('no')",
    )
    late = f"def f(x):\n    exec({given!r}, globals())\n    raise KeyError"
    for code in (f"{given}\ndef f(x): raise KeyError", late):
        assert pool.run(code, tests=tests).tests == (False, False)
    for own in ("ValueError = ValueError", "class ValueError(ValueError): pass", "class ValueError(Exception): pass"):
        assert pool.run(f"{own}\ndef f(x): raise ValueError", tests=tests).tests == (True, True)
