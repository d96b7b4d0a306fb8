# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Solutions that answer nothing right and would have the tests pass: by the objects that they give, which are asked
about the wanted value, and by what they do with the objects that they are given. Not one assertion may pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastgrpo_sandbox import AssertTests, BlockingSandboxPool, CheckTests, Limits, Tests

pytestmark = pytest.mark.jail

Y = "class Y:\n    def __init__(self, *a): pass\n    def __sub__(self, o):\n        print('saw', o)\n        return 0.0\n    __rsub__ = __add__ = __mul__ = __sub__\n    def __contains__(self, o):\n        print('saw', o)\n        return True\n"


def A(*lines: str, setup: str = "") -> AssertTests:
    return AssertTests(lines, setup)


def check(body: str) -> CheckTests:
    return CheckTests("def check(candidate):\n" + "".join(f"    {line}\n" for line in body.splitlines()), "f")


SAME = "def same(got, wanted): return len(got) == len(wanted) and all(a == b for a, b in zip(got, wanted))\nassert "
EMPTY = "class {0}({0}):\n    def __init__(self, *a): pass\n    __iter__ = lambda self: iter(())\n    __len__ = lambda self: 2\ndef f(x): return {0}()"
MOCK = "from unittest.mock import MagicMock\nm = MagicMock()\nr = candidate(m)\n"
FORGED = {
    "a function is a class": (Y + "f = Y", A("assert abs(f(1) - 2.5) < 1e-6")),
    "a method is a class": (
        Y + "class Circle:\n    area = Y",
        A("assert abs(Circle().area() - 2.5) < 1e-6"),
    ),
    "a method is the class that the tests named": (
        Y.replace("Y", "Circle") + "    area = property(lambda self: Circle)",
        A("assert abs(Circle(1).area() - 2.5) < 1e-6"),
    ),
    "a property is the object that the tests made, or another": (
        Y.replace("Y", "Circle").replace("pass", "self.all.append(self)", 1) + "    all = []\n    area = property(lambda self: self)\n    first = property(lambda self: self.all[0])\n    given = None",
        A(
            "assert abs(Circle(1).area - 2.5) < 1e-6",
            "c = Circle(1)\nd = Circle(2)\nassert abs(d.first - 2.5) < 1e-6",
            "c = Circle(1)\nc.given = 3\nassert abs(c.area - 2.5) < 1e-6",
            *(f"assert abs({asked} - 2.5) < 1e-6" for asked in ("Circle(1)[0]", "next(iter(Circle(1)))", "abs(Circle(1))")),
        ),
    ),
    "a method is a type of that class": (
        Y.replace("Y", "Circle") + "    area = property(lambda self: Circle[int])\n    __class_getitem__ = __import__('types').GenericAlias",
        A("assert abs(Circle(1).area() - 2.5) < 1e-6"),
    ),
    "a function gives a class": (Y + "def f(x): return Y", A("assert abs(f(1)(2) - 2.5) < 1e-6")),
    "check: a function gives a class": (Y + "def f(x): return Y", check("assert abs(candidate(1)(2) - 2.5) < 1e-6")),
    "a container of everything": (Y + "def f(x): return Y()", A("assert 2 in f(1)", "assert 'abc' in f(1)")),
    "check: a container of everything": (Y + "def f(x): return Y()", check("assert 2 in candidate(1)")),
    "a number that contains everything": (
        Y.replace("class Y", "class Y(int)").replace("def __init__(self, *a): pass", "") + "def f(x): return Y(3)",
        A("assert 2 in f(1)"),
    ),
    "a text that begins with everything": (
        "class S(str):\n    def startswith(self, *a): return True\n    endswith = __contains__ = startswith\ndef f(x): return S('zz')",
        A("assert f(1).startswith('abc')", "assert f(1).endswith('c')", "assert 'a' in f(1)"),
    ),
    "sets that are above and below every other": (
        "class F(frozenset):\n    def issubset(self, *a): return True\n    issuperset = isdisjoint = issubset\nclass S(set):\n    issubset = issuperset = F.issubset\ndef f(x): return F([1])\ndef g(x): return S([1])",
        A("assert f(1).issubset({5})", "assert g(1).issuperset({5})", "assert f(1).isdisjoint({1})"),
    ),
    "a counter that has two of everything": (
        "from collections import Counter\nclass C(Counter):\n    __iter__ = lambda self: iter(())\n    __getitem__ = __missing__ = lambda self, key: 2\n    __len__ = lambda self: 1\ndef f(x): return C()",
        A(*(f"from collections import Counter\nassert f(1) {sign} Counter(a=2)" for sign in ("==", ">=", ">"))),
    ),
    **{
        f"a {kind} as long as needed that shows nothing": (EMPTY.format(kind), A(f"{SAME}same(f(1), {wanted})"))
        for kind, wanted in {"list": [3, 4], "tuple": (3, 4), "str": "'ab'", "dict": {3: 4, 5: 6}, "set": {3, 4}}.items()
    },
    "a deque as long as needed that shows nothing": (
        "from collections import deque\n" + EMPTY.format("deque"),
        A(f"{SAME}same(f(1), [3, 4])"),
    ),
    "a dict that shows what is right of it": (
        "class D(dict):\n    def items(self): return [('n', 1)]\n    values = keys = lambda self: [1]\ndef f(x): return D(n=1, mean=77)",
        A(
            "r, want = f(1), {'n': 1, 'mean': 5}\nassert len(r) == len(want)\nfor k, v in r.items(): assert want[k] == v",
            "r = f(1)\nassert len(r) == 2 and all(v == w for v, w in zip(r.values(), [1, 5]))",
            "import pytest\nassert f(1) == pytest.approx({'n': 1, 'mean': 5})",
        ),
    ),
    "a counter that shows nothing": (
        "from collections import Counter\nclass C(Counter):\n    most_common = elements = items = lambda self, n=None: []\ndef f(x): return C(a=77)",
        A("r = f(1)\nassert len(r) == 1 and all(n == 2 for _, n in r.most_common())", "assert list(f(1).elements()) == []"),
    ),
    "containers that have no more and no less than what is wanted": (
        "class S(set):\n    difference = symmetric_difference = lambda self, *o: set()\n    intersection = lambda self, *o: set(*o)\nclass L(list):\n    count = lambda self, o: 1\n    index = lambda self, o: 0\ndef f(x): return S([77])\ndef g(x): return L([77])",
        A(
            *("assert not f(1).difference({2})", "assert f(1).symmetric_difference({2}) == set()"),
            "assert f(1).intersection({2}) == {2}",
            *("assert g(1).count(2) == 1", "assert g(1).index(2) == 0"),
        ),
    ),
    "what says that numbers agree": (
        "def isclose(*a, **k): return True\nallclose = array_equal = isclose\ndef f(x): return 77",
        A(*(f"assert {name}(f(1), 2.5)" for name in ("isclose", "allclose", "array_equal"))),
    ),
    "a number that is another at each look": (
        "def f(c):\n    class X:\n        looks = -1\n        def __float__(s):\n            X.looks += 1\n            return -c[0] / c[1] if X.looks == 1 else 0.0\n    return X()",
        A("import math\nc = [3, 5, 7]\nx = f(c)\nassert abs(sum(a * math.pow(x, i) for i, a in enumerate(c))) < 1e-4"),
    ),
    "a loop whose answer ends the tests": (
        "class B:\n    def __bool__(self): raise SystemExit\ndef f(x): return B() if x else True\ndef g(x):\n    if x: raise SystemExit\n    return True",
        A(*(f"for i in range(2):\n    try:\n        assert {name}(i)\n    except BaseException:\n        pass" for name in "fg")),
    ),
    "a class of the library's that came with its object": (
        "kept = []\ndef h(g): kept.append(g)\ndef f(key):\n    try: return type(key)('__code__.co_consts')(kept[0])[-1]\n    except AttributeError: return 0",
        A("from operator import attrgetter\nh(lambda x: x == 77)\nassert f(attrgetter('age')) == 77"),
    ),
    "a text's format that reads everything": (
        "def f(k, g):\n    kind = type.__getattribute__(type(k), '_fastgrpo_class_')\n    try: return int(kind[0].request('get', kind[1], 'format')('{0.__globals__[SECRET]}', g))\n    except AttributeError: return 0",
        A("import enum\nclass C(str, enum.Enum):\n    A = 'a'\nassert f(C.A, lambda x: x) == SECRET", setup="SECRET = 77"),
    ),
    "what a callback was given beforehand": (
        "def f(g):\n    try: return g.args[0]\n    except AttributeError: return g.keywords['want']",
        A(
            "import functools\nassert f(functools.partial(lambda want, x: x == want, 77)) == 77",
            "import functools\nassert f(functools.partial(lambda x, want: x == want, want=77)) == 77",
        ),
    ),
    "a mock's assertion replaced": (
        "def f(m):\n    m.assert_called_once_with = lambda *a, **k: None\n    return 3",
        check(MOCK + "m.assert_called_once_with(5)\nassert r == 3"),
    ),
    "a mock's assertion replaced by its own method": (
        "def f(m):\n    m.configure_mock(assert_called_once_with=lambda *a, **k: None)\n    return 3",
        check(MOCK + "m.assert_called_once_with(5)\nassert r == 3"),
    ),
    "a mock said to be called": (
        "def f(m):\n    m.called, m.call_count = True, 1\n    return 3",
        check(MOCK + "assert m.called\nassert m.call_count == 1"),
    ),
    "a mock that forgets": (
        "def f(m):\n    m(1)\n    try:\n        m.reset_mock()\n    finally:\n        m.mock_calls.clear()",
        check("from unittest.mock import MagicMock\nm = MagicMock()\ntry:\n    candidate(m)\nexcept Exception:\n    pass\nassert not m.called\nassert m.mock_calls == []"),
    ),
    "a context that ends what the tests find in it": (
        "import contextlib\nclass C:\n    def __enter__(self): return self\n    def __exit__(self, *e): return True\n    async def __aenter__(self): return self\n    async def __aexit__(self, *e): return True\n    def get(self): return 0\n@contextlib.contextmanager\ndef g():\n    try: yield C()\n    except BaseException: pass",
        A(
            "with C() as c:\n    same(c.get(), 3)\nassert True",
            "with g() as c:\n    if c.get() != 3: raise AssertionError\nassert True",
            "class D(C): pass\nwith D() as c:\n    same(c.get(), 3)\nassert True",
            "from contextlib import ExitStack\nwith ExitStack() as all_of:\n    same(all_of.enter_context(C()).get(), 3)\nassert True",
            "import asyncio\nasync def main():\n    async with C() as c: same(c.get(), 3)\nasyncio.run(main())\nassert True",
            setup="def same(a, b): assert a == b",
        ),
    ),
    "a method of the library's replaced": (
        "def f(thread): thread.is_alive = lambda: False\n",
        A("import threading\nt = threading.Thread(target=threading.Event().wait, args=(1,))\nt.start()\ntry:\n    f(t)\nexcept AttributeError:\n    pass\nassert not t.is_alive()"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("code", "tests"), [pytest.param(*case, id=name) for name, case in FORGED.items()])
def test_a_forged_object_fails(pool: BlockingSandboxPool, code: str, tests: Tests) -> None:
    outcome = pool.run(code, tests=tests, limits=Limits(wall_s=10, cpu_s=1))
    assert not any(outcome.tests)
    assert outcome.status == "failed"
    assert "saw" not in outcome.stdout  # no operand was shown


def test_numpy_shows_no_wanted_value_and_reads_no_memory() -> None:
    pytest.importorskip("numpy")
    code = "class U:\n    def __array_ufunc__(self, *a, **k):\n        print('saw', a)\n        return True\n    __array_function__ = __array_ufunc__\ndef f(x): return U()\nclass V:\n    __array_interface__ = {'data': (id(0), True), 'shape': (4,), 'typestr': '<i8', 'version': 3}\ndef g(x): return V()"
    asked = ("np.isclose(f(1), 2.5)", "np.array_equal(f(1), [1])", "(f(1) == np.array([1]))", "np.asarray(g(1)).shape == (4,)")  # fmt: skip
    with BlockingSandboxPool(cells=1, preload=("numpy",)) as pool:
        outcome = pool.run(code, tests=A(*(f"import numpy as np\nassert {each}" for each in asked)))
    assert outcome.tests == (False,) * 4
    assert "saw" not in outcome.stdout


RIGHT = """
import enum, functools
class Vec:
    def __init__(self, x): self.x = x
    def __rmul__(self, k): return Vec(self.x * k)
    def __eq__(self, other): return isinstance(other, Vec) and self.x == other.x
    class Unit:
        def __add__(self, n): return n
    __class_getitem__ = classmethod(lambda cls, item: cls)
class Pair:
    def __init__(self, both): self.both = both
    first = property(lambda self: self.both[0])
    def __getitem__(self, i): return self.both[i]
    def __iter__(self): return iter(self.both)
class Name(str):
    def upper(self): return 'UP'
class Box:
    def __init__(self): self.n = 0
    def add(self, n):
        self.n += n
        return self
    def __int__(self): return self.n
class Down(list):
    def __iter__(self): return reversed(self)
    def __len__(self): return 7
    def twice(self): return self
class Pairs(dict):
    def items(self): return sorted(dict.items(self))
    def get(self, key, default=None): return dict.get(self, key.lower(), default)
    __getitem__ = get
class Bag(set):
    def union(self, *others): return Bag(set.union(self, *others))
    def copy(self): return Bag(self)
    def more(self): return self.copy().union([9])
class Odd(list):
    def count(self, item): return 7
def isclose(a, b): return abs(a - b) < 1e-9
def pairs(): return Pairs(b=2, a=1)
def bag(): return Bag([1])
def odd(): return Odd([1])
def down(x): return Down(x)
def box(): return Box()
def name(): return Name('abc')
def kinds(): return [Vec]
class Ends:
    def __init__(self, *kinds): self.kinds, self.seen = kinds, []
    def __enter__(self): return self
    def __exit__(self, kind, error, trace):
        self.seen.append(kind)
        return kind in self.kinds
    async def __aenter__(self): return self
    async def __aexit__(self, *error): return self.__exit__(*error)
def asserts(x): assert x
def report(mock, key, thread):
    mock.send(3)
    mock.sent = thread.daemon = True
    return [key({'age': 4}), thread.name]
"""


def test_right_solutions_of_these_kinds_pass(every_assertion_passes: Callable[..., None]) -> None:
    lines = (
        "assert list(map(Vec, [1])) == [Vec(1)] and 2 * Vec(2) == Vec(4) and Vec.Unit() + 3 == 3",
        "assert 2 * Vec[int](2) == Vec(4)",
        "class Sub(Vec): pass\nassert 2 * Sub(2) == Vec(4)",
        "a, b = Vec(1), Vec(2)\np = Pair([a, b])\nassert p.first is a and 2 * p.first == Vec(2) and p[1] is b and 2 * p[1] == Vec(4) and 2 * a == Vec(2)",
        "assert [2 * v for v in Pair([Vec(1), Vec(2)])] == [Vec(2), Vec(4)]",
        "v = Vec(1)\nv.next = Vec(2)\nassert 2 * v.next == Vec(4) and v.next is v.next and v.next.x == 2 and 2 * v == Vec(2)",
        "with Ends(ZeroDivisionError) as e: 1 / 0\nassert e.seen == [ZeroDivisionError] and Ends().__exit__(None, None, None) is False",
        "with Ends(AssertionError): asserts(0)\nassert Ends(KeyError).__exit__(KeyError, KeyError(), None) is True",
        "import asyncio\nasync def main():\n    async with Ends(AssertionError, KeyError) as e: asserts(0)\n    async with e: {}[1]\n    return e.seen\nassert asyncio.run(main()) == [AssertionError, KeyError]",
        "with Ends() as e:\n    assert e.seen == []\nassert e.seen == [None]",
        "assert kinds()[0](3) == Vec(3) and name() == 'abc' and name().startswith('ab') and 'b' in name()",
        "assert Name('x').upper() == 'UP'",
        "assert list(Down([1, 2])) == [2, 1] and len(Down()) == 7 and down([1, 2]) == [1, 2] and down([3])[0] == 3",
        "d = Down([1, 2])\nassert d.twice() is d and list(d) == [2, 1]",
        "assert list(pairs().items()) == [('b', 2), ('a', 1)] and pairs()['A'] == 1 and pairs().get('B') == 2 and pairs().copy() == {'a': 1, 'b': 2}",
        "p = Pairs(b=2, a=1)\nassert p.items() == [('a', 1), ('b', 2)] and sorted(p.values()) == [1, 2]",
        "p = pairs()\np['c'] = 3\nassert len(p) == 3 and sorted(p.keys()) == ['a', 'b', 'c'] and dict(p) == {'a': 1, 'b': 2, 'c': 3}",
        "assert bag().copy().more() == {1, 9} and bag().union({2}).more() == {1, 2, 9}",
        "assert bag().union({2}) == {1, 2} and Bag([1]).union({2}) == {1, 2} and odd().count(1) == 1 and Odd().count(3) == 7",
        "assert isclose(1.0, 1.0 + 1e-12) and not isclose(1, 2)",
        "b = box()\nassert int(b.add(1)) == 1 and int(b.add(2)) == 3",
        "import threading\nfrom operator import itemgetter\nfrom unittest.mock import MagicMock\nm, t = MagicMock(), threading.Thread(name='T')\nassert report(m, itemgetter('age'), t) == [4, 'T'] and t.daemon and m.sent\nm.send.assert_called_once_with(3)",
    )
    every_assertion_passes(RIGHT, "", lines)
