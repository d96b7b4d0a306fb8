# ruff: noqa: E501 - programs for the jail are strings, one assertion a line
"""Right solutions that pass in one process must pass in two. Coroutines of both sides, which wait for one another; generators and context managers."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.jail

RIGHT = {
    "generators": (
        """def gen(n):
    got = []
    for i in range(n):
        x = yield i
        if x is not None: got.append(x)
    return got
def acc():
    t = 0
    while True:
        try:
            x = yield t
        except ValueError:
            t = 0
        else:
            t += x or 0
def chain(*its):
    for it in its: yield from it
def inf():
    n = 0
    while True:
        yield n
        n += 1
def closing(log):
    try:
        yield 1
        yield 2
    finally:
        log.append('closed')
""",
        "",
        (
            "assert list(gen(3)) == [0, 1, 2]",
            "g = acc()\nnext(g)\nassert g.send(3) == 3\nassert g.send(4) == 7\nassert g.throw(ValueError) == 0",
            "assert list(chain([1], (2,), 'a')) == [1, 2, 'a']",
            "from itertools import islice\nassert list(islice(inf(), 4)) == [0, 1, 2, 3]",
            "log = []\ng = closing(log)\nnext(g)\ng.close()\nassert log == ['closed']",
            "import types, inspect\nassert isinstance(gen(1), types.GeneratorType)\nassert inspect.isgenerator(gen(1))",
            "import inspect\nassert inspect.isgeneratorfunction(gen)",
            "from collections.abc import Iterator, Generator\nassert isinstance(gen(1), Iterator)\nassert isinstance(gen(1), Generator)",
            "assert next(iter(gen(2))) == 0",
            "a, *b = gen(4)\nassert b == [1, 2, 3]",
            "assert sum(x for x in gen(4) if x % 2) == 4",
            "assert dict(zip('ab', inf())) == {'a': 0, 'b': 1}",
            "def outer():\n    r = yield from gen(2)\n    yield ('r', r)\nassert list(outer()) == [0, 1, ('r', [])]",
            "for i, x in enumerate(gen(2)):\n    assert i == x",
        ),
    ),
    "context managers": (
        """from contextlib import contextmanager, ExitStack, suppress
class CM:
    def __init__(self, log=None): self.log = [] if log is None else log
    def __enter__(self): self.log.append('in'); return self
    def __exit__(self, t, v, tb): self.log.append(t.__name__ if t else 'out'); return t is KeyError
@contextmanager
def tag(name, out):
    out.append(f'<{name}>')
    try: yield name
    finally: out.append(f'</{name}>')
@contextmanager
def swallow(*kinds):
    try: yield
    except kinds: pass
class Timer:
    def __enter__(self):
        import time; self.t = time.perf_counter(); return self
    def __exit__(self, *a): 
        import time; self.elapsed = time.perf_counter() - self.t
def use(cm):
    with cm as x: return x
""",
        "",
        (
            "c = CM()\nwith c as d:\n    pass\nassert c.log == ['in', 'out']\nassert d is c",
            "log = []\nwith CM(log):\n    raise KeyError\nassert log == ['in', 'KeyError']",
            "out = []\nwith tag('a', out) as n:\n    out.append(n)\nassert out == ['<a>', 'a', '</a>']",
            "with swallow(ValueError, KeyError):\n    raise ValueError\nassert True is not False and CM is not None",
            "with Timer() as t:\n    pass\nassert t.elapsed >= 0",
            "import contextlib\nassert use(contextlib.nullcontext(4)) == 4",
            "try:\n    with swallow(ValueError):\n        raise TypeError('z')\nexcept TypeError as e:\n    r = str(e)\nassert r == 'z' and CM",
            "log = []\nwith CM(log) as a, CM(log) as b:\n    log.append('x')\nassert log == ['in', 'in', 'x', 'out', 'out']",
            "class K:\n    def __enter__(self): return 9\n    def __exit__(self, *a): self.done = True\nk = K()\nassert use(k) == 9\nassert k.done",
            "out = []\n@tag('d', out)\ndef fn(): return 5\nassert fn() == 5\nassert out == ['<d>', '</d>']",
            "import contextlib\nout = []\nwith contextlib.ExitStack() as st:\n    st.enter_context(tag('q', out))\nassert out == ['<q>', '</q>']",
        ),
    ),
    "async": (
        """import asyncio
async def a(x): await asyncio.sleep(0); return x + 1
async def gen(n):
    for i in range(n):
        await asyncio.sleep(0)
        yield i
class ACM:
    async def __aenter__(self): return 'in'
    async def __aexit__(self, *e): return False
class AIt:
    def __init__(self, n): self.n = n
    def __aiter__(self): return self
    async def __anext__(self):
        if self.n == 0: raise StopAsyncIteration
        self.n -= 1
        return self.n
async def bad(): raise ValueError('no')
async def both(fs): return await asyncio.gather(*[f() for f in fs])
async def limit(n, f):
    s = asyncio.Semaphore(n)
    async def one(i):
        async with s: return await f(i)
    return await asyncio.gather(*(one(i) for i in range(4)))
async def timeout(f):
    try: return await asyncio.wait_for(f(), 0.01)
    except asyncio.TimeoutError: return 'late'
class Q:
    def __init__(self): self.q = asyncio.Queue()
    async def put(self, x): await self.q.put(x)
    async def get(self): return await self.q.get()
""",
        "import asyncio",
        (
            "assert asyncio.run(a(1)) == 2",
            "async def t():\n    return [x async for x in gen(3)]\nassert asyncio.run(t()) == [0, 1, 2]",
            "async def t():\n    async with ACM() as x:\n        return x\nassert asyncio.run(t()) == 'in'",
            "async def t():\n    return [x async for x in AIt(3)]\nassert asyncio.run(t()) == [2, 1, 0]",
            "try:\n    asyncio.run(bad())\n    r = ''\nexcept ValueError as e:\n    r = str(e)\nassert r == 'no'",
            "async def one(): return 1\nasync def two(): return 2\nassert asyncio.run(both([one, two])) == [1, 2]",
            "async def sq(i):\n    await asyncio.sleep(0)\n    return i * i\nassert asyncio.run(limit(2, sq)) == [0, 1, 4, 9]",
            "async def slow(): await asyncio.sleep(5)\nassert asyncio.run(timeout(slow)) == 'late'",
            "async def t():\n    q = Q()\n    await q.put(4)\n    return await q.get()\nassert asyncio.run(t()) == 4",
            "async def t():\n    return await asyncio.gather(a(1), a(2))\nassert asyncio.run(t()) == [2, 3]",
            "assert asyncio.iscoroutinefunction(a)",
            "import inspect\nassert inspect.iscoroutinefunction(a)\nassert inspect.isasyncgenfunction(gen)",
            "async def t():\n    task = asyncio.create_task(a(3))\n    return await task\nassert asyncio.run(t()) == 4",
            "async def t():\n    return await asyncio.wait_for(a(3), 1)\nassert asyncio.run(t()) == 4",
            "loop = asyncio.new_event_loop()\nassert loop.run_until_complete(a(5)) == 6",
        ),
    ),
    "async together": (
        """import asyncio, time
async def fetch_all(fetch, urls, limit=3):
    sem = asyncio.Semaphore(limit)
    async def one(u):
        async with sem: return await fetch(u)
    return await asyncio.gather(*map(one, urls), return_exceptions=True)
class Bus:
    def __init__(self): self.subs = {}
    def on(self, e, cb): self.subs.setdefault(e, []).append(cb)
    async def emit(self, e, *a):
        out = []
        for cb in self.subs.get(e, []):
            r = cb(*a)
            if asyncio.iscoroutine(r): r = await r
            out.append(r)
        return out
async def retry(fn, n=3, delay=0):
    for i in range(n):
        try: return await fn()
        except ValueError:
            if i == n - 1: raise
            await asyncio.sleep(delay)
async def race(*cs):
    done, pending = await asyncio.wait([asyncio.ensure_future(c) for c in cs], return_when=asyncio.FIRST_COMPLETED)
    for p in pending: p.cancel()
    return done.pop().result()
async def sleeper(t, v): await asyncio.sleep(t); return v
async def cleanup(log):
    try: await asyncio.sleep(10)
    except asyncio.CancelledError: log.append('cancelled'); raise
    finally: log.append('final')
class Pool:
    def __init__(self): self.n = 0
    async def __aenter__(self): self.n += 1; return self
    async def __aexit__(self, *a): self.n -= 1
async def produce(q, n):
    for i in range(n): await q.put(i)
    await q.put(None)
async def ticker(n):
    for i in range(n):
        await asyncio.sleep(0.001); yield i
async def agg(ait): return [x async for x in ait]
def sync_entry(fn): return asyncio.run(fn(3))
class Cache:
    def __init__(self, load): self.load, self.d, self.lock = load, {}, asyncio.Lock()
    async def get(self, k):
        async with self.lock:
            if k not in self.d: self.d[k] = await self.load(k)
            return self.d[k]
class Aw:
    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return 5
""",
        "import asyncio, time",
        (
            "async def fetch(u):\n    await asyncio.sleep(0.01)\n    if u == 'bad': raise KeyError(u)\n    return u.upper()\nr = asyncio.run(fetch_all(fetch, ['a', 'bad', 'c']))\nassert r[0] == 'A' and isinstance(r[1], KeyError) and r[2] == 'C'",
            "active = peak = 0\nasync def fetch(u):\n    global active, peak\n    active += 1\n    peak = max(peak, active)\n    await asyncio.sleep(0.02)\n    active -= 1\n    return u\nasyncio.run(fetch_all(fetch, list('abcdef'), 2))\nassert peak == 2",
            "b = Bus()\ngot = []\nasync def cb(x):\n    await asyncio.sleep(0)\n    got.append(x)\n    return x\nb.on('e', cb)\nb.on('e', lambda x: x + 1)\nassert asyncio.run(b.emit('e', 1)) == [1, 2]\nassert got == [1]",
            "n = 0\nasync def fn():\n    global n\n    n += 1\n    if n < 3: raise ValueError('x')\n    return 'ok'\nassert asyncio.run(retry(fn)) == 'ok' and n == 3",
            "async def fn(): raise ValueError('x')\ntry:\n    asyncio.run(retry(fn))\n    r = ''\nexcept ValueError as e:\n    r = str(e)\nassert r == 'x'",
            "assert asyncio.run(race(sleeper(9, 'slow'), sleeper(0.01, 'fast'))) == 'fast'",
            "async def t():\n    s = time.perf_counter()\n    r = await asyncio.gather(*[sleeper(0.4, i) for i in range(5)])\n    return r, time.perf_counter() - s\nr, s = asyncio.run(t())\nassert r == [0, 1, 2, 3, 4] and s < 1.6",
            "async def t():\n    log = []\n    k = asyncio.create_task(cleanup(log))\n    await asyncio.sleep(0.02)\n    k.cancel()\n    try:\n        await k\n    except asyncio.CancelledError:\n        log.append('seen')\n    return log\nassert asyncio.run(t()) == ['cancelled', 'final', 'seen']",
            "async def t():\n    async with Pool() as p:\n        a = p.n\n    return a, p.n\nassert asyncio.run(t()) == (1, 0)",
            "async def t():\n    q = asyncio.Queue()\n    k = asyncio.create_task(produce(q, 3))\n    out = []\n    while (x := await q.get()) is not None: out.append(x)\n    await k\n    return out\nassert asyncio.run(t()) == [0, 1, 2]",
            "async def mine():\n    for i in range(3): yield i\nassert asyncio.run(agg(mine())) == [0, 1, 2]",
            "assert asyncio.run(agg(ticker(3))) == [0, 1, 2]",
            "async def fn(x): return x * 2\nassert sync_entry(fn) == 6",
            "n = 0\nasync def load(k):\n    global n\n    n += 1\n    await asyncio.sleep(0.01)\n    return k * 2\nasync def t():\n    c = Cache(load)\n    return await asyncio.gather(c.get('a'), c.get('a'), c.get('b'))\nassert asyncio.run(t()) == ['aa', 'aa', 'bb'] and n == 2",
            "async def t(): return await Aw()\nassert asyncio.run(t()) == 5",
            "async def t():\n    try:\n        await asyncio.wait_for(sleeper(5, 1), 0.02)\n    except asyncio.TimeoutError:\n        return 'late'\nassert asyncio.run(t()) == 'late'",
            "async def t():\n    async with asyncio.timeout(0.02):\n        await sleeper(5, 1)\ntry:\n    asyncio.run(t())\n    r = 0\nexcept TimeoutError:\n    r = 1\nassert r == 1",
            "async def t():\n    async with asyncio.TaskGroup() as g:\n        a = g.create_task(sleeper(0.01, 'a'))\n        b = g.create_task(sleeper(0.01, 'b'))\n    return a.result() + b.result()\nassert asyncio.run(t()) == 'ab'",
            "import unittest\nfrom unittest.mock import AsyncMock\nm = AsyncMock(return_value='z')\nassert asyncio.run(retry(m)) == 'z'\nm.assert_awaited_once()",
        ),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(every_assertion_passes, name):
    every_assertion_passes(*RIGHT[name])
