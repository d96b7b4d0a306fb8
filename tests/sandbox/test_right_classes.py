# ruff: noqa: E501 - programs for the jail are strings, one assertion a line
"""Right solutions that pass in one process must pass in two. Classes: those that tests derive from a solution's, data classes, enumerations, operators, descriptors."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.jail

SHAPES = """from abc import ABC, abstractmethod
class Shape(ABC):
    unit = 'cm'
    def __init__(self, name='s'): self.name = name
    @abstractmethod
    def area(self): ...
    def describe(self): return f'{self.name}: {self.area():.1f} {self.unit}'
    def double(self): return 2 * self.area()
class Square(Shape):
    def __init__(self, s):
        super().__init__('sq')
        self.s = s
    def area(self): return self.s ** 2
def total(shapes): return sum(x.area() for x in shapes)
def biggest(shapes): return max(shapes, key=lambda s: s.area())
"""

RIGHT = {
    "subclass abstract in test": (
        SHAPES,
        "",
        (
            "class T(Shape):\n    def area(self): return 3\nassert T('t').area() == 3\nassert T('t').describe() == 't: 3.0 cm'\nassert T().double() == 6",
        ),
    ),
    "subclass passed back": (
        SHAPES,
        "",
        (
            "class T(Shape):\n    def area(self): return 3\nassert total([T(), Square(2)]) == 7",
            "class T(Shape):\n    def area(self): return 30\nt = T()\nassert biggest([t, Square(2)]) is t",
            "class T(Shape):\n    def area(self): return 30\nassert isinstance(T(), Shape)\nassert issubclass(T, Shape)",
        ),
    ),
    "subclass concrete override+super": (
        """class Account:
    def __init__(self, balance=0): self.balance = balance
    def deposit(self, x):
        self.balance += x
        self.log('deposit', x)
        return self.balance
    def log(self, what, x): pass
    def __add__(self, o): return type(self)(self.balance + o.balance)
    def __eq__(self, o): return isinstance(o, Account) and self.balance == o.balance
    def __repr__(self): return f'{type(self).__name__}({self.balance})'
""",
        "",
        (
            "class Logged(Account):\n    def __init__(self, b):\n        super().__init__(b)\n        self.lines = []\n    def log(self, what, x):\n        self.lines.append((what, x))\na = Logged(5)\nassert a.deposit(3) == 8\nassert a.lines == [('deposit', 3)]\nassert a.balance == 8\nassert isinstance(a, Account)",
            "class Bonus(Account):\n    def deposit(self, x): return super().deposit(x + 1)\nassert Bonus().deposit(3) == 4",
            "class Z(Account): pass\nassert Z(3) == Z(3)\nassert repr(Z(4)) == 'Z(4)'\nassert (Z(1) + Z(2)).balance == 3",
        ),
    ),
    "subclass of an exception class of the solution": (
        """class BankError(Exception):
    def __init__(self, code): super().__init__(f'code {code}'); self.code = code
def run(g):
    try: g()
    except BankError as e: return ('bank', e.code)
    except Exception as e: return ('other', str(e))
""",
        "",
        (
            "class My(BankError): pass\ndef g(): raise My(4)\nassert run(g) == ('bank', 4)",
            "def g(): raise BankError(3)\nassert run(g) == ('bank', 3)",
            "def g(): raise KeyError('k')\nassert run(g)[0] == 'other'",
        ),
    ),
    "plugin registry via __init_subclass__": (
        """class Plugin:
    registry = {}
    def __init_subclass__(cls, **kw):
        super().__init_subclass__(**kw)
        Plugin.registry[cls.__name__] = cls
    def run(self): return 'base'
def names(): return sorted(Plugin.registry)
def make(n): return Plugin.registry[n]().run()
""",
        "",
        ("class P1(Plugin):\n    def run(self): return 'one'\nassert names() == ['P1']\nassert make('P1') == 'one'",),
    ),
    "visitor subclass": (
        """class Node:
    def __init__(self, v, kids=()): self.v, self.kids = v, list(kids)
class Visitor:
    def visit(self, node):
        self.enter(node)
        for k in node.kids: self.visit(k)
        self.leave(node)
    def enter(self, node): pass
    def leave(self, node): pass
""",
        "",
        (
            "class Collect(Visitor):\n    def __init__(self): self.seen = []\n    def enter(self, node): self.seen.append(node.v)\nc = Collect()\nc.visit(Node(1, [Node(2), Node(3, [Node(4)])]))\nassert c.seen == [1, 2, 3, 4]",
        ),
    ),
    "template method with property": (
        """class Animal:
    def speak(self): return f'{self.name} says {self.sound}'
    @property
    def name(self): return 'animal'
    @property
    def sound(self): raise NotImplementedError
""",
        "",
        (
            "class Dog(Animal):\n    name = 'Rex'\n    @property\n    def sound(self): return 'woof'\nassert Dog().speak() == 'Rex says woof'",
            "class Cat(Animal):\n    sound = 'meow'\nassert Cat().speak() == 'animal says meow'",
        ),
    ),
    "observer: test class duck typed": (
        """class Subject:
    def __init__(self): self.obs = []
    def attach(self, o): self.obs.append(o)
    def detach(self, o): self.obs.remove(o)
    def notify(self, e):
        for o in self.obs: o.update(e)
class Observer:
    def update(self, e): raise NotImplementedError
""",
        "",
        (
            "class O(Observer):\n    def __init__(self): self.got = []\n    def update(self, e): self.got.append(e)\ns, o = Subject(), O()\ns.attach(o)\ns.notify({'k': 1})\ns.detach(o)\ns.notify(2)\nassert o.got == [{'k': 1}]",
            "class O:\n    def __init__(self): self.got = []\n    def update(self, e): self.got.append(e)\ns, o = Subject(), O()\ns.attach(o)\ns.notify('x')\nassert o.got == ['x']",
        ),
    ),
    "dataclass all": (
        """from dataclasses import dataclass, field, asdict, replace, astuple
@dataclass(order=True)
class P:
    x: int
    y: int = 0
    tags: list = field(default_factory=list, compare=False)
@dataclass(frozen=True)
class F:
    a: int
    b: str = 'b'
""",
        "from dataclasses import asdict\nimport dataclasses",
        (
            "assert P(1) == P(1, 0)",
            "assert P(1) < P(2)",
            "assert asdict(P(1, 2, ['t'])) == {'x': 1, 'y': 2, 'tags': ['t']}",
            "assert repr(F(1)) == \"F(a=1, b='b')\"",
            "assert hash(F(1)) == hash(F(1))",
            "assert len({F(1), F(1), F(2)}) == 2",
            "try:\n    F(1).a = 2\n    ok = False\nexcept Exception as e:\n    ok = type(e).__name__ == 'FrozenInstanceError'\nassert ok",
            "p = P(1)\np.tags.append(3)\nassert p.tags == [3]\nassert P(1).tags == []",
            "assert dataclasses.replace(F(1), b='c') == F(1, 'c')",
            "assert sorted([P(3), P(1)])[0].x == 1",
            "assert dataclasses.is_dataclass(P)\nassert [f.name for f in dataclasses.fields(P)] == ['x', 'y', 'tags']",
            "assert dataclasses.asdict(P(1)) == {'x': 1, 'y': 0, 'tags': []}",
            "assert dataclasses.astuple(F(1)) == (1, 'b')",
        ),
    ),
    "match on solution class in tests": (
        """from dataclasses import dataclass
@dataclass
class P:
    x: int
    y: int
""",
        "",
        (
            "match P(1, 2):\n    case P(x=1, y=b):\n        r = b\nassert r == 2",
            "match P(1, 2):\n    case P(1, b):\n        r = b\nassert r == 2",
        ),
    ),
    "enum things": (
        """from enum import Enum, IntEnum, Flag, auto, StrEnum
class Color(Enum):
    RED = 1
    GREEN = 2
    def hot(self): return self is Color.RED
class Perm(Flag):
    R = auto(); W = auto()
class S(StrEnum):
    A = 'a'
class L(IntEnum):
    LO = 1; HI = 2
def f(x): return Color(x)
def g(c): return c.name.lower()
def h(): return {Color.RED: 1}
""",
        "",
        (
            "assert f(1) is Color.RED",
            "assert f(2) == Color.GREEN",
            "assert g(Color.RED) == 'red'",
            "assert [c.name for c in Color] == ['RED', 'GREEN']",
            "assert Color['RED'].value == 1",
            "assert len(Color) == 2",
            "assert Color.RED in Color",
            "assert h()[Color.RED] == 1",
            "assert h() == {Color.RED: 1}",
            "assert (Perm.R | Perm.W) & Perm.R == Perm.R",
            "assert Perm.R in (Perm.R | Perm.W)",
            "assert S.A == 'a'",
            "assert L.LO < L.HI",
            "assert max(L.LO, L.HI) == 2",
            "assert Color.RED.hot()",
            "assert str(Color.RED) == 'Color.RED'",
            "assert Color.RED != Color.GREEN",
            "assert list(Color.__members__) == ['RED', 'GREEN']",
            "assert isinstance(Color.RED, Color)",
            "assert f'{S.A}' == 'a'",
            "assert L(1) is L.LO",
            "assert L.HI + 1 == 3",
            "assert Color(1) in (Color.RED, Color.GREEN)",
        ),
    ),
    "properties and descriptors": (
        """class T:
    def __init__(self, c): self._c = c
    @property
    def f(self): return self._c * 9 / 5 + 32
    @f.setter
    def f(self, v): self._c = (v - 32) * 5 / 9
    @f.deleter
    def f(self): self._c = 0
    @property
    def c(self): return self._c
class Pos:
    def __set_name__(self, o, n): self.n = '_' + n
    def __get__(self, i, o=None): return self if i is None else getattr(i, self.n, 0)
    def __set__(self, i, v):
        if v < 0: raise ValueError('neg')
        setattr(i, self.n, v)
class Item:
    price = Pos()
    __slots__ = ('_price',)
class Lazy:
    from functools import cached_property
    n = 0
    @cached_property
    def v(self): Lazy.n += 1; return Lazy.n
class Dyn:
    def __getattr__(self, k):
        if k.startswith('get_'): return lambda: k[4:]
        raise AttributeError(k)
""",
        "",
        (
            "t = T(100)\nassert t.f == 212",
            "t = T(0)\nt.f = 212\nassert t.c == 100",
            "t = T(5)\ndel t.f\nassert t.c == 0",
            "try:\n    T(1).c = 5\n    ok = False\nexcept AttributeError:\n    ok = True\nassert ok",
            "i = Item()\ni.price = 5\nassert i.price == 5",
            "i = Item()\ntry:\n    i.price = -1\n    r = ''\nexcept ValueError as e:\n    r = str(e)\nassert r == 'neg'",
            "l = Lazy()\nassert l.v == l.v",
            "assert Dyn().get_x() == 'x'\nassert not hasattr(Dyn(), 'y')",
            "try:\n    Item().other = 3\n    ok = False\nexcept AttributeError:\n    ok = True\nassert ok",
            "assert isinstance(T.f, property)",
            "assert vars(T(3)) == {'_c': 3}",
            "assert T(3).__dict__ == {'_c': 3}",
            "t = T(3)\nsetattr(t, 'f', 32)\nassert getattr(t, 'c') == 0",
        ),
    ),
    "operators": (
        """import functools, math
@functools.total_ordering
class Money:
    def __init__(self, v, cur='EUR'): self.v, self.cur = v, cur
    def __add__(self, o):
        if isinstance(o, (int, float)): return Money(self.v + o, self.cur)
        if not isinstance(o, Money): return NotImplemented
        return Money(self.v + o.v, self.cur)
    __radd__ = __add__
    def __sub__(self, o): return Money(self.v - (o.v if isinstance(o, Money) else o))
    def __rsub__(self, o): return Money(o - self.v)
    def __mul__(self, k): return Money(self.v * k)
    __rmul__ = __mul__
    def __truediv__(self, k): return Money(self.v / k)
    def __neg__(self): return Money(-self.v)
    def __abs__(self): return Money(abs(self.v))
    def __bool__(self): return self.v != 0
    def __eq__(self, o): return isinstance(o, Money) and self.v == o.v
    def __lt__(self, o): return self.v < o.v
    def __hash__(self): return hash(self.v)
    def __repr__(self): return f'Money({self.v})'
    def __iadd__(self, o): self.v += o.v; return self
    def __int__(self): return int(self.v)
    def __float__(self): return float(self.v)
    def __round__(self, n=0): return Money(round(self.v, n))
    def __pow__(self, n): return Money(self.v ** n)
    def __divmod__(self, k): return divmod(self.v, k)
    def __matmul__(self, o): return self.v * o.v
    def __getitem__(self, i): return (self.v, self.cur)[i]
    def __call__(self, x): return self.v + x
    def __contains__(self, x): return x == self.cur
    def __len__(self): return 2
    def __invert__(self): return Money(1 / self.v)
    def __format__(self, s): return format(self.v, s) + self.cur
    def __index__(self): return int(self.v)
class Vec(tuple):
    def __new__(cls, *a): return super().__new__(cls, a)
    def __add__(self, o): return Vec(*(a + b for a, b in zip(self, o)))
    def __mul__(self, k): return Vec(*(a * k for a in self))
    @property
    def norm(self): return math.hypot(*self)
class Matrix:
    def __init__(self, rows): self.rows = rows
    def __getitem__(self, ij): i, j = ij; return self.rows[i][j]
    def __setitem__(self, ij, v): i, j = ij; self.rows[i][j] = v
    def __matmul__(self, o): return Matrix([[sum(a * b for a, b in zip(r, c)) for c in zip(*o.rows)] for r in self.rows])
    def __eq__(self, o): return self.rows == (o.rows if isinstance(o, Matrix) else o)
    def __iter__(self): return iter(self.rows)
    def __len__(self): return len(self.rows)
def mk(v): return Money(v)
""",
        "import operator, functools",
        (
            "assert Money(1) + Money(2) == Money(3)",
            "assert sum([Money(1), Money(2)]) == Money(3)",
            "assert sum([Money(1), Money(2)], Money(0)) == Money(3)",
            "assert 2 * Money(3) == Money(6)",
            "assert Money(1) < Money(2) <= Money(2)",
            "assert max(Money(1), Money(5)).v == 5",
            "assert not Money(0)",
            "m = Money(1)\nm += Money(2)\nassert m.v == 3",
            "assert f'{Money(3):.2f}' == '3.00EUR'",
            "assert int(Money(3.7)) == 3",
            "assert abs(Money(-3)) == Money(3)",
            "assert -Money(3) == Money(-3)",
            "assert round(Money(3.456), 1) == Money(3.5)",
            "assert Money(2) ** 3 == Money(8)",
            "assert divmod(Money(7), 2) == (3, 1)",
            "assert Money(2) @ Money(3) == 6",
            "assert Money(2)[1] == 'EUR'",
            "assert Money(2)(5) == 7",
            "assert 'EUR' in Money(1)",
            "assert len(Money(1)) == 2",
            "assert {Money(1): 'a'}[Money(1)] == 'a'",
            "assert sorted([Money(3), Money(1)]) == [Money(1), Money(3)]",
            "assert 10 - Money(3) == Money(7)",
            "assert [10, 20, 30][Money(1)] == 20",
            "assert str(Money(1)) == 'Money(1)'",
            "assert Money(1) != Money(2)",
            "assert Money(1) != 1",
            "try:\n    Money(1) + 'x'\n    ok = False\nexcept TypeError:\n    ok = True\nassert ok",
            "assert Vec(1, 2) + Vec(3, 4) == (4, 6)",
            "assert Vec(3, 4).norm == 5",
            "assert Vec(1, 2) * 2 == Vec(2, 4)",
            "assert isinstance(Vec(1), tuple)",
            "m = Matrix([[1, 2], [3, 4]])\nassert m[1, 0] == 3\nm[1, 0] = 9\nassert m.rows == [[1, 2], [9, 4]]",
            "assert Matrix([[1, 2]]) @ Matrix([[1], [2]]) == Matrix([[5]])",
            "assert list(Matrix([[1]])) == [[1]]",
            "assert mk(3) == Money(3)",
            "assert mk(3).v == 3",
            "assert mk(3) + mk(4) == Money(7)",
            "assert (mk(3) + mk(4)).v == 7",
            "assert operator.add(Money(1), Money(2)).v == 3",
            "assert Money(1).__eq__(Money(1)) and not Money(1).__eq__(2) and Money(1).__lt__(Money(2))",
            "assert operator.eq(Money(1), Money(1)) and operator.lt(Money(1), Money(2))",
            "assert Money(1).__contains__('EUR') and operator.ne(Money(1).v, 2)",
            "assert Money(1).__add__('x') is NotImplemented and (1).__eq__('x') is NotImplemented",
            "assert functools.reduce(operator.add, [Money(1), Money(2)]).v == 3",
            "import math\nassert math.isclose(float(Money(2)), 2.0)",
        ),
    ),
    "subclass more": (
        """from dataclasses import dataclass
from typing import Generic, TypeVar, Protocol
import abc, asyncio, enum, threading, collections
T_ = TypeVar('T_')
@dataclass
class Point:
    x: int
    y: int = 0
    def norm1(self): return abs(self.x) + abs(self.y)
class Stack(Generic[T_]):
    def __init__(self): self._items = []
    def push(self, x): self._items.append(x); return self
    def pop(self): return self._items.pop()
    def __len__(self): return len(self._items)
    def __iter__(self): return iter(self._items)
    def __contains__(self, x): return x in self._items
    def __getitem__(self, i): return self._items[i]
class D(dict):
    def total(self): return sum(self.values())
    def __missing__(self, k): return self.default(k)
    def default(self, k): return 0
class Handler:
    def __init__(self, nxt=None): self.next = nxt
    def handle(self, req):
        r = self.process(req)
        if r is None and self.next: return self.next.handle(req)
        return r
    def process(self, req): raise NotImplementedError('process')
class Worker(abc.ABC):
    @abc.abstractmethod
    async def work(self, x): ...
    @property
    @abc.abstractmethod
    def label(self): ...
    @classmethod
    def create(cls, *a): return cls(*a)
    @staticmethod
    def helper(x): return x * 2
    async def run(self, xs): return [await self.work(x) for x in xs]
class CM:
    def __enter__(self): self.open(); return self
    def __exit__(self, *a): self.close()
    def open(self): self.state = 'open'
    def close(self): self.state = 'closed'
class It:
    def __iter__(self):
        n = 0
        while (x := self.get(n)) is not None:
            yield x
            n += 1
    def get(self, n): return None
class Repo(Protocol):
    def find(self, k): ...
class Service:
    def __init__(self, repo): self.repo = repo
    def name(self, k):
        r = self.repo.find(k)
        return r['name'] if r else 'unknown'
class Money:
    def __init__(self, v): self.v = v
    def __add__(self, o): return type(self)(self.v + o.v)
    def __eq__(self, o): return self.v == o.v
    def __lt__(self, o): return self.v < o.v
    def __hash__(self): return hash(self.v)
    def __repr__(self): return f'{self.__class__.__name__}({self.v})'
    def __call__(self, k=1): return self.v * k
class Machine:
    state = 'idle'
    def fire(self, e):
        m = getattr(self, 'on_' + e, None)
        if m is None: raise ValueError(f'no {e}')
        self.state = m()
        return self.state
class Meta(type):
    seen = []
    def __new__(m, n, b, d, **k):
        c = super().__new__(m, n, b, d)
        Meta.seen.append(n)
        return c
class WithMeta(metaclass=Meta): pass
class Th(threading.Thread): pass
def use_it(it): return list(it)
def run_all(hs, r): return [type(h).__name__ for h in hs if h.handle(r)]
""",
        "import asyncio, dataclasses",
        (
            "class P(Point):\n    def norm1(self): return super().norm1() + 1\nassert P(1, 2).norm1() == 4\nassert P(1) == P(1)\nassert P(1).x == 1",
            "@dataclasses.dataclass\nclass P3(Point):\n    z: int = 5\np = P3(1, 2)\nassert (p.x, p.y, p.z) == (1, 2, 5)\nassert P3(1) == P3(1)\nassert P3(1, z=3) != P3(1)\nassert p.norm1() == 3",
            "class LStack(Stack):\n    def push(self, x):\n        if len(self) >= 2: raise OverflowError('full')\n        return super().push(x)\ns = LStack().push(1).push(2)\nassert len(s) == 2\nassert s.pop() == 2\ns.push(4)\ntry:\n    s.push(3)\n    r = ''\nexcept OverflowError as e:\n    r = str(e)\nassert r == 'full'\nassert list(s) == [1, 4]\nassert 1 in s\nassert s[0] == 1",
            "class IS(Stack[int]):\n    def peek(self): return self._items[-1]\nassert IS().push(3).peek() == 3",
            "class DD(D):\n    def default(self, k): return k * 2\nd = DD(a=1)\nassert d['b'] == 'bb'\nassert d.total() == 1\nassert d == {'a': 1}",
            "class H(Handler):\n    def __init__(self, n, nxt=None):\n        super().__init__(nxt)\n        self.n = n\n    def process(self, req): return 'h%d' % self.n if req == self.n else None\nassert H(1, H(2)).handle(2) == 'h2'\nassert H(1, H(2)).handle(3) is None\nassert run_all([H(1), H(2)], 1) == ['H']",
            "try:\n    Handler().handle(1)\n    r = ''\nexcept NotImplementedError as e:\n    r = str(e)\nassert r == 'process'",
            "class W(Worker):\n    label = 'w'\n    async def work(self, x):\n        await asyncio.sleep(0)\n        return x + 1\nassert asyncio.run(W().run([1, 2])) == [2, 3]\nassert W.create().label == 'w'\nassert W.helper(3) == 6",
            "class W(Worker):\n    label = 'w'\ntry:\n    W()\n    ok = False\nexcept TypeError as e:\n    ok = 'abstract' in str(e)\nassert ok",
            "try:\n    Worker()\n    ok = False\nexcept TypeError as e:\n    ok = 'abstract' in str(e)\nassert ok",
            "class C(CM):\n    def close(self):\n        super().close()\n        self.closed = True\nwith C() as c:\n    assert c.state == 'open'\nassert c.state == 'closed' and c.closed",
            "class C(CM):\n    def __exit__(self, *a):\n        super().__exit__(*a)\n        return True\nwith C() as c:\n    raise ValueError\nassert c.state == 'closed'",
            "class I(It):\n    def get(self, n): return n * n if n < 3 else None\nassert list(I()) == [0, 1, 4]\nassert use_it(I()) == [0, 1, 4]",
            "class R:\n    def find(self, k): return {'name': 'Bob'} if k == 1 else None\nassert Service(R()).name(1) == 'Bob'\nassert Service(R()).name(2) == 'unknown'",
            "class R(Repo):\n    def find(self, k): return {'name': 'Bob'} if k == 1 else None\nassert Service(R()).name(1) == 'Bob'",
            "from unittest.mock import Mock\nr = Mock()\nr.find.return_value = {'name': 'Z'}\nassert Service(r).name(4) == 'Z'\nr.find.assert_called_once_with(4)",
            "from unittest.mock import MagicMock\nr = MagicMock()\nr.find.side_effect = [None, {'name': 'A'}]\nassert Service(r).name(1) == 'unknown'\nassert Service(r).name(2) == 'A'\nassert r.find.call_count == 2",
            "class Euro(Money):\n    def __repr__(self): return 'E' + super().__repr__()\nassert repr(Euro(3)) == 'EEuro(3)'\nassert (Euro(1) + Euro(2)) == Euro(3)\nassert type(Euro(1) + Euro(2)).__name__ == 'Euro'\nassert isinstance(Euro(1) + Euro(2), Euro)\nassert Euro(1) < Euro(2)\nassert len({Euro(1), Euro(1)}) == 1\nassert Euro(4)(k=2) == 8",
            "class Euro(Money):\n    def __call__(self, k=1): return super().__call__(k=k) + 1\n    def __eq__(self, o): return super().__eq__(o)\n    def __lt__(self, o): return not super().__lt__(o)\n    __hash__ = Money.__hash__\nassert Euro(4)(k=2) == 9\nassert Euro(3) == Euro(3)\nassert not Euro(1) < Euro(2)",
            "class M(Machine):\n    def on_go(self): return 'running'\nm = M()\nassert m.state == 'idle'\nassert m.fire('go') == 'running'\nassert m.state == 'running'\nassert M.state == 'idle'",
            "class X(WithMeta): pass\nassert 'X' in Meta.seen",
            "class Base2(Money):\n    def twice(self): return self.v * 2\nclass Sub2(Base2):\n    def twice(self): return super().twice() + 1\nassert Sub2(2).twice() == 5\nassert Sub2.__name__ == 'Sub2'\nassert issubclass(Sub2, Money)\nassert Sub2.mro()[0] is Sub2",
            "class Mix:\n    def hello(self): return f'hi {self.v}'\nclass Q(Mix, Money): pass\nassert Q(3).hello() == 'hi 3'\nclass Q2(Money, Mix): pass\nassert Q2(3).hello() == 'hi 3'",
            "class Loud:\n    def fire(self, e): return super().fire(e).upper()\nclass LM(Loud, Machine):\n    def on_go(self): return 'run'\nassert LM().fire('go') == 'RUN'",
            "class K(Money):\n    count = 0\n    def __init__(self, v):\n        super().__init__(v)\n        K.count += 1\nK(1); K(2)\nassert K.count == 2",
            "class K(Money):\n    @property\n    def v2(self): return self.v * 2\n    @v2.setter\n    def v2(self, x): self.v = x // 2\nk = K(3)\nassert k.v2 == 6\nk.v2 = 20\nassert k.v == 10",
            "class K(Money):\n    @classmethod\n    def zero(cls): return cls(0)\n    @staticmethod\n    def one(): return 1\nassert K.zero().v == 0 and K.one() == 1\nassert isinstance(K.zero(), K)",
            "assert Machine().state == 'idle'\nMachine.on_x = lambda self: 'xx'\nassert Machine().fire('x') == 'xx'",
            "m = Machine()\nm.on_y = lambda: 'yy'\nassert m.fire('y') == 'yy'",
            "class S(Money):\n    def __new__(cls, v):\n        self = super().__new__(cls)\n        return self\nassert S(4).v == 4",
            "def make(k):\n    class Local(Money):\n        def f(self): return self.v + k\n    return Local(1).f()\nassert make(3) == 4",
            "ms = [Money(3), Money(1)]\nms.sort()\nassert [m.v for m in ms] == [1, 3]\nassert min(ms) is ms[0]",
            "import copy\nm = copy.copy(Money(3))\nassert m.v == 3",
            "import copy\nm = Money(3)\nn = copy.deepcopy(m)\nn.v = 4\nassert m.v == 3 and n.v == 4",
            "assert [f.name for f in dataclasses.fields(Point)] == ['x', 'y']\nassert dataclasses.asdict(Point(1, 2)) == {'x': 1, 'y': 2}",
        ),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(every_assertion_passes, name):
    every_assertion_passes(*RIGHT[name])
