# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Right but unusual solutions: each passes in one process and must pass judged, too."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, CheckTests, StdioTests, UnittestTests

pytestmark = pytest.mark.jail


def check(body: str, setup: str = "") -> CheckTests:
    return CheckTests("def check(candidate):\n" + "".join(f"    {line}\n" for line in body.splitlines()), "f", setup)


def A(*lines: str, setup: str = "") -> AssertTests:
    return AssertTests(lines, setup)


def S(expected: str) -> StdioTests:
    return StdioTests((("", expected),))


X = check("assert candidate(3) == 4")
RIGHT = [
    (
        "decorator",
        "import functools\ndef d(g):\n    @functools.wraps(g)\n    def w(*a): return g(*a)\n    return w\n@d\ndef f(x): return x + 1",
        X,
    ),
    (
        "lru_cache recursion 5000",
        "import sys\nsys.setrecursionlimit(20000)\nfrom functools import lru_cache\n@lru_cache(None)\ndef f(n): return 0 if n == 0 else f(n-1) + 1",
        check("assert candidate(5000) == 5000"),
    ),
    (
        "recursion 990 at the default limit",
        "def f(n): return 0 if n == 0 else f(n-1) + 1",
        check("assert candidate(990) == 990"),
    ),
    (
        "recursion 970 at the default limit",
        "def f(n): return 0 if n == 0 else f(n-1) + 1",
        check("assert candidate(970) == 970"),
    ),
    (
        "sorted by recursive key via C",
        "import sys\nsys.setrecursionlimit(10**5)\ndef g(n): return 0 if n == 0 else max(map(g, [n-1])) + 1\ndef f(n): return g(n)",
        check("assert candidate(3000) == 3000"),
    ),
    ("async inside", "import asyncio\nasync def g(x): return x + 1\ndef f(x): return asyncio.run(g(x))", X),
    ("a last act at the end", "class A:\n    def __del__(self): print(2)\na = A()", S("2")),
    ("a generator's last act", "def g():\n    try: yield\n    finally: print(2)\nx = g()\nnext(x)", S("2")),
    (
        "output collected, then written",
        "import io, sys\nout, sys.stdout = sys.stdout, io.StringIO()\nprint(2)\nout.write(sys.stdout.getvalue())",
        S("2"),
    ),
    ("lambda", "f = lambda x: x + 1", X),
    ("builtin as solution", "f = len", check("assert candidate([1,2]) == 2")),
    (
        "dataclass attribute",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int\ndef f(x): return P(x)",
        A("assert f(3).a == 3"),
    ),
    (
        "set item of an object",
        "class N:\n    def __init__(self): self.d = {}\n    def __setitem__(self, k, v): self.d[k] = v\n    def __getitem__(self, k): return self.d[k]\ndef f(): return N()",
        A("a = f()\na['x'] = 2\nassert a['x'] == 2"),
    ),
    (
        "operators of an object",
        "class V:\n    def __init__(self, v): self.v = v\n    def __add__(self, o): return V(self.v + o.v)\n    def __eq__(self, o): return self.v == o.v\n    def __lt__(self, o): return self.v < o.v",
        A("assert (V(1) + V(2)).v == 3", "assert V(1) < V(2)", "assert V(1) == V(1)"),
    ),
    ("isinstance of a solution's class", "class C: pass\ndef f(): return C()", A("assert isinstance(f(), C)")),
    (
        "dict subclass with methods",
        "class D(dict):\n    def total(self): return sum(self.values())\ndef f(): return D(a=1, b=2)",
        A("assert f().total() == 3"),
    ),
    (
        "typing.NamedTuple attribute",
        "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\ndef f(): return P(1)",
        A("assert f().x == 1"),
    ),
    (
        "defaultdict",
        "from collections import defaultdict\ndef f(s):\n    d = defaultdict(list)\n    d['a'].append(1)\n    return d",
        A("assert f('x') == {'a': [1]}"),
    ),
    (
        "deque == deque",
        "from collections import deque\ndef f(): return deque([1,2])",
        A("assert f() == deque([1,2])", setup="from collections import deque"),
    ),
    ("dict items view sorted", "def f(d): return d.items()", A("assert sorted(f({'a': 1})) == [('a', 1)]")),
    (
        "Decimal",
        "from decimal import Decimal\ndef f(): return Decimal('1.50')",
        A("assert f() == Decimal('1.5')", setup="from decimal import Decimal"),
    ),
    ("Fraction", "from fractions import Fraction\ndef f(): return Fraction(1, 2)", A("assert f() == 0.5")),
    (
        "date answer",
        "import datetime\ndef f(): return datetime.date(2020, 1, 1)",
        A("assert f() == datetime.date(2020, 1, 1)", setup="import datetime"),
    ),
    (
        "IntEnum and Enum",
        "from enum import Enum, IntEnum\nclass C(IntEnum):\n    RED = 1\nclass D(Enum):\n    X = 'x'\ndef f(): return C.RED\ndef g(): return D.X",
        A("assert f() == 1", "assert g().value == 'x'", "assert g() == D.X", "assert f().name == 'RED'"),
    ),
    (
        "array.array",
        "import array\ndef f(): return array.array('i', [1,2])",
        A("assert list(f()) == [1,2]", "assert f() == array.array('i', [1,2])", setup="import array"),
    ),
    (
        "bytes, complex, inf, nan",
        "import math\ndef f(): return (b'x', 1+2j, float('inf'))\ndef g(): return float('nan')",
        A("assert f() == (b'x', 1+2j, float('inf'))", "assert g() != g()"),
    ),
    (
        "zip/map/filter/enumerate objects",
        "def f(): return zip([1], [2])\ndef g(): return map(str, [1])",
        A("assert list(f()) == [(1, 2)]", "assert list(g()) == ['1']"),
    ),
    ("reversed twice", "def f(): return reversed([1,2])", A("assert list(f()) == [2,1]")),
    (
        "sort objects by key",
        "class P:\n    def __init__(self, a): self.a = a\ndef f(): return [P(2), P(1)]",
        A("assert sorted(f(), key=lambda p: p.a)[0].a == 1"),
    ),
    (
        "function argument from setup",
        "def f(g, x): return g(x)",
        A("assert f(inc, 3) == 4", setup="def inc(x): return x + 1"),
    ),
    (
        "iterator argument",
        "def f(it): return sum(it)",
        A("assert f(iter([1,2])) == 3", "assert f(x for x in [1,2]) == 3", "assert f(map(int, '12')) == 3"),
    ),
    (
        "deque argument",
        "def f(v): return sum(v)",
        A("assert f(deque([1])) == 1", setup="from collections import deque"),
    ),
    (
        "custom exception subclass of ValueError",
        "class Bad(ValueError): pass\ndef f(x): raise Bad('no')",
        check("try:\n    candidate(1)\n    assert False\nexcept ValueError:\n    pass"),
    ),
    (
        "exception chain message",
        "def f(x): raise ValueError('bad ' + str(x))",
        check(
            "try:\n    candidate(1)\n    assert False\nexcept ValueError as e:\n    text = str(e)\nassert text == 'bad 1'"
        ),
    ),
    (
        "OSError subclass attribute",
        "def f(x): return open('/nope')",
        check("try:\n    candidate(1)\nexcept FileNotFoundError as e:\n    no = e.errno\nassert no == 2"),
    ),
    ("the same object returned", "def f(x):\n    x.append(1)\n    return x", check("v = []\nassert candidate(v) is v")),
    (
        "global state",
        "n = 0\ndef f(x):\n    global n\n    n += 1\n    return n",
        check("assert candidate(1) == 1\nassert candidate(1) == 2"),
    ),
    (
        "from __future__ + undefined hints",
        "from __future__ import annotations\ndef f(x: List[int]) -> Foo: return x + 1",
        X,
    ),
    ("tabs", "def f(x):\n\tif x:\n\t\treturn x + 1", X),
    ("form feed, no newline at end", "\x0cdef f(x): return x + 1", X),
    ("deep expression", "def f(x): return " + "(" * 90 + "x" + ")" * 90 + " + 1", X),
    (
        "typing generics, TypeVar",
        "from typing import Generic, TypeVar\nT = TypeVar('T')\nclass B(Generic[T]):\n    def __init__(self, v: T): self.v = v\ndef f(x): return B[int](x).v + 1",
        X,
    ),
    (
        "stdout redirected in test",
        "def f(x): print('hi', x)",
        check(
            "import io, contextlib\nb = io.StringIO()\nwith contextlib.redirect_stdout(b): candidate(1)\nassert b.getvalue() == 'hi 1\\n'"
        ),
    ),
    ("exit() called", "print('a')\nexit()", StdioTests((("", "a"),))),
    ("sys.exit()", "import sys\nprint('a')\nsys.exit()", StdioTests((("", "a"),))),
    (
        "a thread whose stack is as large as the memory",
        "import threading\nthreading.stack_size(2**29 - 4096)\ndef main(): print(int(input()) + 1)\nt = threading.Thread(target=main)\nt.start()\nt.join()",
        StdioTests((("3\n", "4"),)),
    ),
    (
        "main in a thread, not joined",
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\ndef main():\n    import time; time.sleep(0.1)\n    print(int(input()) + 1)\nthreading.Thread(target=main).start()",
        StdioTests((("3\n", "4"),)),
    ),
    ("open(1, 'w') not closed", "out = open(1, 'w', closefd=False)\nout.write('a')", StdioTests((("", "a"),))),
    ("open(0).read()", "print(sum(map(int, open(0).read().split())))", StdioTests((("1 2\n3", "6"),))),
    (
        "FastIO template",
        "import sys, os\nfrom io import BytesIO, IOBase\nBUFSIZE = 8192\nclass FastIO(IOBase):\n    newlines = 0\n    def __init__(self, file):\n        self._fd = file.fileno(); self.buffer = BytesIO(); self.writable = 'x' in file.mode or 'r' not in file.mode; self.write = self.buffer.write if self.writable else None\n    def read(self):\n        while True:\n            b = os.read(self._fd, max(os.fstat(self._fd).st_size, BUFSIZE))\n            if not b: break\n            ptr = self.buffer.tell(); self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)\n        self.newlines = 0\n        return self.buffer.read()\n    def readline(self):\n        while self.newlines == 0:\n            b = os.read(self._fd, max(os.fstat(self._fd).st_size, BUFSIZE)); self.newlines = b.count(b'\\n') + (not b)\n            ptr = self.buffer.tell(); self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)\n        self.newlines -= 1\n        return self.buffer.readline()\n    def flush(self):\n        if self.writable: os.write(self._fd, self.buffer.getvalue()); self.buffer.truncate(0), self.buffer.seek(0)\nclass IOWrapper(IOBase):\n    def __init__(self, file):\n        self.buffer = FastIO(file); self.flush = self.buffer.flush; self.writable = self.buffer.writable\n        self.write = lambda s: self.buffer.write(s.encode('ascii')); self.read = lambda: self.buffer.read().decode('ascii'); self.readline = lambda: self.buffer.readline().decode('ascii')\nsys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)\ninput = lambda: sys.stdin.readline().rstrip('\\r\\n')\nn = int(input())\nprint(n + 1)",
        StdioTests((("3\n", "4"),)),
    ),
    ("trailing spaces per line", "print('1 2 ')\nprint()", StdioTests((("", "1 2\n"),))),
    ("unicode output", "print('é→😀')", StdioTests((("", "é→😀"),))),
    (
        "ThreadPoolExecutor(16)",
        "from concurrent.futures import ThreadPoolExecutor\ndef f(x):\n    with ThreadPoolExecutor(16) as p: return list(p.map(lambda y: y + 1, [x]*16))[0]",
        X,
    ),
    ("inspect.getsource", "import inspect\ndef f(x): return len(inspect.getsource(f).splitlines()) + x", X),
    (
        "sys.argv / sys.modules[__name__]",
        "import sys\nm = sys.modules[__name__]\ndef f(x): return m.g(x)\ndef g(x): return x + 1",
        X,
    ),
    ("eval/exec using globals", "exec('def f(x): return x + 1')", X),
    (
        "zoneinfo",
        "from zoneinfo import ZoneInfo\nimport datetime\ndef f(x): return datetime.datetime(2020,1,1,tzinfo=ZoneInfo('Europe/Paris')).utcoffset().seconds // 3600 + x",
        check("assert candidate(3) == 4"),
    ),
    (
        "str of 5000 digits in the test",
        "def f(n): return 10 ** n",
        check("import sys\nsys.set_int_max_str_digits(0)\nassert len(str(candidate(5000))) == 5001"),
    ),
    (
        "list of 10**6 ints",
        "def f(v): return sum(v)",
        check("assert candidate(list(range(10**6))) == sum(range(10**6))"),
    ),
    (
        "string of 10**7, then others",
        "def f(v): return len(v)",
        check("assert candidate('x' * 10**7) == 10**7\nassert candidate([1]) == 1"),
    ),
    ("cyclic answer", "def f():\n    a = [1]\n    a.append(a)\n    return a", A("assert f()[0] == 1")),
    (
        "keyword-only, *args",
        "def f(*a, k=1, **kw): return sum(a) + k + kw.get('z', 0)",
        A("assert f(1, 2, k=3, z=4) == 10"),
    ),
    (
        "class attributes and static methods",
        "class C:\n    K = 5\n    @staticmethod\n    def s(x): return x + 1\n    @classmethod\n    def c(cls): return cls.K\n    @property\n    def p(self): return 7",
        A("assert C.K == 5", "assert C.s(1) == 2", "assert C.c() == 5", "assert C().p == 7"),
    ),
    (
        "hasattr / getattr default",
        "class C: pass\ndef f(): return C()",
        A("assert not hasattr(f(), 'x')", "assert getattr(f(), 'x', 3) == 3"),
    ),
    (
        "solution's own generator compared twice",
        "def f():\n    yield from [1,2]",
        A(
            "assert sum(f()) == 3",
            "assert max(f()) == 2",
            "assert ''.join(map(str, f())) == '12'",
            "a, b = f()\nassert (a, b) == (1, 2)",
        ),
    ),
    (
        "format of an object",
        "class C:\n    def __str__(self): return 'c'\n    def __format__(self, s): return 'fmt'\n    def __int__(self): return 5\n    def __float__(self): return 5.0\n    def __hash__(self): return 7\n    def __neg__(self): return -5\ndef f(): return C()",
        A("assert f'{f()}' == 'fmt'", "assert int(f()) == 5", "assert hash(f()) == 7", "assert -f() == -5"),
    ),
    (
        "solution redefines a builtin and more",
        "class Pair:\n    def __init__(self, a): self.a = a\ndef sum(p): return p.a",
        A("assert sum(Pair(3)) == 3"),
    ),
    (
        "a function named like a builtin",
        "def sum(a, b): return a + b",
        A(
            *("assert sum(1, 2) == 3", "assert 3 == sum(1, 2)", "assert 3 > sum(1, 1)", "assert not sum(0, 0)"),
            *(
                "assert abs(sum(1, 2) - 3) < 1e-6",
                "assert round(sum(1.0, 2.0), 2) == 3",
                "assert str(sum(1, 2)) == '3'",
            ),
            *("x = [1, 2]\nassert sum(*x) == 3", "assert sum(2 * 3, int('4')) == 10", "assert sum(sum(1, 2), 3) == 6"),
            *("for i in range(3):\n    assert sum(i, 1) == i + 1", "assert [sum(1, 2), sum(2, 3)] == [3, 5]"),
            "same(sum(1, 2), 3)\nassert True",
            setup="def same(a, b):\n    assert a == b",
        ),
    ),
    (
        "two functions that are named like builtins",
        "def sum(a, b): return a + b\ndef max(a, b): return a if a > b else b",
        A("assert sum(1, 2) == 3 and max(1, 2) == 2", "assert sum(max(1, 2), 2) == 4"),
    ),
    (
        "two functions that are named like builtins, in a function of the setup",
        "def sum(a, b): return a + b\ndef max(a, b): return a if a > b else b",
        A(
            "test()\nassert True",
            setup="def test():\n    xs = list(range(3))\n    assert sum(xs, [3]) == [0, 1, 2, 3]\n    assert max(1, 2) == 2",
        ),
    ),
    (
        "builtins of objects of the solution's",
        "class Stack:\n    def __len__(self): return 3\n    def __iter__(self): return iter([2, 1])\n    def top(self): return [3, 1]",
        A(
            *("assert len(Stack()) == 3", "assert list(Stack()) == [2, 1]", "assert sorted(Stack()) == [1, 2]"),
            *("assert sorted(Stack().top()) == sorted([1, 3])", "assert abs(len(Stack()) - 3) == 0"),
        ),
    ),
    (
        "unittest: expectedFailure, skip, subTest",
        "def f(x): return x + 1",
        UnittestTests(
            "import unittest\nclass T(unittest.TestCase):\n    @unittest.expectedFailure\n    def test_a(self): self.assertEqual(f(1), 3)\n    def test_b(self):\n        for i in range(3):\n            with self.subTest(i=i): self.assertEqual(f(i), i + 1)\n    @unittest.skip('no')\n    def test_c(self): pass\n"
        ),
    ),
    (
        "unittest: setUpClass, setUpModule, tearDown",
        "def f(x): return x + K",
        UnittestTests(
            "import unittest\ndef setUpModule():\n    global K\n    K = 1\nclass T(unittest.TestCase):\n    @classmethod\n    def setUpClass(cls): cls.z = 2\n    def setUp(self): self.q = 1\n    def test_a(self): self.assertEqual(f(1), self.z)\n"
        ),
    ),
    (
        "unittest: patch('__main__.g')",
        "def g(): return 1\ndef f(x): return g()",
        UnittestTests(
            "import unittest\nfrom unittest.mock import patch\nclass T(unittest.TestCase):\n    @patch('__main__.g', return_value=9)\n    def test_a(self, p): self.assertEqual(f(3), 9)\n"
        ),
    ),
    (
        "unittest: decorated test class / loop-made tests",
        "def f(x): return x + 1",
        UnittestTests(
            "import unittest\nclass T(unittest.TestCase):\n    pass\nfor i in range(2):\n    setattr(T, f'test_{i}', lambda self, i=i: self.assertEqual(f(i), i + 1))\n"
        ),
    ),
    (
        "list subclass attr+mutation",
        "class L(list):\n    def __init__(self, *a):\n        super().__init__(*a); self.tag='t'\n    def push(self, x): self.append(x)\ndef f(): return L([1,2])",
        A(
            "x = f()\nassert x == [1,2] and x.tag == 't'",
            "x = f()\nx.push(3)\nassert x == [1,2,3]",
            "x = f()\nx.append(9)\nassert len(x) == 3",
            "assert isinstance(f(), list)",
        ),
    ),
    (
        "str subclass",
        "class T(str):\n    def shout(self): return self.upper() + '!'\ndef f(): return T('a')",
        A("assert f() == 'a'", "assert f().shout() == 'A!'", "assert f() + 'b' == 'ab'"),
    ),
    (
        "int subclass",
        "class I(int):\n    def double(self): return I(self * 2)\ndef f(): return I(4)",
        A("assert f() == 4", "assert f().double() == 8", "assert f() + 1 == 5", "assert abs(f() - 4) < 1e-6"),
    ),
    (
        "Counter answers",
        "from collections import Counter\ndef f(s): return Counter(s)",
        A(
            "assert f('aab') == Counter('aba')",
            "assert f('aab') == {'a': 2, 'b': 1}",
            "assert f('aab').most_common(1) == [('a', 2)]",
            "assert f('aab')['z'] == 0",
        ),
    ),
    (
        "Counter subclass",
        "from collections import Counter\nclass C(Counter):\n    def top(self): return max(self, key=self.get)\ndef f(s): return C(s)",
        A(
            "assert f('aab') == {'a': 2, 'b': 1}",
            "assert f('aab').top() == 'a'",
            "assert f('aab').most_common(1) == [('a', 2)]",
        ),
    ),
    (
        "OrderedDict",
        "from collections import OrderedDict\ndef f():\n    d = OrderedDict(a=1, b=2)\n    d.move_to_end('a')\n    return d",
        A(
            "assert f() == OrderedDict([('b', 2), ('a', 1)])",
            "assert list(f()) == ['b', 'a']",
            setup="from collections import OrderedDict",
        ),
    ),
    (
        "defaultdict factory",
        "from collections import defaultdict\ndef f():\n    return defaultdict(int, a=1)",
        A("d = f()\nassert d['q'] == 0", "assert f().default_factory is int"),
    ),
    (
        "a tree of defaultdicts, which share what makes them",
        "from collections import defaultdict\ndef tree(): return defaultdict(tree)\ndef f():\n    made = tree()\n    made['a']['b'] = 1\n    return made\ndef g(): return 1",
        A(
            "assert f() == {'a': {'b': 1}}",
            "d = f()\nd['c']['d'] = 2\nassert d == {'a': {'b': 1}, 'c': {'d': 2}}",
            "assert g() == 1",
        ),
    ),
    (
        "dict views",
        "def f(d): return d.keys()\ndef g(d): return d.values()",
        A("assert f({'a': 1}) == {'a'}", "assert list(g({'a': 1})) == [1]", "assert 'a' in f({'a': 1})"),
    ),
    (
        "datetime family",
        "import datetime as D\ndef f(): return D.datetime(2020,1,2,3,4,5,6,tzinfo=D.timezone.utc)\ndef g(): return D.timedelta(days=1, seconds=2)\ndef h(): return D.time(1,2)",
        A(
            "assert f() == datetime.datetime(2020,1,2,3,4,5,6,tzinfo=datetime.timezone.utc)",
            "assert g().total_seconds() == 86402",
            "assert h() == datetime.time(1,2)",
            "assert g() == timedelta(days=1, seconds=2)",
            setup="import datetime\nfrom datetime import timedelta",
        ),
    ),
    (
        "stdlib names not imported",
        "import math\nfrom math import isclose\nfrom collections import deque\nfrom decimal import Decimal\ndef f(): return 0.1 + 0.2\ndef g(): return deque([1])\ndef h(): return Decimal('1.0')",
        A(
            "assert math.isclose(f(), 0.3)",
            "assert isclose(f(), 0.3)",
            "assert g() == deque([1])",
            "assert h() == Decimal(1)",
        ),
    ),
    (
        "namedtuple factory",
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        A(
            "assert f() == (1, 2)",
            "assert f().y == 2",
            "assert f() == P(1, 2)",
            "assert f()._replace(x=5) == (5, 2)",
            "a, b = f()\nassert a + b == 3",
            "assert f()._asdict() == {'x': 1, 'y': 2}",
            "assert isinstance(f(), tuple)",
            "assert repr(f()) == 'P(x=1, y=2)'",
        ),
    ),
    (
        "dataclass eq/repr/order",
        "from dataclasses import dataclass\n@dataclass(order=True, frozen=True)\nclass P:\n    a: int\n    b: int = 0\ndef f(x): return P(x)",
        A(
            "assert f(1) == P(1)",
            "assert f(1) != P(2)",
            "assert f(1) < P(2)",
            "assert repr(f(1)) == 'P(a=1, b=0)'",
            "assert sorted([P(3), P(1)])[0] == P(1)",
            "assert len({P(1), P(1), P(2)}) == 2",
            "assert max(P(1), P(4)).a == 4",
        ),
    ),
    (
        "Enum class ops",
        "from enum import Enum, Flag\nclass D(Enum):\n    X = 'x'\n    Y = 'y'\ndef g(s): return D(s)",
        A(
            "assert g('x') is D.X",
            "assert D.X is g('x')",
            "assert D.X == g('x') and D.Y != g('x') and D.Y is not g('x')",
            "assert D['Y'].value == 'y'",
            "assert [d.name for d in D] == ['X', 'Y']",
            "assert len(D) == 2",
            "assert D.X in D",
            "assert D('y') == D.Y",
            "assert g('x') != D.Y",
            "assert {D.X: 1}[g('x')] == 1",
            "assert str(D.X) == 'D.X'",
            "assert isinstance(g('x'), D)",
        ),
    ),
    (
        "sets of tuples, frozenset",
        "def f(): return {(1, 2), (3, 4)}\ndef g(): return {frozenset({1}): [1]}",
        A("assert f() == {(3, 4), (1, 2)}", "assert g() == {frozenset([1]): [1]}"),
    ),
    (
        "ranges, slices",
        "def f(): return range(3)\ndef g(): return slice(1, 2)",
        A("assert f() == range(3)", "assert [1,2,3][g()] == [2]"),
    ),
    (
        "types as arguments and answers",
        "def f(t, x): return t(x)\ndef g(x): return type(x)",
        A(
            "assert f(int, '3') == 3",
            "assert f(list, 'ab') == ['a', 'b']",
            "assert g(3) is int",
            "assert g([]) == list",
            "assert f(ValueError, 'x').args == ('x',)",
        ),
    ),
    (
        "JSONDecodeError is ValueError",
        "import json\ndef f(s): return json.loads(s)",
        check(
            "try:\n    candidate('{')\n    assert False\nexcept ValueError as e:\n    got = e\nassert got.pos == 1\nassert 'Expecting' in str(got)\nimport json\ntry:\n    candidate('[')\n    assert False\nexcept json.JSONDecodeError:\n    pass"
        ),
    ),
    (
        "exception attributes",
        "class Broke(Exception):\n    def __init__(self, need):\n        super().__init__(f'need {need}')\n        self.need = need\ndef f(x): raise Broke(x)",
        A(
            "try:\n    f(3)\nexcept Broke as e:\n    got = e\nassert got.need == 3",
            "try:\n    f(3)\nexcept Exception as e:\n    got = str(e)\nassert got == 'need 3'",
            "try:\n    f(3)\nexcept Exception as e:\n    got = type(e).__name__\nassert got == 'Broke'",
        ),
    ),
    (
        "exception hierarchy",
        "class Base(Exception): pass\nclass Sub(Base, KeyError): pass\ndef f(): raise Sub('k')",
        A(
            "ok = 0\ntry:\n    f()\nexcept Base:\n    ok = 1\nassert ok",
            "ok = 0\ntry:\n    f()\nexcept KeyError:\n    ok = 1\nassert ok",
            "ok = 0\ntry:\n    f()\nexcept LookupError:\n    ok = 1\nassert ok",
            "assert issubclass(Sub, Base)",
        ),
    ),
    (
        "StopIteration from next(f())",
        "def f(): return iter([])",
        A("try:\n    next(f())\n    ok = 0\nexcept StopIteration:\n    ok = 1\nassert ok", "assert next(f(), 7) == 7"),
    ),
    (
        "SystemExit caught",
        "import sys\ndef f(): sys.exit(3)",
        check("try:\n    candidate()\n    code = 0\nexcept SystemExit as e:\n    code = e.code\nassert code == 3"),
    ),
    (
        "attribute set and del",
        "class C:\n    def __init__(self): self.x = 1\n    def get(self): return self.x",
        A(
            "c = C()\nc.x = 5\nassert c.get() == 5",
            "c = C()\ndel c.x\nassert not hasattr(c, 'x')",
            "c = C()\nc.x += 2\nassert c.x == 3",
            "c = C()\nsetattr(c, 'y', [1])\nassert c.y == [1]",
        ),
    ),
    (
        "mutating a fetched container",
        "class S:\n    def __init__(self): self.items = []; self.d = {}\n    def n(self): return len(self.items) + len(self.d)",
        A(
            "s = S()\ns.items.append(1)\nassert s.n() == 1",
            "s = S()\ns.d['x'] = 1\nassert s.n() == 1",
            "s = S()\ns.items += [1, 2]\nassert s.n() == 2",
        ),
    ),
    (
        "operators",
        "class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)\n    def __sub__(self, o): return V(self.x - o.x)\n    def __mul__(self, k): return V(self.x * k)\n    __rmul__ = __mul__\n    def __neg__(self): return V(-self.x)\n    def __abs__(self): return abs(self.x)\n    def __eq__(self, o): return isinstance(o, V) and self.x == o.x\n    def __hash__(self): return hash(self.x)\n    def __bool__(self): return self.x != 0\n    def __getitem__(self, i): return self.x + i\n    def __call__(self, y): return self.x + y\n    def __matmul__(self, o): return self.x * o.x\n    def __iadd__(self, o):\n        self.x += o.x\n        return self\n    def __radd__(self, o): return self if o == 0 else NotImplemented\ndef f(): return V(2)",
        A(
            "assert V(1) + V(2) == V(3)",
            "assert V(2) * 3 == V(6)",
            "assert 3 * V(2) == V(6)",
            "assert -V(1) == V(-1)",
            "assert abs(V(-4)) == 4",
            "assert not V(0)",
            "assert V(1)",
            "assert V(1)[4] == 5",
            "assert V(1)(4) == 5",
            "assert V(2) @ V(3) == 6",
            "v = V(1)\nv += V(2)\nassert v.x == 3",
            "assert sum([V(1), V(2)]) == V(3)",
            "assert (f() + f()).x == 4",
            "assert V(1) != V(2)",
            "assert V(1) in [V(1)]",
            "assert len({V(1), V(1)}) == 1",
            "assert f() - V(1) == V(1)",
        ),
    ),
    (
        "in / contains",
        "class C:\n    def __contains__(self, x): return x == 3\nclass D:\n    def __iter__(self): return iter([1, 2])\nclass E:\n    def __getitem__(self, i): return [5, 6][i]\ndef g(): return D()\ndef h(): return E()",
        A(
            "assert 3 in C()",
            "assert 4 not in C()",
            "assert 2 in g()",
            "assert 5 in h()",
            "assert 9 not in h()",
            "assert list(h()) == [5, 6]",
        ),
    ),
    (
        "with",
        "class M:\n    def __init__(self): self.log = []\n    def __enter__(self):\n        self.log.append('in')\n        return self\n    def __exit__(self, t, v, tb):\n        self.log.append(t.__name__ if t else 'out')\n        return True",
        A(
            "with M() as m:\n    pass\nassert m.log == ['in', 'out']",
            "with M() as m:\n    raise ValueError\nassert m.log == ['in', 'ValueError']",
        ),
    ),
    (
        "contextmanager function",
        "import contextlib\n@contextlib.contextmanager\ndef f(x):\n    yield x + 1",
        A("with f(1) as v:\n    pass\nassert v == 2"),
    ),
    (
        "isinstance, inheritance",
        "class A1: pass\nclass B1(A1): pass\ndef f(): return B1()",
        A(
            "assert isinstance(f(), A1)",
            "assert type(f()) is B1",
            "assert type(f()).__name__ == 'B1'",
            "assert not isinstance(A1(), B1)",
            "assert issubclass(B1, A1)",
            "assert isinstance(f(), (int, B1))",
        ),
    ),
    (
        "generators",
        "def f(n):\n    got = yield 1\n    yield got\ndef g(n):\n    for i in range(n): yield i",
        A(
            "it = f(1)\nnext(it)\nassert it.send(5) == 5",
            "assert sum(x for x in g(4)) == 6",
            "import types\nassert isinstance(g(2), types.GeneratorType)",
            "from collections.abc import Iterator\nassert isinstance(g(2), Iterator)",
            "assert [*g(3)] == [0, 1, 2]",
            "import itertools\nassert list(itertools.islice(g(100), 2)) == [0, 1]",
            "assert dict(zip('ab', g(2))) == {'a': 0, 'b': 1}",
            "it = g(3)\nit.close()\nassert list(it) == []",
        ),
    ),
    (
        "coroutines",
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1\nasync def g(n):\n    for i in range(n): yield i\nclass C:\n    async def m(self): return 4\n    async def __aenter__(self): return 9\n    async def __aexit__(self, *a): pass",
        A(
            "import asyncio\nassert asyncio.run(f(1)) == 2",
            "import asyncio\nasync def main():\n    return await asyncio.gather(f(1), f(2))\nassert asyncio.run(main()) == [2, 3]",
            "import asyncio\nasync def main():\n    return [x async for x in g(3)]\nassert asyncio.run(main()) == [0, 1, 2]",
            "import asyncio\nassert asyncio.run(C().m()) == 4",
            "import asyncio\nasync def main():\n    async with C() as c: return c\nassert asyncio.run(main()) == 9",
            "assert asyncio.run(f(1)) == 2",
        ),
    ),
    (
        "async def with check",
        "async def f(x): return x + 1",
        check(
            "import asyncio\nassert asyncio.run(candidate(3)) == 4\nassert asyncio.new_event_loop().run_until_complete(candidate(1)) == 2"
        ),
    ),
    (
        "setup class as argument",
        "def f(p):\n    p.b = p.a + p.double()\n    return p.b\ndef g(p): return p\ndef h(n):\n    out = []\n    while n:\n        out.append(n.val); n = n.next\n    return out",
        A(
            "p = P(3)\nassert f(p) == 9\nassert p.b == 9",
            "p = P(1)\nassert g(p) is p",
            "assert h(N(1, N(2))) == [1, 2]",
            setup="class P:\n    def __init__(self, a): self.a = a\n    def double(self): return self.a * 2\nclass N:\n    def __init__(self, val, next=None): self.val, self.next = val, next",
        ),
    ),
    (
        "setup class itself as argument",
        "def f(c, x): return c(x).a",
        A("assert f(P, 3) == 3", setup="class P:\n    def __init__(self, a): self.a = a"),
    ),
    (
        "linked list reversed",
        "def f(head):\n    prev = None\n    while head:\n        head.next, prev, head = prev, head, head.next\n    return prev",
        check(
            "n = N(1, N(2, N(3)))\nr = candidate(n)\nout = []\nwhile r:\n    out.append(r.val)\n    r = r.next\nassert out == [3, 2, 1]",
            setup="class N:\n    def __init__(self, val, next=None): self.val, self.next = val, next",
        ),
    ),
    (
        "callables as arguments",
        "def f(g, xs): return [g(x) for x in xs]\ndef k(xs, key): return sorted(xs, key=key)\ndef compose(a, b): return lambda x: a(b(x))",
        A(
            "assert f(lambda x: x * 2, [1, 2]) == [2, 4]",
            "assert f(len, ['a', 'bb']) == [1, 2]",
            "assert k([3, 1], key=lambda x: -x) == [3, 1]",
            "assert compose(str, abs)(-3) == '3'",
            "import operator\nassert f(operator.neg, [1]) == [-1]",
            "import math\nassert f(math.sqrt, [4]) == [2.0]",
            "assert f(str.upper, ['a']) == ['A']",
            "calls = []\nf(calls.append, [1, 2])\nassert calls == [1, 2]",
        ),
    ),
    (
        "callback that raises",
        "def f(g):\n    try: g()\n    except ValueError as e: return str(e)",
        A("def bad():\n    raise ValueError('x')\nassert f(bad) == 'x'"),
    ),
    (
        "callback calls back",
        "def f(g, n): return n if n == 0 else g(f, n - 1) + 1",
        A("assert f(lambda h, n: h(lambda a, b: a(lambda *z: 0, b) if b == 0 else b, n), 3) == 3"),
    ),
    (
        "decorator under test",
        "import functools\ndef memo(fn):\n    cache = {}\n    @functools.wraps(fn)\n    def w(*a):\n        if a not in cache: cache[a] = fn(*a)\n        return cache[a]\n    return w",
        A(
            "n = []\n@memo\ndef sq(x):\n    n.append(x)\n    return x * x\nassert (sq(3), sq(3), n) == (9, 9, [3])",
            "@memo\ndef sq(x): return x\nassert sq.__name__ == 'sq'",
        ),
    ),
    (
        "mock argument",
        "def f(m):\n    m.go(3)\n    return m.val",
        A("from unittest.mock import Mock\nm = Mock(val=5)\nassert f(m) == 5\nm.go.assert_called_once_with(3)"),
    ),
    (
        "file-like argument",
        "def f(fh): return [l.strip() for l in fh]\ndef g(fh): return fh.read()",
        A("import io\nassert f(io.StringIO('a\\nb')) == ['a', 'b']", "import io\nassert g(io.StringIO('ab')) == 'ab'"),
    ),
    (
        "nested identity and aliasing",
        "def f(g):\n    g[0].append(1)\n    return g[0]",
        check("g = [[], []]\nr = candidate(g)\nassert r is g[0]\nassert g == [[1], []]"),
    ),
    (
        "nan",
        "def f(): return [float('nan')]\ndef g(): return float('-inf')",
        A("import math\nassert math.isnan(f()[0])", "assert g() == -float('inf')"),
    ),
    (
        "bytearray, memoryview",
        "def f(b):\n    b[0] = 65\n    return bytes(b)\ndef g(): return memoryview(b'ab')",
        A(
            "b = bytearray(b'xy')\nassert f(b) == b'Ay' and b == b'Ay'",
            "assert bytes(g()) == b'ab'",
            "assert g()[0] == 97",
        ),
    ),
    (
        "Decimal/Fraction arguments",
        "def f(a, b): return a + b",
        A(
            "assert f(Decimal('1.1'), Decimal('2.2')) == Decimal('3.3')",
            "assert f(Fraction(1, 3), Fraction(1, 6)) == Fraction(1, 2)",
            setup="from decimal import Decimal\nfrom fractions import Fraction",
        ),
    ),
    (
        "date arguments",
        "def f(d): return d.year + d.weekday()",
        A("assert f(date(2020, 1, 1)) == 2022", setup="from datetime import date"),
    ),
    (
        "long arguments",
        "def f(v): return len(v)",
        check(
            "assert candidate([1]) == 1\nassert candidate(list(range(3 * 10**6))) == 3 * 10**6\nassert candidate([1]) == 1\nassert candidate([1, 2]) == 2"
        ),
    ),
    ("future after preamble", "import math\n\nfrom __future__ import annotations\ndef f(x: Foo): return x + 1", X),
    (
        "class entry point",
        "class Stack:\n    def __init__(self): self.v = []\n    def push(self, x): self.v.append(x)\n    def __len__(self): return len(self.v)",
        CheckTests(
            "def check(candidate):\n    s = candidate()\n    s.push(1)\n    assert len(s) == 1\n    assert s.v == [1]\n    assert isinstance(s, candidate)\n",
            "Stack",
        ),
    ),
    (
        "check uses the solution's class",
        "class Node:\n    def __init__(self, v): self.v = v\ndef f(n): return n.v + 1",
        check("assert candidate(Node(3)) == 4"),
    ),
    (
        "abc, property, slots",
        "from abc import ABC, abstractmethod\nclass Shape(ABC):\n    @abstractmethod\n    def area(self): ...\nclass Sq(Shape):\n    __slots__ = ('a',)\n    def __init__(self, a): self.a = a\n    def area(self): return self.a ** 2\n    @property\n    def side(self): return self.a\n    @side.setter\n    def side(self, v): self.a = v",
        A(
            "assert Sq(3).area() == 9",
            "s = Sq(2)\ns.side = 5\nassert s.area() == 25",
            "assert isinstance(Sq(1), Shape)",
            "try:\n    Shape()\n    ok = 0\nexcept TypeError:\n    ok = 1\nassert ok",
        ),
    ),
    (
        "format spec, round, int",
        "class T:\n    def __format__(self, s): return 'T' + s\n    def __round__(self, n=None): return 7\n    def __index__(self): return 2\n    def __len__(self): return 3\n    def __reversed__(self): return iter([3, 2])\ndef f(): return T()",
        A(
            "assert f'{f():x}' == 'Tx'",
            "assert round(f()) == 7",
            "assert [0, 1, 2][f()] == 2",
            "assert len(f()) == 3",
            "assert list(reversed(f())) == [3, 2]",
        ),
    ),
    (
        "str()/dict()/vars",
        "class C:\n    def __init__(self): self.a = 1\n    def keys(self): return ['k']\n    def __getitem__(self, k): return 5\ndef f(): return C()",
        A(
            "assert vars(f()) == {'a': 1}",
            "assert f().__dict__ == {'a': 1}",
            "assert dict(f()) == {'k': 5}",
            "assert f().__class__.__name__ == 'C'",
        ),
    ),
    (
        "printing to StringIO and capturing twice",
        "def f(x): print(x)",
        check(
            "import io, contextlib\nb = io.StringIO()\nwith contextlib.redirect_stdout(b):\n    candidate(1)\n    candidate(2)\nassert b.getvalue().split() == ['1', '2']\nimport sys\nold, sys.stdout = sys.stdout, io.StringIO()\ncandidate(3)\ngot, sys.stdout = sys.stdout.getvalue(), old\nassert got == '3\\n'"
        ),
    ),
    (
        "doc, name, signature",
        "def f(x):\n    'Doc.'\n    return x",
        check("assert candidate.__doc__ == 'Doc.'\nassert candidate.__name__ == 'f'\nassert callable(candidate)"),
    ),
    (
        "helper asserts & recursion",
        "def f(x): return x + 1",
        CheckTests(
            "def same(a, b, depth=2):\n    assert a == b\n    if depth: same(a, b, depth - 1)\ndef check(candidate):\n    for i in range(3):\n        try:\n            same(candidate(i), i + 1)\n        finally:\n            pass\n    [same(candidate(i), i + 1) for i in range(2)]\n    assert all(candidate(i) == i + 1 for i in range(3))\n",
            "f",
        ),
    ),
    (
        "heapq/bisect on objects",
        "import functools\n@functools.total_ordering\nclass T:\n    def __init__(self, k): self.k = k\n    def __eq__(self, o): return self.k == o.k\n    def __lt__(self, o): return self.k < o.k\ndef f(): return [T(3), T(1)]",
        A(
            "import heapq\nh = f()\nheapq.heapify(h)\nassert heapq.heappop(h).k == 1",
            "assert min(f()).k == 1",
            "assert f()[0] >= f()[1]",
        ),
    ),
    (
        "tuple of objects, dict of objects",
        "class C:\n    def __init__(self, a): self.a = a\ndef f(): return {'x': C(1)}, (C(2),)",
        A("d, t = f()\nassert d['x'].a == 1 and t[0].a == 2"),
    ),
    (
        "object passed back",
        "class C:\n    def __init__(self, a): self.a = a\ndef f(a): return C(a)\ndef g(c): return c.a\ndef same(a, b): return a is b",
        A("assert g(f(3)) == 3", "c = f(1)\nassert same(c, c)", "assert [g(c) for c in [f(1), f(2)]] == [1, 2]"),
    ),
    (
        "singleton",
        "class S:\n    _i = None\n    def __new__(cls):\n        if cls._i is None: cls._i = super().__new__(cls)\n        return cls._i",
        A("assert S() is S()", "assert id(S()) == id(S())"),
    ),
    (
        "uuid, path",
        "import uuid, pathlib\ndef f(): return uuid.UUID(int=1)\ndef g(): return pathlib.Path('/a') / 'b'",
        A(
            "assert str(f()).endswith('1')",
            "assert g().name == 'b'",
            "assert g() == pathlib.Path('/a/b')",
            "assert str(g()) == '/a/b'",
            setup="import pathlib",
        ),
    ),
    (
        "regex match",
        "import re\ndef f(s): return re.match(r'(a)(b)', s)\ndef g(): return re.compile('a+')",
        A(
            "assert f('ab').group(1) == 'a'",
            "assert f('ab').groups() == ('a', 'b')",
            "assert f('x') is None",
            "assert g().findall('aab') == ['aa']",
        ),
    ),
    (
        "partial, lru_cache info",
        "import functools\ndef f(a, b): return a - b\ng = functools.partial(f, 10)\n@functools.lru_cache\ndef h(x): return x\n",
        A("assert g(3) == 7", "h(1)\nh(1)\nassert h.cache_info().hits == 1", "assert g.args == (10,)"),
    ),
    ("exit codes", "import sys\nprint('x')\nsys.exit(0)", S("x")),
    ("quit", "print('x')\nquit()", S("x")),
    ("atexit prints", "import atexit\natexit.register(print, 'bye')\nprint('hi')", S("hi\nbye")),
    (
        "thread prints late",
        "import threading, time\ndef g():\n    time.sleep(0.2); print('t')\nthreading.Thread(target=g).start()\nprint('m')",
        S("m\nt"),
    ),
    (
        "pool not shut down",
        "from concurrent.futures import ThreadPoolExecutor\nimport time\ne = ThreadPoolExecutor(2)\ne.submit(lambda: (time.sleep(0.1), print('late')))\nprint('m')",
        S("m\nlate"),
    ),
    (
        "unflushed file in a function",
        "def g():\n    import sys\n    global out\n    out = open('/dev/fd/1', 'w') if 0 else open(1, 'w', closefd=False)\n    out.write('q')\ng()",
        S("q"),
    ),
    (
        "logging handler and weakref",
        "import weakref\nclass C: pass\nc = C()\nweakref.finalize(c, print, 'fin')\nprint('a')",
        S("a\nfin"),
    ),
    (
        "exit in a thread-run main with code 0",
        "import sys, threading\ndef main():\n    print('a')\n    sys.exit(0)\nthreading.Thread(target=main).start()",
        S("a"),
    ),
    (
        "unit: skipIf, IsolatedAsyncio, class inheritance",
        "async def f(x): return x + 1\ndef g(x): return x",
        UnittestTests(
            "import unittest\nclass Base(unittest.TestCase):\n    def setUp(self): self.q = 2\nclass T(Base):\n    @unittest.skipIf(True, 'no')\n    def test_s(self): self.fail()\n    def test_q(self): self.assertEqual(g(2), self.q)\nclass U(unittest.IsolatedAsyncioTestCase):\n    async def test_a(self): self.assertEqual(await f(1), 2)\n"
        ),
    ),
    (
        "unit: own classes with eq",
        "class V:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return isinstance(o, V) and self.x == o.x\n    def __lt__(self, o): return self.x < o.x\n    def __contains__(self, y): return y == self.x\ndef f(x): return V(x)",
        UnittestTests(
            "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), V(1))\n    def test_b(self): self.assertTrue(f(1) == V(1) and f(1) < V(2))\n    def test_c(self): self.assertIn(3, f(3)); self.assertTrue(3 in f(3))\n    def test_d(self): self.assertNotEqual(f(1), 1)\n    def test_e(self): self.assertEqual([f(1)], [V(1)])\n"
        ),
    ),
    (
        "unit: mock",
        "def f(cb): return cb(1)",
        UnittestTests(
            "import unittest\nfrom unittest.mock import MagicMock, ANY, call\nclass T(unittest.TestCase):\n    def test_a(self):\n        m = MagicMock(return_value=3)\n        self.assertEqual(f(m), 3)\n        m.assert_called_once_with(ANY)\n        self.assertEqual(m.call_args, call(1))\n        self.assertEqual(m.call_args_list, [call(1)])\n        self.assertEqual(m.call_args[0], (1,))\n"
        ),
    ),
    (
        "unit: future",
        "from __future__ import annotations\nimport math\ndef f(x: Foo): return x",
        UnittestTests(
            "from __future__ import annotations\nimport unittest\nclass T(unittest.TestCase):\n    def test_a(self) -> Bar: self.assertEqual(f(1), 1)\n"
        ),
    ),
    (
        "counting calls in setup class",
        "def f(acc):\n    for i in range(3): acc.add(i)\n    return acc.total",
        A(
            "assert f(Acc()) == 3",
            setup="class Acc:\n    def __init__(self): self.total = 0\n    def add(self, x): self.total += x",
        ),
    ),
    (
        "iter of dict items mutated in place",
        "def f(d):\n    for k in list(d): d[k.upper()] = d.pop(k)",
        A("d = {'a': 1}\nf(d)\nassert d == {'A': 1}"),
    ),
    ("two args same object", "def f(a, b): return a is b", A("x = [1]\nassert f(x, x)", "assert not f([1], [1])")),
    (
        "own module and __file__",
        "import os\nopen('own.py', 'w').write('x = 4')\nimport own\nprint(own.x, os.path.basename(__file__))",
        S("4 solution.py"),
    ),
]


@pytest.mark.parametrize(("code", "tests"), [pytest.param(*case, id=name) for name, *case in RIGHT])
def test_a_right_solution_passes(pool, code, tests):
    outcome = pool.run(code, tests=tests)
    assert (outcome.status, outcome.pass_rate, outcome.error) == ("ok", 1.0, "")


def test_a_module_among_the_files_is_found(pool):
    assert pool.run("import helper\nprint(helper.x)", files={"helper.py": "x = 5"}).stdout == "5\n"
