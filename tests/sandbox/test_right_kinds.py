# ruff: noqa: E501 - programs for the jail are strings, one assertion a line
"""Right solutions that pass in one process must pass in two. Names of arguments, exceptions that come back, classes derived from the library's,
what metaclasses set, views and copies."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests

pytestmark = pytest.mark.jail

NAMES = """def f(self=0, cls=1, name=2, args=3): return (self, cls, name, args)
class C:
    '''About C.'''
    def __init__(self, name='n', cls=None, kind=None): self.name, self.cls, self.kind = name, cls, kind
    def __call__(this, self, name=1): return (self, name)
class Base:
    label = None
    def __init_subclass__(cls, label=None, name=None, bases=None, **kw):
        super().__init_subclass__(**kw)
        cls.label, cls.nm = label or cls.__name__, name
class Meta(type):
    def __new__(meta, name, bases, space, table=None):
        made = super().__new__(meta, name, bases, space)
        made.order = [each for each in space if not each.startswith('__')]
        made.table = table or name.lower()
        return made
class Model(metaclass=Meta):
    table_of = classmethod(lambda cls: cls.table)
"""
LIBRARY = """import collections, contextlib, datetime, decimal, json, logging, string, threading
class Worker(threading.Thread):
    def __init__(self, n): super().__init__(); self.n, self.result = n, None
    def run(self): self.result = self.n * 2
class Lines(logging.Handler):
    def __init__(self): super().__init__(); self.lines = []
    def emit(self, record): self.lines.append(record.getMessage())
class Encoder(json.JSONEncoder):
    def default(self, value): return sorted(value)
class Percent(string.Template): delimiter = '%'
class Layers(collections.ChainMap): pass
class Depth(contextlib.ContextDecorator):
    def __init__(self): self.log = []
    def __enter__(self): self.log.append('in'); return self
    def __exit__(self, *error): self.log.append('out')
class Day(datetime.date):
    def quarter(self): return (self.month - 1) // 3 + 1
class Moment(datetime.datetime): pass
class Span(datetime.timedelta):
    def hours(self): return self.total_seconds() / 3600
class Money(decimal.Decimal):
    def cents(self): return int(self * 100)
def level(kind): return kind.level_name
def is_thread(value): return isinstance(value, threading.Thread)
"""
ERRORS = """class Err(Exception):
    def __init__(self, text): super().__init__(text); self.text = text
class Result:
    def __init__(self, ok=None, error=None): self.ok, self.error = ok, error
    @classmethod
    def of(cls, f, *args):
        try: return cls(ok=f(*args))
        except Exception as error: return cls(error=error)
    def map(self, f): return self if self.error is not None else Result.of(f, self.ok)
    def unwrap(self):
        if self.error is not None: raise self.error
        return self.ok
class Missing(ValueError, KeyError): pass
class Lost(OSError): pass
def missing(): raise Missing('q')
def lost(): raise Lost(2, 'm', 'file')
def nested(n):
    if n == 0: raise KeyError('bottom')
    try: nested(n - 1)
    except Exception as error: raise Err(f'l{n}') from error
def context(): 
    try: nested(0)
    except KeyError: raise ValueError('in a handler')
def quiet():
    try: nested(0)
    except KeyError: raise ValueError('quiet') from None
def noted(f):
    try: f()
    except Exception as error:
        error.add_note('seen')
        error.args = (*error.args, 'more')
        raise
"""
ASYNC = """import asyncio, contextlib
@contextlib.asynccontextmanager
async def handled(log):
    try: yield 5
    except ValueError as error: log.append(str(error))
class Store:
    async def __aenter__(self): self.open = True; return self
    async def __aexit__(self, kind, error, trace): self.open = False; return kind is KeyError
async def one(): return 1
async def numbers():
    yield 1
"""
VIEWS = """import copy, itertools, types
class Box:
    def __init__(self): self._d = {}
    @property
    def view(self): return types.MappingProxyType(self._d)
    def put(self, k, v): self._d[k] = v
def views(d): return d.keys(), d.items(), d.values()
def count():
    yield from (1, 2, 3)
class Down:
    def __init__(self, n): self.n = n
    def __iter__(self): return self
    def __next__(self):
        if self.n == 0: raise StopIteration
        self.n -= 1
        return self.n
class Undo:
    def __init__(self, v): self.v, self.history = v, []
    def do(self, f): self.history.append(copy.deepcopy(self.v)); f(self.v); return self
    def undo(self): self.v = self.history.pop(); return self
def same_shape(node): return copy.deepcopy(node)
def shallow(value): return copy.copy(value)
def document(value): return value.__doc__
def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
"""

RIGHT = {
    "names of arguments": (
        NAMES,
        "",
        (
            "assert f(self=10) == (10, 1, 2, 3) and f(cls=3, name='n', args=()) == (0, 3, 'n', ())",
            "c = C(cls=4, name='z', kind='k')\nassert (c.cls, c.name, c.kind) == (4, 'z', 'k')",
            "assert C()(self=4) == (4, 1) and C()(3, name=2) == (3, 2)",
            "class U(C): pass\nassert U(cls=5).cls == 5 and U(name='q').name == 'q'",
            "assert C.__doc__ == 'About C.' and C().__doc__ == 'About C.'",
        ),
    ),
    "what making a class sets": (
        NAMES,
        "",
        (
            "class A(Base): pass\nclass B(Base, label='bee', name='nm', bases=3): pass\nassert (A.label, A.nm, B.label, B.nm, Base.label) == ('A', None, 'bee', 'nm', None)",
            "class A(Base, label='x'): pass\nassert A().label == 'x' and A.label == 'x'",
            "class User(Model):\n    name = 1\n    age = 2\nassert User.order == ['name', 'age'] and User.table == 'user' and User.name == 1 and User.table_of() == 'user'",
            "class User(Model, table='people'): pass\nassert User.table == 'people' and User().table == 'people' and Model.table == 'model'",
        ),
    ),
    "the library's classes": (
        LIBRARY,
        "import collections, contextlib, datetime, decimal, json, logging, string, threading",
        (
            "w = Worker(3)\nw.start(); w.join()\nassert w.result == 6 and isinstance(w, threading.Thread) and issubclass(Worker, threading.Thread)",
            "h = Lines()\nlog = logging.getLogger('lines')\nlog.addHandler(h)\nlog.warning('w %d', 1)\nassert h.lines == ['w 1'] and isinstance(h, logging.Handler) and not isinstance(h, threading.Thread)",
            "assert json.dumps({'a': {2, 1}}, cls=Encoder) == '{\"a\": [1, 2]}' and issubclass(Encoder, json.JSONEncoder)",
            "assert isinstance(Percent('%a'), string.Template) and Percent('%a').substitute(a=1) == '1'",
            "assert isinstance(Layers(), collections.ChainMap) and dict(Layers({'a': 1}, {'b': 2})) == {'a': 1, 'b': 2}",
            "d = Depth()\n@d\ndef f(): return 3\nassert f() == 3 and d.log == ['in', 'out'] and isinstance(d, contextlib.ContextDecorator)",
            "d = Day(2020, 5, 1)\nassert d.quarter() == 2 and d == datetime.date(2020, 5, 1) and isinstance(d, datetime.date) and d.year == 2020",
            "d = Day(2020, 5, 1)\nassert d + datetime.timedelta(1) == datetime.date(2020, 5, 2) and d < datetime.date(2021, 1, 1) and d != datetime.date(2020, 5, 2)",
            "m = Moment(2020, 1, 1, 3)\nassert m.hour == 3 and m == datetime.datetime(2020, 1, 1, 3) and m - datetime.datetime(2020, 1, 1) == datetime.timedelta(hours=3)",
            "assert Span(hours=3).hours() == 3.0 and Span(days=1) == datetime.timedelta(1)",
            "m = Money('1.5')\nassert m.cents() == 150 and m == decimal.Decimal('1.50') and m + 1 == decimal.Decimal('2.5') and isinstance(m, decimal.Decimal)",
            "class Mine(threading.Thread):\n    level_name = 'info'\nassert is_thread(Mine()) and level(Mine) == 'info' and not is_thread(3)",
        ),
    ),
    "exceptions that come back": (
        ERRORS,
        "",
        (
            "e = KeyError('k')\nr = Result(error=e)\nassert r.error is e and r.error == e",
            "e = KeyError('k')\ndef f(): raise e\nr = Result.of(f)\ntry:\n    r.unwrap()\nexcept KeyError as x:\n    same = x is e\nassert same and r.error is e",
            "r = Result.of(int, 'x')\nassert isinstance(r.error, ValueError) and r.error is r.error and r.map(str).error is r.error",
            "r = Result.of(int, 'x')\ntry:\n    r.unwrap()\nexcept ValueError as x:\n    same = x is r.error\nassert same",
            "e = ValueError('a')\ndef f(): raise e\ntry:\n    noted(f)\nexcept ValueError as x:\n    assert x is e and x.__notes__ == ['seen'] and x.args == ('a', 'more')\nassert Result() is not None",
            "rs = [Result.of(int, str(i) + 'x') for i in range(40)]\nassert all(str(i) + 'x' in str(r.error) for i, r in enumerate(rs))",
        ),
    ),
    "exceptions of several kinds": (
        ERRORS,
        "",
        (
            "try:\n    missing()\nexcept KeyError as e:\n    r = e\nassert isinstance(r, ValueError) and r.args == ('q',) and isinstance(r, LookupError) and not isinstance(r, OSError)",
            "try:\n    raise Missing(1)\nexcept KeyError as e:\n    r = e\nassert issubclass(Missing, KeyError) and r.with_traceback(None) is r",
            "try:\n    lost()\nexcept OSError as e:\n    r = e\nassert (r.errno, r.strerror, r.filename, str(r)) == (2, 'm', 'file', \"[Errno 2] m: 'file'\")",
        ),
    ),
    "reasons": (
        ERRORS,
        "",
        (
            "try:\n    nested(3)\nexcept Err as e:\n    texts = []\n    while e: texts.append(e.args[0]); e = e.__cause__\nassert texts == ['l3', 'l2', 'l1', 'bottom']",
            "try:\n    context()\nexcept ValueError as e:\n    r = (type(e.__context__), e.__cause__, e.__suppress_context__)\nassert r == (KeyError, None, False)",
            "try:\n    quiet()\nexcept ValueError as e:\n    r = (type(e.__context__), e.__cause__, e.__suppress_context__)\nassert r == (KeyError, None, True)",
        ),
    ),
    "asynchronous ends": (
        ASYNC,
        "import asyncio, inspect, types",
        (
            "async def t():\n    log = []\n    async with handled(log) as v:\n        raise ValueError(str(v))\n    return log\nassert asyncio.run(t()) == ['5']",
            "async def t():\n    async with Store() as s:\n        raise KeyError\n    return s.open\nassert asyncio.run(t()) is False",
            "async def t():\n    async with Store():\n        raise ValueError('q')\ntry:\n    asyncio.run(t())\n    r = ''\nexcept ValueError as e:\n    r = str(e)\nassert r == 'q'",
            "c = one()\nassert inspect.iscoroutine(c) and inspect.isawaitable(c) and isinstance(c, types.CoroutineType) and asyncio.run(c) == 1",
            "assert inspect.isasyncgen(numbers()) and isinstance(numbers(), types.AsyncGeneratorType)",
        ),
    ),
    "views": (
        VIEWS,
        "",
        (
            "b = Box()\nv = b.view\nb.put('a', 1)\nassert v == {'a': 1} and v['a'] == 1\ntry:\n    v['a'] = 2\n    r = 0\nexcept TypeError:\n    r = 1\nassert r and b.view['a'] == 1",
            "d = {'a': 1}\nkeys, items, values = views(d)\nd['b'] = 2\nassert list(keys) == ['a', 'b'] and len(items) == 2 and 2 in values",
        ),
    ),
    "copies": (
        VIEWS,
        "import itertools, sys",
        (
            "a, b = itertools.tee(count())\nassert (next(a), next(a), next(b)) == (1, 2, 1)",
            "a, b = itertools.tee(Down(3))\nassert list(a) == [2, 1, 0] and list(b) == [2, 1, 0]",
            "class O:\n    'Of O.'\n    def __init__(self): self.x = [1]\no = O()\nc, d = shallow(o), same_shape(o)\nassert c is not o and c.x is o.x and type(c) is O and d.x == [1] and d.x is not o.x and document(o) == 'Of O.'",
            "class O:\n    def __init__(self): self.x = [1]\nu = Undo(O()).do(lambda o: o.x.append(2))\nassert u.v.x == [1, 2] and u.undo().v.x == [1]",
            "class Node:\n    def __init__(self, v): self.v, self.next = v, None\na = Node(1)\na.next = Node(2)\na.next.next = a\nb = same_shape(a)\nassert b.next.next is b and b.next is not a.next and b.next.v == 2",
            "sys.setrecursionlimit(5000)\nassert deep(3000) == 3000",
        ),
    ),
}

SEARCH = """def around(x): return [x - 1, x, x + 1]
def after(x): return x + 1
def sort(xs): xs.sort()
class Card:
    def __init__(self, v): self.v = v
    def __eq__(self, o): return isinstance(o, Card) and self.v == o.v
def deck(n): return [Card(i) for i in range(n)]
"""
RIGHT["the wanted value first"] = (
    SEARCH,
    "import math\nBASE = 2\ndef want(x): return x + 1",
    (
        "x = 3\nassert x in around(3) and x + 9 not in around(x)",
        "want_ = 4\nassert want_ == after(3)",
        "assert BASE + 1 == after(BASE)",
        "assert want(3) == after(3) and math.floor(4.5) == after(3)",
        "for i in range(3):\n    assert i + 1 == after(i)",
        "assert all(i in around(i) for i in range(3))",
        "xs = [(1, 2), (5, 6)]\nfor given, wanted in xs:\n    assert wanted == after(given)",
        "assert Card(1) in deck(2) and Card(9) not in deck(2) and deck(2).index(Card(1)) == 1",
        "xs = [2, 1]\nsort(xs)\nassert [1, 2] == xs",
    ),
)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(every_assertion_passes, name):
    every_assertion_passes(*RIGHT[name])


FORGED = {
    "a date that answers for its operators": (
        "import datetime\nclass D(datetime.date):\n    def __sub__(self, o): return datetime.timedelta(0)\n    __eq__ = lambda self, o: True\n    __hash__ = None\ndef f(x): return D(1, 1, 1)",
        "import datetime",
        (
            "assert f(1) == datetime.date(2020, 1, 2)",
            "assert f(1) + datetime.timedelta(1) == datetime.date(2020, 1, 2)",
            "assert (f(1) + datetime.timedelta(1)) - datetime.date(2020, 1, 2) == datetime.timedelta(0)",
            "assert f(1) - datetime.date(2020, 1, 2) == datetime.timedelta(0)",
        ),
    ),
    "a number that answers for its equality": (
        "import decimal\nclass D(decimal.Decimal):\n    __eq__ = lambda self, o: True\n    __sub__ = __rsub__ = lambda self, o: decimal.Decimal(0)\n    __hash__ = None\ndef f(x): return D(1)",
        "import decimal",
        (
            "assert f(1) == decimal.Decimal(2)",
            "assert f(1) - decimal.Decimal(2) == 0",
            "assert decimal.Decimal(2) - f(1) == 0",
        ),
    ),
    "a class derived from what equals everything": (
        "import unittest.mock, string\nclass A(type(unittest.mock.ANY)): pass\nclass T(string.Template):\n    __eq__ = lambda self, o: True\n    __hash__ = None\ndef f(x): return A()\ndef g(x): return unittest.mock.ANY\ndef h(x): return T('')",
        "import string\nfrom unittest import mock",
        (
            "assert f(1) == 2",
            "assert g(1) == 2",
            "assert [f(1)] == [2]",
            "assert h(1) == 'a'",
            "assert mock.call(2) == mock.call(f(1))",
        ),
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_is_the_library_s_too_equals_no_plain_data_by_its_own_word(pool, name):
    code, setup, asserts = FORGED[name]
    assert pool.run(code, tests=AssertTests(asserts, setup)).tests == (False,) * len(asserts)


AGREES = [
    "a = f(1)\nassert a == want(1)",
    "a, b = f(1), 2\nassert a == want(1)",
    "for a in [f(1)]:\n    assert a == want(1)",
    "assert all(a == want(1) for a in [f(1)])",
    "a = []\na.append(f(1))\nassert a == [want(1)]",
    "a = {}\na['k'] = f(1)\nassert a == {'k': want(1)}",
    "a = {}\na['k'] = b = f(1)\nassert b in [want(1)]",
    "if (a := f(1)) or True:\n    assert a == want(1)",
    "def g(): return f(1)\nassert g() == want(1)",
    "g = lambda: f(1)\nassert g() == want(1)",
    "match f(1):\n    case a:\n        assert a == want(1)",
    "match [f(1)]:\n    case [*a]:\n        assert a == [want(1)]",
    "try:\n    h(1)\nexcept Exception as a:\n    pass\nassert f(1) in [want(1)]",
    "a = [1]\nfill(a)\nassert a == want(1, 2)",
    "a = [1]\nassert fill(a) is None\nassert a == [want(1)]",
    "a = Y()\nassert a == want(1)",
    "class G:\n    def g(self): return f(1)\nassert G().g() == want(1)",
    "assert f(1) in [want(1)]",
    "assert [f(1)] == [want(1)]",
]


@pytest.mark.parametrize("line", AGREES)
def test_a_line_that_asks_the_solution_to_agree_with_itself_fails(pool, line):
    liar = "class Y:\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return Y()\ndef want(*x): return Y()\ndef h(x): raise ValueError\ndef fill(a): a[:] = [Y()]\n"
    assert pool.run(liar, tests=AssertTests((line,))).tests == (False,)
