# ruff: noqa: E501 - programs for the jail are strings, one assertion a line
"""Right solutions that pass in one process must pass in two. What tests look at: values of the standard library, functions and their signatures, exceptions and what is in them."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.jail

RIGHT = {
    "exceptions with attributes": (
        """class AppError(Exception):
    def __init__(self, code, message='', *, detail=None):
        super().__init__(message)
        self.code, self.detail = code, detail
    def __str__(self): return f'[{self.code}] {self.args[0]}'
class NotFound(AppError, KeyError):
    def __init__(self, key): super().__init__(404, f'{key} missing', detail={'key': key}); self.key = key
class Validation(ValueError):
    @property
    def fields(self): return sorted(self.errors)
    def __init__(self, errors): self.errors = errors; super().__init__('; '.join(errors))
def f(k):
    if k == 1: raise NotFound('a')
    if k == 2: raise Validation({'b': 'x', 'a': 'y'})
    if k == 3:
        try: {}['q']
        except KeyError as e: raise AppError(500, 'boom') from e
    if k == 4: raise ExceptionGroup('g', [ValueError(1), TypeError(2)])
    if k == 5: raise OSError(2, 'nope', 'file')
    if k == 6: raise UnicodeDecodeError('utf8', b'x', 0, 1, 'bad')
    if k == 7:
        e = ValueError('x'); e.add_note('n'); raise e
    if k == 8: import json; json.loads('{')
    if k == 9: raise StopIteration(5)
    if k == 10: raise SystemExit(3)
    if k == 11: raise KeyboardInterrupt
    if k == 12: assert False, 'inner'
    if k == 13: import decimal; decimal.Decimal('x')
    if k == 14: import subprocess; raise subprocess.CalledProcessError(3, ['x'], output='o')
""",
        "",
        (
            "try:\n    f(1)\n    r = None\nexcept NotFound as e:\n    r = (e.code, e.key, e.detail, str(e))\nassert r == (404, 'a', {'key': 'a'}, '[404] a missing')",
            "try:\n    f(1)\n    r = None\nexcept AppError as e:\n    r = e.code\nassert r == 404",
            "try:\n    f(1)\n    r = None\nexcept KeyError as e:\n    r = e.key\nassert r == 'a'",
            "try:\n    f(1)\n    r = None\nexcept LookupError as e:\n    r = e.args\nassert r == ('a missing',)",
            "try:\n    f(2)\n    r = None\nexcept ValueError as e:\n    r = (e.fields, e.errors['a'])\nassert r == (['a', 'b'], 'y')",
            "try:\n    f(3)\n    r = None\nexcept AppError as e:\n    r = (type(e.__cause__).__name__, e.__cause__.args)\nassert r == ('KeyError', ('q',))",
            "try:\n    f(4)\n    r = None\nexcept ExceptionGroup as e:\n    r = [type(x) for x in e.exceptions]\nassert r == [ValueError, TypeError]",
            "try:\n    f(5)\n    r = None\nexcept FileNotFoundError as e:\n    r = (e.errno, e.strerror, e.filename)\nassert r == (2, 'nope', 'file')",
            "try:\n    f(6)\n    r = None\nexcept UnicodeDecodeError as e:\n    r = (e.encoding, e.object, e.start, e.reason)\nassert r == ('utf8', b'x', 0, 'bad')",
            "try:\n    f(6)\n    r = None\nexcept ValueError as e:\n    r = type(e).__name__\nassert r == 'UnicodeDecodeError'",
            "try:\n    f(7)\n    r = None\nexcept ValueError as e:\n    r = e.__notes__\nassert r == ['n']",
            "try:\n    f(8)\n    r = None\nexcept ValueError as e:\n    r = (type(e).__name__, e.pos, e.lineno)\nassert r == ('JSONDecodeError', 1, 1)",
            "try:\n    f(10)\n    r = None\nexcept SystemExit as e:\n    r = e.code\nassert r == 3",
            "try:\n    f(11)\n    r = None\nexcept KeyboardInterrupt as e:\n    r = 1\nassert r == 1",
            "try:\n    f(12)\n    r = None\nexcept AssertionError as e:\n    r = str(e)\nassert r == 'inner'",
            "try:\n    f(13)\n    r = None\nexcept ArithmeticError as e:\n    r = type(e).__name__\nassert r == 'InvalidOperation'",
            "try:\n    f(14)\n    r = None\nexcept Exception as e:\n    r = (e.returncode, e.cmd, e.output)\nassert r == (3, ['x'], 'o')",
            "try:\n    f(4)\n    r = 0\nexcept* ValueError as g:\n    r = len(g.exceptions)\nexcept* TypeError as g:\n    pass\nassert r == 1",
            "assert issubclass(NotFound, KeyError) and issubclass(NotFound, AppError)",
            "assert NotFound('z').key == 'z'",
            "e = NotFound('z')\ntry:\n    raise e\nexcept AppError as x:\n    same = x is e\nassert same",
            "assert Validation.__mro__[1] is ValueError",
            "assert NotFound.__bases__[0] is AppError",
        ),
    ),
    "functions looked at": (
        """from typing import List, Optional, overload
import functools
def f(a: int, b: 'str' = 'x', *args, c, d=None, **kw) -> Optional[int]:
    '''Doc of f.'''
    return a
async def g(x): return x
def gen(n): yield n
async def ag(n): yield n
class C:
    '''Doc of C.'''
    def m(self, a, b=2): return a
    @classmethod
    def k(cls, x): return x
    @staticmethod
    def s(x): return x
    @property
    def p(self): return 1
h = functools.partial(f, 3, c=1)
@functools.lru_cache(maxsize=None)
def cached(n): return n if n < 2 else cached(n - 1) + cached(n - 2)
@functools.singledispatch
def sd(x): return 'obj'
@sd.register
def _(x: int): return 'int'
@sd.register(list)
def _(x): return 'list'
lam = lambda x, y=1: x
def deco(fn):
    @functools.wraps(fn)
    def w(*a, **k):
        w.calls += 1
        return fn(*a, **k)
    w.calls = 0
    return w
def retry(n):
    def d(fn):
        def w(*a, **k):
            for i in range(n):
                try: return fn(*a, **k)
                except ValueError:
                    if i == n - 1: raise
        return w
    return d
def memo(fn):
    cache = {}
    @functools.wraps(fn)
    def w(*a):
        if a not in cache: cache[a] = fn(*a)
        return cache[a]
    w.cache = cache
    return w
def compose(*fs): return lambda x: functools.reduce(lambda a, q: q(a), fs, x)
def curry(fn, n): return (lambda *a: fn(*a)) if n <= 1 else (lambda x: curry(functools.partial(fn, x), n - 1))
class count_calls:
    def __init__(self, fn): functools.update_wrapper(self, fn); self.fn = fn; self.n = 0
    def __call__(self, *a): self.n += 1; return self.fn(*a)
def add(n): return lambda x: x + n
""",
        "import inspect, types, typing",
        (
            "assert list(inspect.signature(f).parameters) == ['a', 'b', 'args', 'c', 'd', 'kw']",
            "assert inspect.signature(f).parameters['b'].default == 'x'",
            "assert f.__doc__ == 'Doc of f.'",
            "assert f.__name__ == 'f'",
            "assert f.__annotations__['a'] is int",
            "assert callable(f)",
            "assert inspect.isfunction(f)",
            "assert isinstance(f, types.FunctionType)",
            "assert inspect.iscoroutinefunction(g)",
            "assert inspect.isgeneratorfunction(gen)",
            "assert inspect.isasyncgenfunction(ag)",
            "assert inspect.isclass(C)",
            "assert C.__doc__ == 'Doc of C.'",
            "assert inspect.ismethod(C().m)",
            "assert list(inspect.signature(C.m).parameters) == ['self', 'a', 'b']",
            "assert list(inspect.signature(C().m).parameters) == ['a', 'b']",
            "assert isinstance(C.__dict__['p'], property)",
            "assert isinstance(C.p, property)",
            "assert isinstance(C.__dict__['s'], staticmethod)",
            "assert h.func(1, c=2) == 1",
            "assert h() == 3",
            "assert h.args == (3,)",
            "assert cached(50) == 12586269025\nassert cached.cache_info().hits > 0",
            "cached.cache_clear()\nassert cached.cache_info().currsize == 0",
            "assert (sd(1), sd([]), sd('')) == ('int', 'list', 'obj')",
            "@deco\ndef t(x): return x\nt(1); t(2)\nassert t.calls == 2\nassert t.__name__ == 't'",
            "n = []\n@retry(3)\ndef t():\n    n.append(1)\n    if len(n) < 3: raise ValueError\n    return 'ok'\nassert t() == 'ok'\nassert len(n) == 3",
            "n = 0\n@memo\ndef t(x):\n    global n\n    n += 1\n    return x * 2\nassert (t(2), t(2), t(3)) == (4, 4, 6)\nassert t.cache == {(2,): 4, (3,): 6}",
            "assert compose(lambda x: x + 1, str)(3) == '4'",
            "assert curry(lambda a, b, c: a + b + c, 3)(1)(2)(3) == 6",
            "@count_calls\ndef t(x): return x\nt(1)\nassert t.n == 1 and t(2) == 2",
            "assert list(map(add(2), [1, 2])) == [3, 4]",
            "assert sorted([3, 1], key=lambda x: add(-x)(0)) == [3, 1]",
            "assert len(inspect.signature(lam).parameters) == 2",
            "assert 'm' in dir(C)",
            "assert hasattr(C, 'm') and not hasattr(C, 'zz')",
            "assert C.m.__name__ == 'm'",
            "assert C.__name__ == 'C'",
            "assert f.__defaults__ == ('x',)",
            "assert f.__code__.co_argcount == 2",
            "assert f.__kwdefaults__ == {'d': None}",
            "assert inspect.getfullargspec(f).kwonlyargs == ['c', 'd']",
            "assert inspect.getdoc(f) == 'Doc of f.'",
        ),
    ),
    "values": (
        """import collections, datetime, decimal, fractions, uuid, pathlib, re, array, itertools, math, types, ipaddress, random, string, operator, io, json, struct, heapq, bisect, statistics, queue, weakref, numbers, textwrap, csv, urllib.parse, enum, time, sqlite3, tempfile, os, logging
NT = collections.namedtuple('NT', 'a b')
def f(k): return {
 'deque': collections.deque([1, 2], maxlen=3), 'counter': collections.Counter('aab'), 'dd': collections.defaultdict(int, a=1), 'od': collections.OrderedDict(a=1, b=2), 'cm': collections.ChainMap({'a': 1}, {'b': 2}),
 'nt': NT(1, 2), 'ns': types.SimpleNamespace(a=1, b=[2]), 'mp': types.MappingProxyType({'a': 1}), 'mv': memoryview(b'abc'), 'ba': bytearray(b'xy'), 'td': datetime.timedelta(days=1, hours=2), 'dt': datetime.datetime(2020, 1, 2, 3, 4, tzinfo=datetime.timezone.utc),
 'dec': decimal.Decimal('1.10'), 'fr': fractions.Fraction(3, 6), 'uuid': uuid.UUID(int=5), 'path': pathlib.Path('/a/b.txt'), 'ppath': pathlib.PurePosixPath('x/y'), 'pat': re.compile(r'(\\d+)', re.I), 'm': re.match(r'(?P<n>\\d+)-(\\w+)', '12-ab'), 'arr': array.array('d', [1.5]), 'ip': ipaddress.ip_address('10.0.0.1'), 'net': ipaddress.ip_network('10.0.0.0/30'),
 'it': iter([1, 2]), 'islice': itertools.islice(itertools.count(), 3), 'groups': itertools.groupby('aabb'), 'prod': itertools.product('ab', [1]), 'rev': reversed([1, 2]), 'enum': enumerate('ab'), 'zip': zip('ab', [1, 2]), 'map': map(str, [1]), 'filter': filter(None, [0, 1]), 'range': range(0, 10, 3), 'slice': slice(1, 2), 'fs': frozenset({1}), 'set': {1, (2, 3)}, 'cx': 3 - 4j, 'nan': math.nan, 'big': 2 ** 200, 'neg0': -0.0, 'bytes': b'\\xff\\x00', 'sur': '\\ud83d', 'emoji': '\\U0001f600\\u0000', 'nested': {'a': [{'b': (1, {2})}], (1, 2): None, None: 1.5, True: 'x'}, 'ell': ..., 'ni': NotImplemented, 'type': int, 'exc': ValueError('x', 1), 'exct': KeyError, 'sio': io.StringIO('ab\\ncd'), 'bio': io.BytesIO(b'xyz'), 'pq': heapq.merge([1, 4], [2, 3]), 'q': queue.Queue(), 'rnd': random.Random(3), 'url': urllib.parse.urlparse('http://x.y/z?q=1'), 'st': time.gmtime(0), 'keys': {'a': 1}.keys(), 'vals': {'a': 1}.values(), 'items': {'a': 1}.items(), 'us': collections.UserDict(a=1), 'ul': collections.UserList([1, 2]), 'ustr': collections.UserString('abc'), 'gen': (i for i in range(3)), 'partial': operator.itemgetter(1), 'date': datetime.date(2024, 2, 29), 'time': datetime.time(1, 2), 'csv': csv.reader(['a,b', 'c,d']), 'db': None, 'nodict': type('X', (), {'__slots__': ('a',)})(), 'stat': statistics.NormalDist(0, 1), 'stru': struct.Struct('<I'), 'tmpl': string.Template('$a b'), 'iv': [float('inf'), -float('inf')], 'emptys': ((), [], {}, set(), '', b''), 'bool': True, 'log': logging.getLogger('q'), 'self': [], 'tz': datetime.timezone(datetime.timedelta(hours=2), 'X'), 'fmt': string.Formatter(), 'mid': 10**18, 'i64': -2**63, 'neg': -2**63 - 1}[k]
""",
        "from collections import deque, Counter\nimport types, decimal, fractions, pathlib, ipaddress, math, datetime, json",
        (
            "assert f('deque') == deque([1, 2])",
            "d = f('deque')\nd.append(3); d.append(4)\nassert list(d) == [2, 3, 4] and d.maxlen == 3",
            "assert f('counter').most_common(1) == [('a', 2)]",
            "assert f('counter') == {'a': 2, 'b': 1}",
            "assert f('counter') + f('counter') == Counter(a=4, b=2)",
            "assert f('dd')['zz'] == 0",
            "assert list(f('od')) == ['a', 'b']",
            "o = f('od')\no.move_to_end('a')\nassert list(o) == ['b', 'a']",
            "assert f('cm')['b'] == 2",
            "assert dict(f('cm')) == {'a': 1, 'b': 2}",
            "assert f('nt') == (1, 2)",
            "assert f('nt').a == 1 and f('nt')._asdict() == {'a': 1, 'b': 2}",
            "assert f('nt')._replace(a=5).a == 5",
            "assert f('ns').b == [2]",
            "assert f('ns') == types.SimpleNamespace(a=1, b=[2])",
            "assert f('mp')['a'] == 1",
            "assert f('mp') == {'a': 1}",
            "assert dict(f('mp')) == {'a': 1}",
            "assert f('mv').tobytes() == b'abc'",
            "assert f('mv') == b'abc'",
            "assert bytes(f('mv')) == b'abc'",
            "assert f('ba') == b'xy'",
            "assert f('td').total_seconds() == 93600",
            "assert f('dt').isoformat() == '2020-01-02T03:04:00+00:00'",
            "assert f('dec') + 1 == decimal.Decimal('2.10')",
            "assert str(f('dec')) == '1.10'",
            "assert f('fr') == fractions.Fraction(1, 2)",
            "assert f('uuid').int == 5",
            "assert f('path').name == 'b.txt' and f('path').suffix == '.txt'",
            "assert f('path') == pathlib.Path('/a/b.txt')",
            "assert str(f('ppath')) == 'x/y'",
            "assert f('pat').findall('a1b22') == ['1', '22']",
            "assert f('m').group('n') == '12'",
            "assert f('m').groups() == ('12', 'ab')",
            "assert f('m')[2] == 'ab'",
            "assert f('m').span() == (0, 5)",
            "assert f('m')",
            "assert f('arr')[0] == 1.5",
            "assert str(f('ip')) == '10.0.0.1'",
            "assert f('ip') == ipaddress.ip_address('10.0.0.1')",
            "assert f('ip') in f('net')",
            "assert f('net').num_addresses == 4",
            "assert next(f('it')) == 1",
            "assert list(f('islice')) == [0, 1, 2]",
            "assert [(k, list(g)) for k, g in f('groups')] == [('a', ['a', 'a']), ('b', ['b', 'b'])]",
            "assert list(f('prod')) == [('a', 1), ('b', 1)]",
            "assert list(f('rev')) == [2, 1]",
            "assert dict(f('enum')) == {0: 'a', 1: 'b'}",
            "assert dict(f('zip')) == {'a': 1, 'b': 2}",
            "assert f('range') == range(0, 10, 3)",
            "assert f('range')[-1] == 9",
            "assert [0, 1, 2][f('slice')] == [1]",
            "assert f('fs') == {1}",
            "assert f('set') == {1, (2, 3)}",
            "assert abs(f('cx')) == 5",
            "assert math.isnan(f('nan'))",
            "assert f('big') == 2 ** 200",
            "assert math.copysign(1, f('neg0')) == -1",
            "assert f('bytes') == b'\\xff\\x00'",
            "assert f('sur') == '\\ud83d'",
            "assert f('emoji') == '\\U0001f600\\0'",
            "assert f('nested') == {'a': [{'b': (1, {2})}], (1, 2): None, None: 1.5, True: 'x'}",
            "assert f('ell') is ...",
            "assert f('type') is int",
            "assert f('exc').args == ('x', 1)",
            "assert isinstance(f('exc'), ValueError)",
            "assert f('exct') is KeyError",
            "assert f('sio').read() == 'ab\\ncd'",
            "assert list(f('sio')) == ['ab\\n', 'cd']",
            "assert f('sio').getvalue() == 'ab\\ncd'",
            "assert f('bio').read(2) == b'xy'",
            "assert list(f('pq')) == [1, 2, 3, 4]",
            "q = f('q')\nq.put(1)\nassert q.get() == 1 and q.empty()",
            "import random\nassert f('rnd').random() == random.Random(3).random()",
            "assert f('url').netloc == 'x.y'",
            "assert f('url').query == 'q=1'",
            "assert f('st').tm_year == 1970",
            "assert f('st')[0] == 1970",
            "assert 'a' in f('keys') and f('keys') == {'a'}",
            "assert list(f('vals')) == [1]",
            "assert f('items') == {('a', 1)}",
            "assert f('us')['a'] == 1",
            "assert f('us') == {'a': 1}",
            "assert f('ul') == [1, 2]",
            "assert f('ustr') == 'abc'",
            "assert f('ustr').upper() == 'ABC'",
            "assert list(f('gen')) == [0, 1, 2]",
            "assert f('partial')([1, 2]) == 2",
            "assert f('date').weekday() == 3",
            "assert f('date') - datetime.date(2024, 2, 28) == datetime.timedelta(1)",
            "assert f('date') > datetime.date(2024, 2, 28)",
            "assert f('time').minute == 2",
            "assert list(f('csv')) == [['a', 'b'], ['c', 'd']]",
            "x = f('nodict')\nx.a = 4\nassert x.a == 4",
            "assert f('stat').mean == 0",
            "assert round(f('stat').cdf(0), 3) == 0.5",
            "assert f('stru').unpack(b'\\1\\0\\0\\0') == (1,)",
            "assert f('tmpl').substitute(a=3) == '3 b'",
            "assert f('iv') == [float('inf'), float('-inf')]",
            "assert f('emptys') == ((), [], {}, set(), '', b'')",
            "assert f('bool') is True",
            "assert f('log').name == 'q'",
            "assert f('tz').utcoffset(None) == datetime.timedelta(hours=2)",
            "assert (f('mid'), f('i64'), f('neg')) == (10**18, -2**63, -2**63 - 1)",
            "assert type(f('nested')) is dict and type(f('set')) is set and isinstance(f('od'), dict)",
            "assert type(f('nt')).__name__ == 'NT'",
            "assert f('ip') > ipaddress.ip_address('9.0.0.1')",
            "assert json.dumps(f('od')) == '{\"a\": 1, \"b\": 2}'",
            "assert f('m').string == '12-ab'",
            "assert f('ni') is NotImplemented",
            "assert sorted(f('counter').elements()) == ['a', 'a', 'b']",
            "assert f('net') == ipaddress.ip_network('10.0.0.0/30')",
            "assert [str(x) for x in f('net')] == ['10.0.0.0', '10.0.0.1', '10.0.0.2', '10.0.0.3']",
        ),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(every_assertion_passes, name):
    every_assertion_passes(*RIGHT[name])
