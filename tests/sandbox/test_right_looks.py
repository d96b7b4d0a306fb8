# ruff: noqa: E501 - programs for the jail are strings, one assertion a line
"""Right solutions that pass in one process must pass in two. What tests look at: members, bases, annotations, signatures; and copies that they make with pickle."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.jail

SHAPES = '''import abc, dataclasses, enum, functools, typing
from abc import ABC
from collections.abc import Mapping
from typing import Generic, List, NamedTuple, Optional, TypeVar
T = TypeVar("T")
class Point:
    """A point."""
    kind: str = "flat"
    def __init__(self, x: int, y: int = 0): self.x, self.y = x, y
    def norm(self) -> float:
        """Its length."""
        return (self.x ** 2 + self.y ** 2) ** 0.5
    @property
    def both(self) -> tuple: return (self.x, self.y)
    @staticmethod
    def zero() -> "Point": return Point(0)
    @classmethod
    def of(cls, pair): return cls(*pair)
    def __eq__(self, other): return isinstance(other, Point) and self.both == other.both
    def __hash__(self): return hash(self.both)
class Animal(ABC):
    def __init__(self, name): self.name = name
    @abc.abstractmethod
    def speak(self) -> str: ...
class Dog(Animal):
    def speak(self): return "Woof"
class Bag(Mapping):
    def __init__(self, d): self._d = dict(d)
    def __getitem__(self, k): return self._d[k]
    def __iter__(self): return iter(self._d)
    def __len__(self): return len(self._d)
class Day(enum.Enum):
    MON = "m"
    TUE = "t"
    @property
    def long(self): return self.name.title()
class Perm(enum.Flag):
    R = 4
    W = 2
class MyList(list):
    def append(self, x): super().append(x * 2)
class Stack(Generic[T]):
    def __init__(self) -> None: self.items: List[T] = []
    def push(self, item: T) -> None: self.items.append(item)
    def pop(self) -> T: return self.items.pop()
@typing.runtime_checkable
class Speaks(typing.Protocol):
    def speak(self) -> str: ...
class Plain: pass
class Ctx:
    def __init__(self): self.log = []
    def __enter__(self): return self
    def __exit__(self, kind, error, tb): self.log.append(kind); return kind is KeyError
'''

COPIED = """import dataclasses, enum
from typing import NamedTuple, Optional
class Point:
    def __init__(self, x, y=0): self.x, self.y = x, y
    def __eq__(self, other): return isinstance(other, Point) and (self.x, self.y) == (other.x, other.y)
class Slotted:
    __slots__ = ("a", "b")
    def __init__(self, a, b): self.a, self.b = a, b
class Picky:
    def __init__(self, n): self.n, self.cache = n, {1: 2}
    def __getstate__(self): return {"n": self.n}
    def __setstate__(self, state): self.__dict__.update(state, cache={})
class Reduced:
    def __init__(self, n): self.n = n
    def __reduce__(self): return (Reduced, (self.n + 1,))
@dataclasses.dataclass
class Tree:
    value: int
    left: Optional["Tree"] = None
    def depth(self): return 1 + (self.left.depth() if self.left else 0)
class Color(enum.Enum):
    RED = 1
class Vec(NamedTuple):
    x: float
    y: float = 0.0
class Err(ValueError):
    def __init__(self, code): super().__init__(code); self.code = code
def error(): return Err(3)
def gen(n): yield n
def add(a, b): return a + b
"""

HINTS = """import dataclasses, functools, typing
from typing import Dict, List, NamedTuple, Optional, TypedDict
class Point:
    kind: str = "flat"
    def __init__(self, x: int, y: int = 0): self.x = x
    def norm(self) -> float: return 1.0
    @staticmethod
    def zero() -> "Point": return Point(0)
    @classmethod
    def of(cls, pair): return cls(*pair)
@dataclasses.dataclass
class Item:
    name: str
    tags: List[str] = dataclasses.field(default_factory=list)
    parent: Optional["Item"] = None
class Vec(NamedTuple):
    x: float
    y: float = 0.0
def typed(f: typing.Callable[[int, str], bool], *, key: typing.Literal["a", "b"] = "a", m: int | None = None, s: list[dict[str, int]] = ()) -> typing.Iterator[typing.Tuple[int, ...]]: ...
def late(t: "Item", *a: "int") -> "Dict[str, List[Item]]": ...
def free(x: typing.Any, y: typing.Annotated[int, "positive"] = 1) -> None: ...
def loud(f):
    @functools.wraps(f)
    def inner(*args, **kw): return f(*args, **kw)
    return inner
@loud
def greet(name: str, n: int = 2) -> str: return name * n
half = functools.partial(greet, n=3)
@functools.lru_cache
def fib(n: int) -> int: return n
"""

OBSERVED = """from abc import ABC, abstractmethod
class Observer(ABC):
    @abstractmethod
    def update(self, event): ...
class Subject:
    def __init__(self): self.all = []
    def attach(self, o):
        if not isinstance(o, Observer): raise TypeError('not an observer')
        self.all.append(o)
    def notify(self, event): return [o.update(event) for o in self.all]
"""

RIGHT = {
    "mocks": (
        OBSERVED,
        "from unittest.mock import MagicMock, Mock",
        (
            "o = MagicMock(spec=Observer)\no.update.return_value = 7\ns = Subject()\ns.attach(o)\nassert s.notify('e') == [7]\no.update.assert_called_once_with('e')",
            "s = Subject()\ntry:\n    s.attach(Mock())\n    failed = False\nexcept TypeError:\n    failed = True\nassert failed",
        ),
    ),
    "shapes": (
        SHAPES,
        "",
        (
            "import inspect\nassert [n for n, _ in inspect.getmembers(Point, inspect.isfunction)] == ['__eq__', '__hash__', '__init__', 'norm', 'zero']",
            "import inspect\nassert [n for n, _ in inspect.getmembers(Dog('x'), inspect.ismethod) if n[0] != '_'] == ['speak']",
            "import inspect\nassert {n for n, _ in inspect.getmembers(Bag, inspect.isfunction)} >= {'__getitem__', '__init__', 'get', 'items'}",
            "import inspect\nassert inspect.isabstract(Animal) and not inspect.isabstract(Dog)",
            "assert Point.__init__ is not object.__init__ and Plain.__init__ is object.__init__ and Plain.__repr__ is object.__repr__",
            "assert Point.__annotations__ == {'kind': str} and Point.__doc__ == 'A point.'",
            "from abc import ABC, ABCMeta\nassert issubclass(Animal, ABC) and isinstance(Dog('x'), ABC) and Animal.__bases__ == (ABC,) and isinstance(Animal, ABCMeta)",
            "assert Plain.__bases__ == (object,) and Dog.__base__ is Animal and Dog.__mro__[:2] == (Dog, Animal)",
            "from enum import Enum, EnumMeta\nassert issubclass(Day, Enum) and isinstance(Day.MON, Enum) and Day.__bases__ == (Enum,) and isinstance(Day, EnumMeta)",
            "assert Day.MON.long == 'Mon' and Day.MON.name == 'MON' and Day('t') is Day.TUE and list(Day) == [Day.MON, Day.TUE]",
            "assert (Perm.R | Perm.W).value == 6 and Perm.R in (Perm.R | Perm.W) and not Perm.R & Perm.W",
            "from collections.abc import Mapping\nb = Bag({'a': 1})\nassert isinstance(b, Mapping) and dict(b) == {'a': 1} and b.get('z', 5) == 5 and list(b.items()) == [('a', 1)]",
            "from collections.abc import Mapping\nassert issubclass(Bag, Mapping) and not issubclass(Plain, Mapping)",
            "l = MyList([1])\nl.append(3)\nassert l == [1, 6] and MyList.append.__name__ == 'append'",
            "import typing\nassert typing.get_args(Stack[int]) == (int,) and typing.get_origin(Stack[int]) is Stack and Stack.__orig_bases__[0].__origin__ is typing.Generic",
            "s = Stack[int]()\ns.push(3)\nassert s.pop() == 3 and isinstance(s, Stack)",
            "assert isinstance(Dog('x'), Speaks) and not isinstance(Plain(), Speaks) and issubclass(Dog, Speaks)",
            "p = Point(1, 2)\np.__init__(5)\nassert p.both == (5, 0)",
            "class Cat(Animal):\n    def __init__(self, name, age):\n        Animal.__init__(self, name)\n        self.age = age\n    def speak(self): return 'Meow'\nc = Cat('tom', 3)\nassert (c.name, c.age, c.speak()) == ('tom', 3, 'Meow')",
            "import contextlib\nc = Ctx()\nwith contextlib.ExitStack() as stack:\n    stack.enter_context(c)\n    raise KeyError(2)\nassert c.log == [KeyError]",
            "assert 'norm' in vars(Point) and 'x' not in vars(Point) and vars(Point(1, 2)) == {'x': 1, 'y': 2} and 'x' in dir(Point(1))",
        ),
    ),
    "copied": (
        COPIED,
        "",
        (
            "import pickle\np = Point(1, 2)\nq = pickle.loads(pickle.dumps(p))\nassert q == p and q is not p and q.x == 1",
            "import pickle\nassert pickle.loads(pickle.dumps([Point(1), {'k': (Point(2), None)}])) == [Point(1), {'k': (Point(2), None)}]",
            "import pickle\na = Point(1)\nx, y = pickle.loads(pickle.dumps((a, a)))\nassert x is y and x is not a",
            "import pickle\nt = Tree(1, Tree(2))\nu = pickle.loads(pickle.dumps(t))\nu.left.value = 9\nassert t.left.value == 2 and u.depth() == 2 and u != t",
            "import pickle\ns = pickle.loads(pickle.dumps(Picky(5)))\nassert s.n == 5 and s.cache == {}",
            "import pickle\nassert pickle.loads(pickle.dumps(Reduced(5))).n == 6",
            "import pickle\ns = pickle.loads(pickle.dumps(Slotted(1, [2]), protocol=2))\nassert (s.a, s.b) == (1, [2])",
            "import pickle\nassert pickle.loads(pickle.dumps(Color.RED)) is Color.RED and pickle.loads(pickle.dumps(Color)) is Color",
            "import pickle\nassert pickle.loads(pickle.dumps(Vec(3))) == Vec(3) and pickle.loads(pickle.dumps(add))(1, 2) == 3",
            "import pickle\ntry:\n    raise error()\nexcept Err as e:\n    assert e.code == 3 and e.args == (3,) and isinstance(e, ValueError)",
            "import io, pickle\nf = io.BytesIO()\npickle.dump(Point(3), f)\nf.seek(0)\nassert pickle.load(f) == Point(3)",
            "import pickle\ntry:\n    pickle.dumps(gen(3))\n    failed = False\nexcept TypeError:\n    failed = True\nassert failed",
            "import copy\nt = Tree(1, Tree(2))\nu, v = copy.copy(t), copy.deepcopy(t)\nassert u.left is t.left and v.left is not t.left and u == v == t",
            "import copy\nassert copy.deepcopy(Color.RED) is Color.RED and copy.copy(Reduced(1)).n == 2 and copy.copy(Picky(3)).cache == {}",
            "import dataclasses\nassert dataclasses.replace(Tree(1), value=2) == Tree(2) and dataclasses.asdict(Tree(1, Tree(2)))['left']['value'] == 2",
        ),
    ),
    "hints": (
        HINTS,
        "",
        (
            "import typing\nh = typing.get_type_hints(typed)\nassert h['f'] == typing.Callable[[int, str], bool] and h['key'] == typing.Literal['a', 'b'] and h['m'] == (int | None) and h['s'] == list[dict[str, int]]",
            "import typing\nassert typing.get_type_hints(typed)['return'] == typing.Iterator[typing.Tuple[int, ...]]",
            "import typing\nassert typing.get_type_hints(late) == {'t': Item, 'a': int, 'return': typing.Dict[str, typing.List[Item]]}",
            "import typing\nh = typing.get_type_hints(free)\nassert h['x'] is typing.Any and h['y'] is int and h['return'] is type(None)",
            "import typing\nassert typing.get_type_hints(free, include_extras=True)['y'] == typing.Annotated[int, 'positive']",
            "from typing import get_args, get_type_hints\nassert get_args(get_type_hints(Item)['parent']) == (Item, type(None)) and get_type_hints(Point) == {'kind': str}",
            "import typing\nassert typing.get_type_hints(Point.__init__) == {'x': int, 'y': int} and typing.get_type_hints(Point.zero)['return'] is Point",
            "import typing\nassert typing.get_type_hints(greet) == {'name': str, 'n': int, 'return': str} and typing.get_type_hints(Vec) == {'x': float, 'y': float}",
            "import typing\ndef mine(x: int) -> 'str': ...\nassert typing.get_type_hints(mine)['return'] is str and greet('a') == 'aa'",
            "assert late.__annotations__['t'] == 'Item' and typed.__annotations__['m'] == int | None",
            "import inspect\nassert list(inspect.signature(Point).parameters) == ['x', 'y'] and list(inspect.signature(Vec).parameters) == ['x', 'y']",
            "import inspect\nassert str(inspect.signature(Item)).startswith('(name: str, tags: List[str] =') or 'tags' in inspect.signature(Item).parameters",
            "import inspect\nassert str(inspect.signature(greet)) == '(name: str, n: int = 2) -> str' and str(inspect.signature(fib)) == '(n: int) -> int'",
            "import inspect\nassert inspect.signature(half).parameters['n'].default == 3 and half('a') == 'aaa'",
            "import inspect\nassert [p.name for p in inspect.signature(Point.of).parameters.values()] == ['pair']",
            "import inspect\nkey = inspect.signature(typed).parameters['key']\nassert key.kind is inspect.Parameter.KEYWORD_ONLY and key.default == 'a'",
            "import inspect\nassert inspect.signature(typed).parameters['f'].default is inspect.Parameter.empty",
            "import inspect\nassert inspect.signature(greet).bind('x', n=4).arguments == {'name': 'x', 'n': 4}",
        ),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(every_assertion_passes, name):
    every_assertion_passes(*RIGHT[name])
