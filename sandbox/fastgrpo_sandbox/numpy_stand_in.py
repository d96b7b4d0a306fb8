"""What HumanEval+'s and MBPP+'s tests use of numpy, for jails without it.

Its text goes into the tests' setup, where `import numpy` takes this in the place of a package that is missing.
"""

import cmath


class ndarray:
    """The type of no value here: without numpy nothing is an array."""


class float32(float):
    """As `ndarray`."""


class float64(float):
    """As `ndarray`."""


def shape(value):
    """numpy.shape of a number, or of lists and tuples of numbers."""
    if not isinstance(value, (list, tuple)):
        return ()
    shapes = [shape(item) for item in value]
    if any(each != shapes[0] for each in shapes):
        raise ValueError("an inhomogeneous shape")
    return (len(value), *(shapes[0] if shapes else ()))


def isclose(left, right, rtol=1e-05, atol=1e-08):
    """numpy.isclose of two numbers."""
    if cmath.isinf(left) or cmath.isinf(right):
        return left == right
    return abs(left - right) <= atol + rtol * abs(right)


def allclose(left, right, rtol=1e-05, atol=1e-08):
    """numpy.allclose of numbers and of lists and tuples of them, a number standing for as many as needed, but for
    none."""
    lists = [value for value in (left, right) if isinstance(value, (list, tuple))]
    if not lists:
        return isclose(left, right, rtol, atol)
    size = max(map(len, lists))
    if not size and len(lists) == 1:
        return False
    rows = [value if isinstance(value, (list, tuple)) else [value] * size for value in (left, right)]
    if len(rows[0]) != len(rows[1]):
        raise ValueError("operands could not be broadcast together")
    return all(allclose(one, other, rtol, atol) for one, other in zip(*rows, strict=True))
