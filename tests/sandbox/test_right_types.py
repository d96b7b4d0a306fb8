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
CONTAINERS = """from collections import OrderedDict, UserDict, UserList, deque
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
    await asyncio.sleep(0.001)
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
