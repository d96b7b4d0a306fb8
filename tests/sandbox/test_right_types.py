# ruff: noqa: E501 - programs for the jail are strings, one assertion a line
"""Right solutions that pass in one process must pass in two. Types and metaclasses, the library's objects, containers with
methods of their own, and what solutions look at of the tests' functions and objects."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.jail

META = """import enum
from abc import ABC, abstractmethod
class M(type):
    @property
    def size(cls): return 42
    def __repr__(cls): return f'<{cls.__name__}>'
    def __add__(cls, other): return (cls.__name__, other.__name__)
    def __lt__(cls, other): return cls.__name__ < other.__name__
class A(metaclass=M):
    '''About A.'''
class B(A): pass
class Plain: pass
class Shape(ABC):
    @abstractmethod
    def area(self): ...
class Kind(enum.Enum):
    ONE = 1
def get(): return Plain
"""
LIBRARY = """import ast, collections, enum, functools, io, itertools, re, statistics
def match(s): return re.match(r'(?P<k>\\w+)', s)
def square(x): return x * x
cube = functools.partial(pow, exp=3)
def pairs(): return zip('ab', [1, 2])
def numbered(s): return enumerate(s)
def combined(s): return itertools.combinations(s, 2)
def tree(s): return ast.parse(s, mode='eval')
def text(): return io.StringIO('a\\nb')
def normal(): return statistics.NormalDist(1, 2)
def layers(): return collections.ChainMap({'a': 1}, {'b': 2})
def same(x): return x
"""
LOOKED_AT = '''import inspect
class D:
    k = 5
    @property
    def p(self): return 1
    @staticmethod
    def s(): return 2
    @classmethod
    def c(cls): return 3
    def m(self):
        """About m."""
        return 4
def f(x):
    return x + 1  # one more
def count(n):
    for i in range(n): yield i
'''
CONTAINERS = """from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Mapping, MutableSequence, Set
from datetime import datetime, timedelta, tzinfo
from pathlib import PureWindowsPath
import array
class LRU(OrderedDict):
    def __init__(self, n): super().__init__(); self.n = n
    def __getitem__(self, k):
        self.move_to_end(k)
        return super().__getitem__(k)
    def __setitem__(self, k, v):
        super().__setitem__(k, v)
        if len(self) > self.n: self.popitem(last=False)
class Loud(deque):
    def extend(self, items): raise ValueError('no')
    def append(self, item): super().append(item * 2)
    def __iter__(self): return map(str, super().__iter__())
class Bytes(bytearray):
    def __iter__(self): return iter('xy')
    def __setitem__(self, k, v): raise ValueError('no')
class Lower(UserDict):
    def __setitem__(self, k, v): super().__setitem__(k.lower(), v)
class Items(UserList):
    def first(self): return self[0]
class Distinct(Set):
    def __init__(self, items): self.items = tuple(dict.fromkeys(items))
    def __contains__(self, item): return item in self.items
    def __iter__(self): return iter(self.items)
    def __len__(self): return len(self.items)
class Frozen(Mapping):
    def __init__(self, **items): self.items_ = items
    def __getitem__(self, k): return self.items_[k]
    def __iter__(self): return iter(self.items_)
    def __len__(self): return len(self.items_)
class Groups(defaultdict):
    def __init__(self): super().__init__(lambda: [7])
class Last(deque):
    def __init__(self, *items): super().__init__(items, 2)
class Ints(array.array):
    def total(self): return sum(self)
class Nested(dict):
    def __missing__(self, k):
        self[k] = type(self)()
        return self[k]
class Three(tzinfo):
    def utcoffset(self, moment): return timedelta(hours=3)
    def dst(self, moment): return timedelta(0)
    def tzname(self, moment): return 'T'
def noon(): return datetime(2020, 1, 1, 12, tzinfo=Three())
def drive(): return PureWindowsPath('C:/a/b')
def later(x): return x + timedelta(days=1)
"""
LOOKING = """import dataclasses, functools, inspect
from typing import Protocol, runtime_checkable
def curry(f):
    count = len(inspect.signature(f).parameters)
    def step(*given): return f(*given) if len(given) >= count else lambda *more: step(*given, *more)
    return step
def arity(f): return f.__code__.co_argcount
def typed(f):
    kinds = f.__annotations__
    @functools.wraps(f)
    def inner(*args):
        for (name, kind), value in zip(kinds.items(), args):
            if not isinstance(value, kind): raise TypeError(name)
        return f(*args)
    return inner
def as_dict(o): return dict(vars(o))
def flat(o): return dataclasses.asdict(o)
def named(t): return t._asdict()
class Event:
    def __init__(self): self.handlers = []
    def __iadd__(self, handler): self.handlers.append(handler); return self
    def __isub__(self, handler): self.handlers.remove(handler); return self
    def __call__(self, *args): return [handler(*args) for handler in self.handlers]
class Button:
    def __init__(self): self.clicked = Event()
@runtime_checkable
class Sized(Protocol):
    def __len__(self) -> int: ...
@runtime_checkable
class Quacks(Protocol):
    def quack(self) -> str: ...
def speak(o): return o.quack() if isinstance(o, Quacks) else None
"""
DECORATING = """import functools, inspect
def auto_init(cls):
    names = list(cls.__annotations__)
    def __init__(self, *args):
        for name, value in zip(names, args): setattr(self, name, value)
    cls.__init__ = __init__
    cls.__repr__ = lambda self: f"{cls.__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"
    return cls
def tracked(cls):
    made = cls.__init__
    cls.made = 0
    def init(self, *args):
        cls.made += 1
        made(self, *args)
    cls.__init__ = init
    return cls
def richer(cls):
    cls.__call__ = lambda self, x: x * 2
    cls.extra = staticmethod(lambda: 'e')
    cls.label = classmethod(lambda c: c.__name__)
    cls.double = property(lambda self: self.w * 2, lambda self, v: setattr(self, 'w', v // 2))
    return cls
def counted(f):
    @functools.wraps(f)
    def inner(*args, **named):
        inner.calls += 1
        return f(*args, **named)
    inner.calls = 0
    return inner
def checked(**rules):
    def decorate(f):
        signature = inspect.signature(f)
        def inner(*args, **named):
            bound = signature.bind(*args, **named)
            bound.apply_defaults()
            for name, rule in rules.items():
                if not rule(bound.arguments[name]): raise ValueError(name)
            return f(*bound.args, **bound.kwargs)
        return inner
    return decorate
class Typed:
    def __init__(self, kind): self.kind = kind
    def __set_name__(self, owner, name): self.name = '_' + name
    def __get__(self, value, owner=None): return self if value is None else getattr(value, self.name)
    def __set__(self, value, new):
        if not isinstance(new, self.kind): raise TypeError(self.name[1:])
        setattr(value, self.name, new)
class Positive:
    def __set_name__(self, owner, name): self.name = name
    def __get__(self, value, owner=None): return self if value is None else value.__dict__.get(self.name, 0)
    def __set__(self, value, new):
        if new < 0: raise ValueError(self.name)
        value.__dict__[self.name] = new
class Registered:
    all = {}
    def __init_subclass__(cls): Registered.all[cls.__name__] = cls
"""
TOGETHER = """import asyncio
class Limiter:
    def __init__(self, n): self.gate, self.now, self.most = asyncio.Semaphore(n), 0, 0
    async def run(self, work):
        async with self.gate:
            self.now += 1
            self.most = max(self.most, self.now)
            try: return await work
            finally: self.now -= 1
async def slow(x):
    await asyncio.sleep(0.1)
    return x
"""

RIGHT = {
    "types and metaclasses": (
        META,
        "from abc import ABCMeta\nfrom enum import EnumMeta",
        (
            "assert type(A) is M and type(A).__name__ == 'M' and isinstance(A, M)",
            "assert type(Plain) is type and type(get()).__name__ == 'type' and type(type(A)) is type",
            "assert type(Shape) is ABCMeta and type(Kind) is EnumMeta and type(Kind.ONE) is Kind",
            "assert type(A()) is A and type(A()).__name__ == 'A' and type(B) == type(A)",
            "assert repr(A) == '<A>' and str(B) == '<B>' and A.size == 42 and A.__doc__ == 'About A.'",
            "assert A + B == ('A', 'B') and sorted([B, A]) == [A, B] and A < B and not B < A",
            "assert {type(x).__name__ for x in (A(), B(), 3)} == {'A', 'B', 'int'}",
            "class E(B):\n    def who(self): return super(E, self).__repr__()\nassert 'E object' in E().who() and super(B, B()).__repr__()[:1] == '<'",
            "def kind(x): return type(x)\nassert kind(A()) is A and kind('') is str",
            "assert list(map(type, [1, ''])) == [int, str] and type('T', (), {})() is not None and type(A()) is A",
        ),
    ),
    "the library's objects": (
        LIBRARY,
        "import ast, collections, functools, io, itertools, re, statistics",
        (
            "assert isinstance(match('ab'), re.Match) and type(match('ab')) is re.Match and match('ab')['k'] == 'ab'",
            "assert isinstance(cube, functools.partial) and cube(2) == 8 and cube.keywords == {'exp': 3}",
            "assert isinstance(pairs(), zip) and type(numbered('a')) is enumerate and list(pairs())[1] == ('b', 2)",
            "assert isinstance(combined('abc'), itertools.combinations) and not isinstance(combined('ab'), zip)",
            "assert isinstance(tree('x').body, ast.Name) and ast.dump(tree('1+2')) == ast.dump(ast.parse('1+2', mode='eval'))",
            "assert isinstance(text(), io.StringIO) and text().readlines() == ['a\\n', 'b']",
            "assert normal() == statistics.NormalDist(1, 2) and normal() != statistics.NormalDist(1, 3)",
            "assert isinstance(layers(), collections.ChainMap) and dict(layers()) == {'a': 1, 'b': 2}",
            "assert same(len) is len and same(sorted)([2, 1]) == [1, 2] and same(square) is square",
            "assert not isinstance(pairs(), (int, list, str)) and not isinstance(match('a'), str)",
        ),
    ),
    "looked at with inspect": (
        LOOKED_AT,
        "import inspect\nfrom inspect import getattr_static, getsource",
        (
            "assert isinstance(getattr_static(D, 'p'), property) and isinstance(getattr_static(D, 's'), staticmethod)",
            "assert isinstance(inspect.getattr_static(D(), 'c'), classmethod) and inspect.isfunction(getattr_static(D, 'm'))",
            "assert inspect.getattr_static(D, 'k') == 5 and getattr_static(D(), 'no', None) is None",
            "assert getsource(f).startswith('def f') and '# one more' in inspect.getsource(f)",
            "assert 'def m' in getsource(D) and len(inspect.getsourcelines(f)[0]) == 2",
            "g = count(2)\nassert inspect.getgeneratorstate(g) == 'GEN_CREATED'\nnext(g)\nassert inspect.getgeneratorstate(g) == inspect.GEN_SUSPENDED",
            "def mine(): yield 1\nassert inspect.getgeneratorstate(mine()) == 'GEN_CREATED' and f(1) == 2",
        ),
    ),
    "containers": (
        CONTAINERS,
        "from datetime import datetime, timedelta, timezone, tzinfo\nfrom pathlib import PureWindowsPath",
        (
            "c = LRU(2)\nc['a'] = 1\nc['b'] = 2\nc['a']\nc['c'] = 3\nassert list(c) == ['a', 'c'] and isinstance(c, dict)",
            "d = Loud()\nd.append(2)\nassert list(d) == ['4'] and len(d) == 1",
            "assert len(Bytes(b'ab')) == 2 and list(Bytes(b'ab')) == ['x', 'y']",
            "g = Groups()\ng['a'].append(1)\nassert g['a'] == [7, 1] and len(g) == 1 and g.default_factory() == [7]",
            "d = Last(1, 2)\nd.append(3)\nassert list(d) == [2, 3] and d.maxlen == 2",
            "assert Ints('i', [1, 2]).total() == 3 and Ints('d', [1.5])[0] == 1.5",
            "n = Nested()\nn['x']['y'] = 1\nassert n == {'x': {'y': 1}} and isinstance(n['z'], Nested)",
            "u = Lower()\nu['A'] = 1\nassert u == {'a': 1} and u != {'a': 2} and 'a' in u and 'A' not in u",
            "assert Items([3, 4]).first() == 3 and Items([1]) + [2] == [1, 2] and Items([1]) != [2]",
            "assert Distinct([1, 2, 1]) == {1, 2} and Distinct([1]) != {2} and Distinct([1]) | Distinct([2]) == Distinct([1, 2])",
            "assert Frozen(a=1) == {'a': 1} and Frozen(a=1) != {'a': 2} and Frozen(a=1) != 3",
            "assert noon() == datetime(2020, 1, 1, 9, tzinfo=timezone.utc) and noon().utcoffset() == timedelta(hours=3)",
            "assert noon().tzname() == 'T' and isinstance(noon().tzinfo, Three) and noon().isoformat() == '2020-01-01T12:00:00+03:00'",
            "class Two(tzinfo):\n    def utcoffset(self, moment): return timedelta(hours=2)\nassert later(datetime(2020, 1, 1, tzinfo=Two())) == datetime(2020, 1, 1, 22, tzinfo=timezone.utc)",
            "assert drive().parent == PureWindowsPath('C:/a') and drive().drive == 'C:'",
        ),
    ),
    "solutions that look": (
        LOOKING,
        "import collections, dataclasses",
        (
            "assert curry(lambda a, b, c: a + b + c)(1)(2)(3) == 6 and arity(lambda a, b: 0) == 2",
            "@typed\ndef add(a: int, b: int) -> int: return a + b\nassert add(1, 2) == 3\ntry:\n    add(1, 'x')\n    raised = False\nexcept TypeError:\n    raised = True\nassert raised",
            "class P:\n    def __init__(self): self.x, self.y = 1, [2]\nassert as_dict(P()) == {'x': 1, 'y': [2]}",
            "@dataclasses.dataclass\nclass Item:\n    name: str\n    tags: list = dataclasses.field(default_factory=list)\nassert flat(Item('a', ['b'])) == {'name': 'a', 'tags': ['b']}",
            "assert named(collections.namedtuple('P', 'x y')(1, 2)) == {'x': 1, 'y': 2}",
            "b = Button()\nlog = []\nb.clicked += log.append\nb.clicked(3)\nb.clicked -= log.append\nb.clicked(4)\nassert log == [3]",
            "assert isinstance([], Sized) and not isinstance(3, Sized) and isinstance('', Sized)",
            "class Duck:\n    def quack(self): return 'mine'\nassert speak(Duck()) == 'mine' and speak(3) is None",
        ),
    ),
    "decorators and descriptors in the tests' classes": (
        DECORATING,
        "",
        (
            "@auto_init\nclass P:\n    x: int\n    y: int\np = P(1, 2)\nassert (p.x, p.y) == (1, 2) and repr(p) == 'P(x=1, y=2)'",
            "@tracked\nclass T:\n    def __init__(self, v): self.v = v\nassert (T(3).v, T(4).v) == (3, 4) and T.made == 2",
            "@richer\nclass K: w = 3\nk = K()\nassert k(4) == 8 and K.extra() == 'e' and k.label() == 'K' and k.double == 6\nk.double = 10\nassert k.w == 5",
            "class C:\n    z = 5\n    @counted\n    def m(self, x): return self.z + x\nassert C().m(1) == 6 and C().m(x=2) == 7 and C.m.calls == 2 and C.m.__name__ == 'm'",
            "@checked(x=lambda v: v > 0)\ndef power(x, y=3): return x ** y\nassert power(2) == 8 and power(2, y=2) == 4\ntry:\n    power(-1)\n    raised = ''\nexcept ValueError as error:\n    raised = str(error)\nassert raised == 'x'",
            "class P:\n    age = Typed(int)\n    name = Typed(str)\na, b = P(), P()\na.age, b.age, a.name = 3, 4, 'a'\nassert (a.age, b.age, a.name) == (3, 4, 'a') and isinstance(P.age, Typed)",
            "class P:\n    age = Typed(int)\ntry:\n    P().age = 'old'\n    raised = ''\nexcept TypeError as error:\n    raised = str(error)\nassert raised == 'age'",
            "class Q:\n    n = Positive()\nq = Q()\nassert q.n == 0\nq.n = 5\nassert q.n == 5 and vars(q) == {'n': 5}",
            "assert Registered.all == {}\nclass Mine(Registered): pass\nassert Registered.all['Mine'] is Mine and Registered.all == {'Mine': Mine}",
        ),
    ),
    "tasks side by side": (
        TOGETHER,
        "import asyncio",
        (
            "limiter = Limiter(2)\nasync def all_of():\n    return await asyncio.gather(*(limiter.run(slow(i)) for i in range(6)))\nassert asyncio.run(all_of()) == list(range(6)) and limiter.most == 2",
            "limiter = Limiter(9)\nasync def all_of():\n    return await asyncio.gather(*(limiter.run(slow(i)) for i in range(4)))\nassert asyncio.run(all_of()) == list(range(4)) and limiter.most == 4",
        ),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(every_assertion_passes, name):
    every_assertion_passes(*RIGHT[name])
