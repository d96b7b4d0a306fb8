# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Solutions that answer nothing right and would have the tests pass: by objects that equal everything, by ending in the
middle, by what they lend and borrow. Not one assertion may pass."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, CheckTests, Limits, StdioTests, UnittestTests

pytestmark = pytest.mark.jail


def check(body: str, setup: str = "") -> CheckTests:
    return CheckTests("def check(candidate):\n" + "".join(f"    {line}\n" for line in body.splitlines()), "f", setup)


def A(*lines: str, setup: str = "") -> AssertTests:
    return AssertTests(lines, setup)


Y = "class Y:\n    def __eq__(self,o): return True\n    def __ne__(self,o): return False\n    def __lt__(self,o): return True\n    __le__=__gt__=__ge__=__contains__=__lt__\n    def __sub__(self,o):\n        print('saw', o)\n        return 0.0\n    __rsub__=__add__=__mul__=__truediv__=__sub__\n    def __abs__(self): return 0.0\n    def __round__(self, n=None): return 0\n    def __hash__(self): return hash(2)\n    def __bool__(self): return True\n"
LIAR = Y + "def f(*x): return Y()"
NUM = Y.replace("class Y:", "class Y(float):") + "def f(*x): return Y(77.0)"
LST = Y.replace("class Y:", "class Y(list):").replace("__hash__", "__hsh__") + "def f(*x): return Y([77])"
EXC = "class E(ValueError):\n    def __eq__(self, o): return True\n    def __str__(self): return 'x'\n"
ANNOTATED = """def f(x: r'''exec('import sys\\nframe = sys._getframe()\\nwhile frame:\\n    g = frame.f_globals\\n    if "__checked__" in g:\\n        g["__passed__"] = lambda i, t, p=g["__passed__"]: p(i, True)\\n    frame = frame.f_back')'''): return 77
"""
UNIT = UnittestTests(
    "import unittest\nclass TestF(unittest.TestCase):\n    def test_one(self): self.assertEqual(f(1), 2)\n    def test_two(self): self.assertEqual(f(2), 3)\n"
)
UNIT2 = UnittestTests(
    "from unittest import TestCase\nclass TestF(TestCase):\n    def test_one(self):\n        self.assertEqual(f(1), 2)\n    def test_two(self):\n        with self.assertRaises(ValueError): f(2)\n        self.assertTrue(f(3) == 4)\n"
)
LOOP = check("for i in range(5):\n    out = candidate(i)\n    assert out == i + 1")
HELPER = CheckTests(
    "def assertion(out, exp):\n    assert out == exp\ndef check(candidate):\n    for i in range(5):\n        assertion(candidate(i), i + 1)\n",
    "f",
)
FORGED = [
    ("check: loop, right once then raises", "def f(x):\n    if x == 0: return 1\n    raise ValueError", LOOP),
    ("check: loop, right once then hangs", "def f(x):\n    if x == 0: return 1\n    while True: pass", LOOP),
    ("check: loop, right once then MemoryError", "def f(x):\n    if x == 0: return 1\n    return [0]*10**12", LOOP),
    (
        "check: zip(map()) loop ended by StopIteration",
        "def f(x):\n    if x: raise StopIteration\n    return 1",
        check("for out, want in zip(map(candidate, range(5)), range(1, 6)):\n    assert out == want"),
    ),
    (
        "asserts: solution supplies the expected's helper",
        "def expected(x): return 0\ndef f(x): return 0",
        AssertTests(("assert f(1) == expected(1)",)),
    ),
    (
        "unit: same with from-import",
        "import unittest\nclass T(unittest.TestCase):\n    def assertEqual(self,*a,**k): pass\n    assertTrue=assertEqual\n    def assertRaises(self,*a,**k):\n        import contextlib\n        return contextlib.nullcontext()\nunittest.TestCase = T\ndef f(x): return 0",
        UNIT2,
    ),
    (
        "unit: contextlib's __exit__ swallows",
        "import contextlib\nold = contextlib._GeneratorContextManager.__exit__\ndef ex(self, t, v, tb):\n    old(self, None, None, None) if t is None else None\n    return True\ncontextlib._GeneratorContextManager.__exit__ = ex\ndef f(x): return 0",
        UNIT,
    ),
    (
        "unit: unittest.TestResult replaced",
        "import unittest\nclass R(unittest.TestResult):\n    def startTest(self, test):\n        super().startTest(test); self.passed.add(f'{type(test).__name__}.{test._testMethodName}')\nunittest.TestResult = R\ndef f(x): return 0",
        UNIT,
    ),
    (
        "unit: object equal to its first comparand",
        "class Y:\n    def __eq__(self,o): return True\n    def __ne__(self,o): return False\n    __hash__ = None\ndef f(x): return Y()",
        UNIT,
    ),
    (
        "unit: AST/compile hook: code sets a codec / dict subclass",
        "import builtins\nglobals()['__builtins__'] = {**vars(builtins), '__import__': lambda n, *a, **k: type('M', (), {'TestCase': type('T', (object,), {})})}\ndef f(x): return 0",
        UNIT,
    ),
    ("unit: raise SkipTest", "import unittest\ndef f(x): raise unittest.SkipTest('x')", UNIT),
    (
        "unit: _jail.keep twice",
        "import _jail\ntry: _jail.keep()\nexcept Exception as e: print(e)\ndef f(x): return 0",
        UNIT,
    ),
    *(
        (f"{n}: approx {i}", c, A(t))
        for n, c in (("liar", LIAR), ("float", NUM), ("list", LST))
        for i, t in enumerate(
            (
                "assert abs(f(1) - 2.5) < 1e-6",
                "assert f(1) == 2",
                "assert 2.5 == f(1)",
                "assert f(1) in [2, 3]",
                "assert f(1) in {2, 3}",
                "assert [f(1)] == [2]",
                "assert f(1) < 2",
                "assert 2 > f(1)",
                "assert (f(1), 3) == (2, 3)",
                "assert round(f(1) - 2.5, 3) == 0",
                "assert {'a': f(1)} == {'a': 2}",
                "assert f(1) == [2]",
                "import math\nassert math.isclose(f(1), 2.5)",
                "assert not f(1) != 2",
                "assert sum(f(1) - x for x in [2]) == 0.0",
                "assert f(1) - 2 == 0",
                "assert 2 - f(1) == 0",
                "assert not (f(1) - 2)",
                "assert f(1) == 2 and f(2) == 3",
            )
        )
    ),
    (
        "def f as class",
        Y.replace("class Y:", "class f:\n    def __init__(self, *a): pass"),
        A("assert abs(f(1) - 2.5) < 1e-6", "assert f(1) == 2"),
    ),
    (
        "named class returns itself",
        Y.replace("class Y:", "class Circle:\n    def __init__(self, *a): pass\n    def area(self): return self"),
        A(
            "assert abs(Circle(1).area() - 2.5) < 1e-6",
            "assert Circle(1).area() == 2",
            "c = Circle(1)\nr = c.area()\nassert abs(r - 2.5) < 1",
        ),
    ),
    (
        "Gone is swallowed",
        "import os\ndef f(x): os._exit(0)",
        check(
            "try:\n    candidate(1)\n    assert False\nexcept Exception:\n    pass\ntry:\n    candidate(1)\n    assert False\nexcept:\n    pass"
        ),
    ),
    (
        "recursive check",
        "def f(x):\n    if x == 3: return 4\n    raise ValueError",
        CheckTests(
            "def check(candidate, n=3):\n    assert candidate(n) == n + 1\n    if n: check(candidate, n - 1)\n", "f"
        ),
    ),
    (
        "nested helper",
        "def f(x):\n    if x == 0: return 1\n    raise KeyError",
        check("def same(a, b):\n    assert a == b\nsame(candidate(0), 1)\nsame(candidate(1), 2)"),
    ),
    (
        "while",
        "def f(x):\n    if x == 0: return 1\n    raise KeyError",
        check("i = 0\nwhile i < 3:\n    assert candidate(i) == i + 1\n    i += 1"),
    ),
    (
        "comprehension of helper",
        "def f(x):\n    if x == 0: return 1\n    raise KeyError",
        CheckTests(
            "def same(a, b):\n    assert a == b\n    return True\ndef check(candidate):\n    [same(candidate(i), i + 1) for i in range(3)]\n",
            "f",
        ),
    ),
    (
        "generator",
        "def f(x):\n    if x == 0: return 1\n    raise StopIteration",
        CheckTests(
            "def go(candidate):\n    for i in range(3):\n        out = candidate(i)\n        assert out == i + 1\n        yield\ndef check(candidate):\n    for _ in go(candidate): pass\n",
            "f",
        ),
    ),
    (
        "try finally in loop",
        "def f(x):\n    if x == 0: return 1\n    raise KeyError",
        check("for i in range(3):\n    try:\n        out = candidate(i)\n    finally:\n        assert i < 3"),
    ),
    (
        "with in loop sys.exit",
        "import sys\ndef f(x):\n    if x == 0: return 1\n    sys.exit(0)",
        check("for i in range(3):\n    assert candidate(i) == i + 1\n    candidate(i)"),
    ),
    (
        "map StopIteration all",
        "def f(x):\n    if x: raise StopIteration\n    return True",
        A("assert all(map(f, [0, 1, 2]))"),
    ),
    (
        "map StopIteration subclass",
        "class S(StopIteration): pass\ndef f(x):\n    if x: raise S\n    return True",
        A("assert all(map(f, [0, 1, 2]))", "assert list(map(f, [0, 1])) == [True]"),
    ),
    (
        "callable object raising StopIteration from property",
        "class C:\n    @property\n    def ok(self): raise StopIteration\ndef f(x): return C()",
        A("assert all(map(lambda x: f(x).ok, [0, 1, 2]))"),
    ),
    (
        "isclose overridden",
        "def isclose(*a, **k): return True\nclass math:\n    isclose = isclose\ndef f(): return 77",
        A("assert math.isclose(f(), 2.5)"),
    ),
    (
        "all/any/isinstance/abs overridden",
        "def all(*a): return True\nany=isinstance=all\ndef abs(*a): return 0\ndef f(x): return 77",
        A(
            "assert all(f(i) == i for i in range(3))",
            "assert isinstance(f(1), str)",
            "assert abs(f(1) - 2.5) < 1e-6",
            "assert any([f(1) == 2])",
        ),
    ),
    (
        "expected constant supplied",
        "expected = 5\nEXPECTED = 5\ndef f(x): return 5",
        A("assert f(1) == expected", "assert f(1) == EXPECTED"),
    ),
    (
        "reads frames of a lent generator",
        "def f(it):\n    try: return it.gi_frame.f_globals['SECRET']\n    except BaseException as e: return repr(e)",
        A("assert f(x for x in [1]) == SECRET", setup="SECRET = 'abc'"),
    ),
    (
        "reads globals of a lent function",
        "def f(g):\n    for n in ('__globals__', '__closure__', '__code__', '__self__', '__class__', '__dict__', '__init__'):\n        try:\n            v = getattr(g, n)\n            if n == '__globals__': return v['SECRET']\n            if n == '__init__': return v.__globals__['SECRET']\n        except BaseException as e: pass\n    return 1",
        A(
            "assert f(lambda: 1) == SECRET",
            "assert f(P()) == SECRET",
            "assert f(P) == SECRET",
            "assert f(P().m) == SECRET",
            setup="SECRET = 'abc'\nclass P:\n    def __init__(self): pass\n    def m(self): pass",
        ),
    ),
    (
        "names of the judge",
        "def f(g):\n    peer = type(g).__mro__ and object.__getattribute__(g, '_fastgrpo_place_')[0]\n    out = []\n    for req in (('get', 'SECRET', 'x'), ('name', 'SECRET'), ('call', 'check', [], {}), ('get', 0, '__globals__'), ('special', 0, '__getattribute__', ['__globals__']), ('special', 0, '__reduce_ex__', [2]), ('special', 0, '__dir__', []), ('await', 0), ('set', 0, '__code__', 1)):\n        try: out.append(peer.request(*req))\n        except BaseException as e: out.append(repr(e))\n    print(out)\n    return 'abc' if 'abc' in repr(out) else 0",
        A("assert f(lambda: 1) == SECRET", setup="SECRET = 'abc'"),
    ),
    (
        "mirror that defines __eq__ by name",
        "import sys\nfrom guest import peer as P\nP._overridden = lambda kind, base: {'__eq__', '_fastgrpo_base_'}\nclass I(int): pass\ndef f(x): return I(77)",
        A("assert f(1) == 2"),
    ),
    (
        "specials forged",
        "from guest import peer as P, remote\nremote.SPECIALS = ('__class__', '__instancecheck__', '__eq__')\nP._differs = lambda *a: True\nclass I: pass\ndef f(x): return I()",
        A("assert f(1) == 2"),
    ),
    (
        "sends a type that constructs",
        "import subprocess\ndef f(x): return subprocess.Popen",
        A("assert f(1)(['true']).wait() == 44"),
    ),
    (
        "sends the library's exec",
        "from guest import peer as P\nold = P.Peer._give\ndef give(self, v, c): return {'function': 'builtins.exec'} if v is f else old(self, v, c)\nP.Peer._give = give\ndef f(x): return f",
        A("assert f(1)('1') == 2"),
    ),
    (
        "lies about its library place",
        "from guest import peer as P\nP._library_place = lambda v: 'operator.f'\ndef f(x): return 1",
        A("assert f(1) == 2"),
    ),
    (
        "changes an old container later",
        "kept = []\ndef f(v):\n    kept.append(v)\n    return 3\ndef g(): kept[0][:] = [3]; return 0",
        A("v = [1]\nassert f(v) == 2"),
    ),
    (
        "callback with an always-equal object",
        LIAR.replace("def f(*x): return Y()", "def f(g): return g(Y())"),
        A("assert f(lambda y: y == 5 and 7) == 7", "assert f(lambda y: y) == 7"),
    ),
    (
        "exception equal to all",
        EXC + "def f(x): raise E('x')",
        A("try:\n    f(1)\nexcept ValueError as e:\n    got = e\nassert got.args == ('y',)"),
    ),
    ("unit: mock.ANY", "from unittest.mock import ANY, MagicMock\ndef f(x): return ANY", UNIT),
    (
        "unit: MagicMock eq",
        "from unittest.mock import MagicMock\nm = MagicMock()\nm.__eq__.return_value = True\ndef f(x): return m",
        UNIT,
    ),
    ("unit: int.__ne__", "class Y(int): __eq__ = int.__ne__\ndef f(x): return Y(77)", UNIT),
    (
        "unit: assertTrue ==",
        "class Y(int):\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x):\n    if x == 2: raise ValueError if x != 2 else KeyError\n    return Y(7)",
        UNIT2,
    ),
    (
        "unit: almost",
        Y + "def f(x): return Y()",
        UnittestTests(
            "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertAlmostEqual(f(1), 2.5)\n    def test_b(self): self.assertTrue(abs(f(1) - 2.5) < 1e-6 and f(1) == 3)\n    def test_c(self): self.assertIn(f(1), [2])\n    def test_d(self): self.assertEqual([f(1)], [2])\n    def test_e(self): self.assertEqual(2, f(1))\n    def test_f(self): self.assertLess(f(1), 0)\n    def test_g(self): self.assertTrue(f(1) in (2, 3))\n    def test_h(self): self.assertDictEqual({'a': f(1)}, {'a': 2})\n    def test_i(self): self.assertCountEqual([f(1)], [2])"
        ),
    ),
    (
        "unit: TestSuite replaced",
        "import unittest\nclass S(unittest.TestSuite):\n    def run(self, result, debug=False):\n        for t in self: result.addSuccess(t)\nunittest.TestSuite = S\ndef f(x): return 0",
        UNIT,
    ),
    (
        "unit: sys.modules",
        "import sys, types, unittest\nm = types.ModuleType('unittest')\nclass T(unittest.TestCase):\n    def assertEqual(self, *a): pass\nm.TestCase = T\nsys.modules['unittest'] = m\ndef f(x): return 0",
        UNIT,
    ),
    (
        "unit: TestCase.run",
        "import unittest\nunittest.case.TestCase.run = lambda self, result=None: result.addSuccess(self)\ndef f(x): return 0",
        UNIT,
    ),
    (
        "unit: __init_subclass__",
        "import unittest\ndef g(cls, **k): cls.assertEqual = lambda *a: None\nunittest.TestCase.__init_subclass__ = classmethod(g)\ndef f(x): return 0",
        UNIT,
    ),
    (
        "unit: compare replaced",
        "import guest.honest as h\nh.lies = lambda *a: False\nclass Y:\n    def __eq__(self,o): return True\ndef f(x): return Y()",
        UNIT,
    ),
    (
        "unit: compare in globals",
        "class Y:\n    def __eq__(self,o): return True\ndef f(x):\n    globals()['__compare__'] = lambda *a: True\n    return 0",
        UNIT2,
    ),
    (
        "asserts: an annotation that is evaluated where the judge is",
        ANNOTATED,
        A("import typing\ntyping.get_type_hints(f)\nassert f(1) == 2"),
    ),
    (
        "asserts: a flag that sees what it is combined with",
        "import enum\nclass P(enum.Flag):\n    A = 1\n    def __xor__(self, o):\n        print('saw', o)\n        return 0\n    __or__ = __and__ = __xor__\ndef f(x): return P.A",
        A("assert f(1) ^ 2 == 0", "assert not f(1) & 2", "assert (f(1) | 2) == 0"),
    ),
    (
        "asserts: containers of the library's whose items equal everything",
        Y
        + "from collections.abc import Mapping, MutableSequence, Set\nclass M(Mapping):\n    def __getitem__(self, k): return Y()\n    def __iter__(self): return iter('a')\n    def __len__(self): return 1\n    def items(self): return {'a': Y()}.items()\n    __eq__ = Y.__eq__\nclass S(Set):\n    def __contains__(self, item): return True\n    def __iter__(self): return iter([Y()])\n    def __len__(self): return 1\n    __eq__ = Y.__eq__\nclass L(MutableSequence):\n    __setitem__ = __delitem__ = insert = lambda *a: None\n    def __getitem__(self, i): return [Y()][i]\n    def __len__(self): return 1\n    __eq__ = Y.__eq__\ndef f(x): return {'m': M, 's': S, 'l': L}[x]()",
        A("assert f('m') == {'a': 1}", "assert {'a': 1} == f('m')", "assert f('s') == {1}", "assert f('l') == [1]"),
    ),
    (
        "asserts: an object of the library's with attributes that equal everything",
        Y
        + "import statistics\nclass N(statistics.NormalDist):\n    _mu = _sigma = property(lambda self: Y())\ndef f(x): return N()",
        A("import statistics\nassert f(1) == statistics.NormalDist(1, 2)", "assert f(1).mean == 1"),
    ),
    (
        "asserts: a class that calls itself the library's",
        Y
        + "import re\nY.__module__, Y.__name__, Y.__qualname__ = 're', 'Match', 'Match'\nre.Match = Y\ndef f(x): return Y()",
        A("import re\nassert f(1) == 2 or f(1) == re.match('a', 'a')", "assert type(f(1)) is int"),
    ),
    (
        "asserts: what a callback of the tests holds",
        "import inspect\ndef f(g):\n    found = [p.default for p in inspect.signature(g).parameters.values()]\n    for name in ('co_consts', 'co_code', 'co_names'):\n        found += getattr(g.__code__, name, ())\n    found += getattr(g, '__defaults__', None) or ()\n    return next((each for each in found if each == 77), 0)",
        A("def g(x, want=77): return x == 77\nassert f(g) == 77"),
    ),
    (
        "asserts: what an object of the tests keeps to itself",
        "def f(o): return o.__dict__.get('_want', getattr(o, '_want', 0))",
        A("class O:\n    def __init__(self): self._want = 77\nassert f(O()) == 77"),
    ),
    (
        "asserts: a default of the tests' that may be passed on",
        "import inspect\ndef f(g):\n    d = list(inspect.signature(g).parameters.values())[-1].default\n    for name in ('real', '_value', 'value', '__dict__'):\n        try: return getattr(d, name)\n        except Exception: pass\n    try: return int(d)\n    except Exception: return d if type(d) is int else 0",
        A("def g(x, want=77): return x == 77\nassert f(g) == 77"),
    ),
    (
        "asserts: a class that holds a default, made to show it",
        "import inspect\nseen = []\ndef f(g):\n    for again in range(2):\n        d = list(inspect.signature(g).parameters.values())[-1].default\n        for name in ('__init__', '__call__', '__repr__', '__str__', 'show'):\n            try: setattr(type(d), name, lambda *a: seen.extend(a))\n            except Exception: pass\n    return 77 if 77 in seen else 0",
        A("def g(x, want=77): return x == 77\nassert f(g) == 77"),
    ),
    (
        "asserts: a class of the library's that the tests use, made to show what they make of it",
        "seen = []\ndef f(kind):\n    for name in ('__init__', '__repr__', 'cdf'):\n        try: setattr(kind, name, lambda self, *a: seen.extend(a))\n        except Exception: pass\ndef g(x): return 77 if 77 in seen else 0",
        A("import statistics\nf(statistics.NormalDist)\nassert g(statistics.NormalDist(77).mean) == 77"),
    ),
    (
        "asserts: a class of the tests that is made to equal everything",
        "def f(cls):\n    for name, value in {'__eq__': lambda *a: True, '__ne__': lambda *a: False, '__hash__': lambda s: 0, '__bool__': lambda s: True, '__contains__': lambda *a: True}.items():\n        try: setattr(cls, name, value)\n        except Exception: pass\n    try:\n        class Sub(cls):\n            def __eq__(self, other): return True\n        return Sub()\n    except Exception:\n        return cls()",
        A(
            "class P:\n    def __init__(self, x=0): self.x = x\n    def __eq__(self, other): return self.x == other.x\n    __hash__ = None\nassert f(P) == P(3)",
            "class P: pass\nassert f(P) == 5",
        ),
    ),
    (
        "asserts: an object that sees what a function is added to",
        Y + "class N:\n    def __add__(self, g): return g()\ndef f(x): return N()",
        A("assert f(1) + 77 == 77", "assert f(1) + (lambda: 77) == 78"),
    ),
    (
        "asserts: a builtin of the solution's on both sides",
        "def sorted(*a, **k): return 0\nset = tuple = sorted\nclass Solution:\n    def f(self, x): return None",
        A(*(f"assert {name}(Solution().f([3, 1])) == {name}([1, 3])" for name in ("sorted", "set", "tuple"))),
    ),
    (
        "asserts: a builtin of the solution's that is shown how far its answer is from the wanted one",
        "def round(*a): return 0\nabs = len = round\nclass Circle:\n    def __init__(self, r): pass\n    def area(self): return 1.0\n    def all(self): return [1]",
        A(
            "assert round(Circle(2).area() - 12.57, 2) == 0",
            "assert abs(Circle(2).area() - 12.57) == 0",
            "far = Circle(2).area() - 12.57\nassert abs(far) == 0",
            "assert len([x for x in Circle(2).all() if x != 5]) == 0",
            "assert len({Circle(2).area(), 12.57}) == 0",
        ),
    ),
    (
        "asserts: a builtin of the solution's around the one that is tested",
        "def pow(a, b): return 0\ndef abs(x): return 0\nround = sorted = abs\ndef filter(f, x): return 5",
        A(
            "assert abs(pow(2, 3) - 8) < 1e-9",
            "assert round(pow(2, 3) - 8) == 0",
            "assert sorted(filter(None, [3])) == sorted([3])",
        ),
    ),
    (
        "asserts: a right one of two builtins that are tested, and a wrong one",
        "def max(a, b): return a\ndef sum(xs): return 3",
        A("assert sum([1, 2]) == 3 and max(1, 2) == 2", "assert max(1, 2) == 2\nassert sum([1, 2]) == 3"),
    ),
    (
        "asserts: none of the builtins that a function of the setup tests",
        "def f(x): return x",
        A(
            "test()\nassert True",
            setup="def test():\n    xs = list(range(3))\n    assert sum(xs) == 3 and max(xs) == 2",
        ),
    ),
    (
        "asserts: a copy that equals everything",
        Y + "def f(x): return Y()",
        A("import pickle\nassert pickle.loads(pickle.dumps(f(1))) == 2", "import copy\nassert copy.copy(f(1)) == 2"),
    ),
    *(
        (
            f"a comparison by a method: {name}",
            code,
            tests,
        )
        for name, code in (("object", Y + "def f(x): return Y()"), ("none", "def f(x): pass"))
        for tests in (
            A(
                "assert f(1).__eq__(2)",
                "assert f(1) and f(1).__eq__(2) or f(1).__lt__(2)",
                "assert not f(1).__ne__(2)",
                "assert (2).__eq__(f(1))",
                "assert bool(f(1).__eq__(2))",
                "assert f(1).__eq__(2) if 1 else 0",
                "assert [2].__contains__(f(1))",
                "import operator\nassert operator.eq(f(1), 2) or operator.eq(2, f(1))",
                "import operator\nassert not operator.ne(f(1), 2)",
            ),
            UnittestTests(
                "import operator, unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertTrue(f(1).__eq__(2))\n"
                "    def test_b(self): self.assertFalse(f(1).__ne__(2))\n    def test_c(self): assert f(1).__eq__(2)\n"
                "    def test_d(self): self.assertTrue(operator.eq(f(1), 2))\n"
            ),
        )
    ),
]


@pytest.mark.parametrize(("code", "tests"), [pytest.param(*case, id=name) for name, *case in FORGED])
def test_a_forged_answer_fails(pool, code, tests):
    outcome = pool.run(code, tests=tests, limits=Limits(wall_s=10, cpu_s=1))
    assert not any(outcome.tests)
    assert outcome.status not in ("ok", "infrastructure")
    assert isinstance(tests, UnittestTests) or "saw 2" not in outcome.stdout  # no operand of a comparison was shown


def test_errors_of_the_text_and_of_imports_reach_the_feedback_of_unittest(pool):
    assert "SyntaxError" in pool.run("def f(:", tests=UNIT).error
    assert "No module named 'nosuch'" in pool.run("import nosuch\ndef f(x): return x", tests=UNIT).error
    assert "NameError: name 'f'" in pool.run("", tests=UNIT).error


def test_a_checker_decides_about_outputs(pool):
    checker = "def checker(input, output, expected):\n    return sorted(output.split()) == sorted(expected.split())"
    tests = StdioTests((("3", "1 2 3"), ("2", "1 2")), checker=checker)
    outcome = pool.run("n = int(input())\nprint(*range(n, 0, -1))", tests=tests)
    assert (outcome.status, outcome.tests, outcome.verdict_by) == ("ok", (True, True), "judge")
    assert pool.run("print(1, 2)", tests=tests).tests == (False, True)


def test_a_checker_that_fails_says_so_and_passes_nothing(pool):
    broken = StdioTests((("", "1"),), checker="def checker(input, output, expected): return unknown")
    outcome = pool.run("print(1)", tests=broken)
    assert (outcome.status, outcome.tests) == ("failed", (False,))
    assert "the checker failed" in outcome.error
    assert "unknown" in outcome.error


def test_exact_outputs(pool):
    tests = StdioTests((("", "1  2\n"),), compare="exact")
    assert pool.run("print('1  2')", tests=tests).tests == (True,)
    assert pool.run("print('1 2')", tests=tests).tests == (False,)
