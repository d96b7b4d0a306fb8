# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Right solutions that answer with numpy's numbers and arrays, and wrong ones that answer with classes over them."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, CheckTests

pytest.importorskip("numpy")
pytestmark = pytest.mark.jail

NUMBERS = """import numpy as np
def i(x): return np.int64(x)
def u(x): return np.uint8(x)
def f(x): return np.float64(x)
def g(x): return np.float32(x)
def b(x): return np.bool_(x)
def a(x): return np.array(x)
def l(x): return [np.int64(v) for v in x]
def t(x): return tuple(np.array(x))
def s(x): return np.str_(x)
def d(x): return {np.int64(1): np.float32(0.5)}
def m(x): return np.mean(x)
def srt(x): return np.sort(x)
def z(x): return {np.int64(v) for v in x}
def c(x): return np.complex128(x)
"""
ALIKE = (
    "assert i(3) == 3",
    "assert 3 == i(3)",
    "assert i(3) in (3,4)",
    "assert u(3) == 3",
    "assert f(2.5) == 2.5",
    "assert g(0.5) == 0.5",
    "assert b(1) == True",
    "assert b(True)",
    "assert not b(0)",
    "assert a([1,2]).tolist() == [1,2]",
    "assert list(a([1,2])) == [1,2]",
    "assert l([1,2]) == [1,2]",
    "assert t([1,2]) == (1,2)",
    "assert s('a') == 'a'",
    "assert d(1) == {1: 0.5}",
    "assert abs(m([1,2]) - 1.5) < 1e-6",
    "assert abs(g(0.5) - 0.5) < 1e-6",
    "assert i(3) < 4",
    "assert i(3) + 1 == 4",
    "assert sorted(l([2,1])) == [1,2]",
    "assert z([1,2]) == {1,2}",
    "assert c(1) == 1",
    "assert i(3) != 4",
    "assert (a([1,2]) == [1,2]).all()",
    "assert np.allclose(a([1.0,2]), [1,2])",
    "assert np.array_equal(srt([2,1]), [1,2])",
    "assert a([1,2]).sum() == 3",
    "assert a([1,2])[0] == 1",
    "assert len(a([1,2])) == 2",
    "assert a([1,2]).shape == (2,)",
    "assert isinstance(i(3), np.integer)",
    "assert sum(l([1,2])) == 3",
    "assert round(g(0.5), 1) == 0.5",
    "assert int(i(3)) == 3",
    "assert str(i(3)) == '3'",
    "assert max(l([1,5])) == 5",
    "assert i(3) is not None",
    "assert hash(i(3)) == hash(3)",
    "assert [1,2,3][i(1)] == 2",
    "assert math.isclose(g(0.5), 0.5)",
    "assert set(a([1,2])) == {1,2}",
    "assert np.testing.assert_allclose(a([1.0]), [1.0]) is None",
    "assert a(a([1,2]) + 1).tolist() == [2,3]",
    "assert all(a([1,2]) == np.array([1,2]))",
    "assert m(np.array([1,2])) == 1.5",
)
ARRAYS = """import numpy as np
kept=[]
def fill(a): a[:] = a*2
def neg(a): a[0] = -0.0
def keep(a): kept.append(a)
def later(v): kept[-1][0]=v
def same(a): return a
def sh(a): return a.shape, a.dtype.str, a.ndim
def T(a): return a.T
def e(): return np.array([])
def zero(): return np.array(5)
def st(): return np.array(['ab','c'])
def nan(): return np.array([np.nan, np.inf, 1])
def cx(): return np.array([1+2j])
def ob(): return np.array([1,'a',None], dtype=object)
def dt(): return np.array(['2020-01-01'], dtype='datetime64[D]')
def stt(): return np.zeros(2, dtype=[('a','i4'),('b','f8')])
def mask(a): return a[a>1]
def big(): return np.arange(10**5)
def u64(): return np.array([2**64-1], dtype=np.uint64)
def b(): return np.array([True,False])
class M:
    def __init__(self, a): self.a=np.asarray(a)
    def dot(self, o): return self.a @ o
    @property
    def data(self): return self.a
def nest(): return {'x':[np.array([1,2]), np.float32(1.5)], 'y':(np.int8(3),)}
def fn(f): return f(np.array([1.0,2.0]))
def ro():
    a=np.array([1,2]); a.flags.writeable=False
    return a
def view(): return np.arange(10)[::2]
def rec(n): return np.random.default_rng(0).integers(0,10,n)
"""
KEPT = (
    "a=np.array([1.0,2.0])\nfill(a)\nassert a.tolist()==[2,4]",
    "a=np.array([0.0,1.0])\nneg(a)\nassert str(a[0]) in ('-0.0','np.float64(-0.0)')",
    "a=np.array([1,2])\nkeep(a)\nlater(9)\nassert a[0]==9",
    "a=np.array([1,2])\nassert same(a) is a",
    "assert sh(np.zeros((2,3),dtype=np.float32)) == ((2,3),'<f4',2)",
    "assert T(np.array([[1,2],[3,4]])).tolist()==[[1,3],[2,4]]",
    "assert e().size==0",
    "assert zero()==5 and zero().ndim==0",
    "assert st().tolist()==['ab','c']",
    "assert np.isnan(nan()[0]) and nan()[1]==np.inf",
    "assert cx()[0]==1+2j",
    "assert list(ob())[1]=='a' and len(ob())==3",
    "assert str(dt()[0])=='2020-01-01'",
    "assert stt()['a'].tolist()==[0,0]",
    "assert mask(np.array([1,2,3])).tolist()==[2,3]",
    "assert big().sum()==4999950000",
    "assert u64()[0]==2**64-1",
    "assert b().any() and not b().all()",
    "assert np.allclose(M([[1,2],[3,4]]).dot(np.array([1,1])),[3,7])",
    "assert M([1,2]).data.mean()==1.5",
    "assert nest()['x'][0].tolist()==[1,2] and nest()['x'][1]==1.5 and nest()['y']==(3,)",
    "assert fn(np.sum)==3.0",
    "assert fn(lambda a: a.tolist())==[1.0,2.0]",
    "assert ro().tolist()==[1,2]",
    "assert view().tolist()==[0,2,4,6,8]",
    "assert isinstance(view(), np.ndarray) and view().dtype==np.int64",
    "assert rec(3).shape==(3,)",
    "x=np.arange(5)\ny=x[1:3]\nfill(y)\nassert y.tolist()==[2,4]",
)
LIARS = """import numpy as np
class I(np.int64):
    def __eq__(self, other): return True
    __hash__ = None
class F(np.float32):
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
class L(np.ndarray):
    def __eq__(self, other): return np.array([True])
    def __array_ufunc__(self, *a, **k): return np.array([True])
    def __array_function__(self, *a, **k): return True
def i(): return I(7)
def f(): return F(7)
def l(): return np.zeros(2).view(L)
"""
REFUSED = (
    "i() == 2",
    "i() in (2, 3)",
    "abs(f() - 2.5) < 1e-6",
    "(l() == np.array([1, 2])).all()",
    "np.allclose(l(), [1, 2])",
    "np.array_equal(l(), [1, 2])",
)


@pytest.mark.parametrize(("code", "lines"), [(NUMBERS, ALIKE), (ARRAYS, KEPT)], ids=["numbers", "arrays"])
def test_numpys_numbers_and_arrays_are_what_they_are_in_one_process(numpy_pool, code, lines):
    outcome = numpy_pool.run(code, tests=AssertTests(lines))
    assert len(outcome.tests) == len(lines), outcome
    assert [line for line, passed in zip(lines, outcome.tests, strict=True) if not passed] == []


def test_a_check_takes_numpys_numbers(numpy_pool):
    check = CheckTests("def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 4\n", "f")
    assert numpy_pool.run("import numpy as np\ndef f(x): return np.int64(x) + x", tests=check).tests == (True, True)
    assert numpy_pool.run("import numpy as np\ndef f(x): return np.int64(x) + 1", tests=check).tests == (True, False)


def test_classes_over_numpys_decide_nothing(numpy_pool):
    tests = AssertTests(tuple(f"import numpy as np\nassert {each}" for each in REFUSED))
    assert not any(numpy_pool.run(LIARS, tests=tests).tests)


@pytest.mark.parametrize("form", ["['O', [1]]", "['<i8', [10**12]]", "['V8', [1]]", "[7, [1]]", "['<i8', 'x']"])
def test_an_array_that_is_none_fails_its_own_assertion(numpy_pool, form):
    """What a solution's process may send in the place of an array's form."""
    code = f"import numpy as np\nfrom guest import plain\nkind = plain.KINDS['numpy.ndarray']\nplain.KINDS['numpy.ndarray'] = kind._replace(extra=lambda value: tuple({form}))\ndef f(x): return np.array([x])"
    outcome = numpy_pool.run(code, tests=AssertTests(("assert f(1)[0] == 1",)))
    assert (outcome.status, outcome.tests) == ("failed", (False,))
