"""What tests in pytest's style use of it beside plain assertions, for jails without it.

Its text goes into the tests' setup, where `import pytest` takes this in the place of a package that is missing.
"""

import importlib
import math
import re
import warnings


def fail(reason=""):
    """pytest.fail."""
    raise AssertionError(reason)


def skip(reason="", **named):
    """pytest.skip."""
    raise importlib.import_module("unittest").SkipTest(reason)


def importorskip(name, *given, **named):
    """pytest.importorskip of what is there: tests of a module that is not are tests of nothing."""
    return importlib.import_module(name)


def main(*given, **named):
    """pytest.main, of tests that are run anyway."""
    return 0


class Mark:
    """pytest.mark, of which what says that tests are run or not is read from the text."""

    def __getattr__(self, name):
        return fixture


def fixture(*given, **named):
    """What decorates a function and leaves it as it is."""
    return given[0] if len(given) == 1 and callable(given[0]) and not named else lambda function: function


mark = Mark()


def param(*values, **named):
    """pytest.param, a row of a list that the file gives a name."""
    return values


def raises(kinds, *args, match=None, **named):
    """pytest.raises as a context, or of a function and its arguments."""
    context = Raises(kinds, match)
    if args:
        with context:
            args[0](*args[1:], **named)
    return context


class Raises:
    """A context that is left by an exception, and then has its `type` and `value`."""

    def __init__(self, kinds, pattern):
        self.kinds, self.pattern = kinds, pattern
        self.type = self.value = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            fail(f"no {self.kinds} was raised")
        if not issubclass(kind, self.kinds):
            return False
        self.type, self.value = kind, error
        if self.pattern is not None:
            self.match(self.pattern)
        return True

    def match(self, pattern):
        """Asserts that the error's text has the pattern in it."""
        return re.search(pattern, str(self.value)) is not None or fail(f"{pattern!r} is not in it")

    typename = property(lambda self: self.type.__name__)


def warns(kinds=Warning, *args, match=None, **named):
    """pytest.warns as a context, or of a function and its arguments."""
    context = Warns(kinds, match)
    if not args:
        return context
    with context:
        return args[0](*args[1:], **named)


def deprecated_call(*, match=None):
    """pytest.deprecated_call as a context."""
    return Warns((DeprecationWarning, PendingDeprecationWarning, FutureWarning), match)


class Warns:
    """A context in which there is a warning; it is a row of all that came."""

    def __init__(self, kinds, pattern):
        self.kinds, self.pattern = kinds, pattern
        self.caught = warnings.catch_warnings(record=True)

    def __enter__(self):
        self.list = self.caught.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, kind, error, trace):
        self.caught.__exit__(kind, error, trace)
        if kind is None and not any(map(self.is_meant, self.list)):
            fail(f"no {self.kinds} was warned of")

    def is_meant(self, warning):
        """Whether a warning is of the kinds, and its text has the pattern in it."""
        return issubclass(warning.category, self.kinds) and (
            self.pattern is None or re.search(self.pattern, str(warning.message)) is not None
        )

    def __len__(self):
        return len(self.list)

    def __iter__(self):
        return iter(self.list)

    def __getitem__(self, index):
        return self.list[index]


class approx:  # noqa: PLW1641 - nor has pytest's a hash
    """pytest.approx of a number, or of numbers in a list, tuple or dict."""

    def __init__(self, expected, rel=None, abs=None, nan_ok=False):
        self.expected = expected
        self.given = {"rel": rel, "abs": abs, "nan_ok": nan_ok}

    def __eq__(self, actual):
        wanted = self.expected
        if isinstance(wanted, dict):
            return (
                isinstance(actual, dict)
                and wanted.keys() == actual.keys()
                and all(self._of(actual[key], wanted[key]) for key in wanted)
            )
        if isinstance(wanted, (list, tuple)):
            return (
                isinstance(actual, (list, tuple)) and len(wanted) == len(actual) and all(map(self._of, actual, wanted))
            )
        return self._is_close(actual, wanted)

    def _of(self, actual, wanted):
        return approx(wanted, **self.given) == actual

    def _is_close(self, actual, wanted):
        if isinstance(wanted, bool) or actual == wanted:
            return actual == wanted and isinstance(actual, bool) >= isinstance(wanted, bool)
        numbers = (int, float, complex)
        if not (isinstance(actual, numbers) and isinstance(wanted, numbers)):
            return False
        if wanted != wanted or actual != actual:
            return self.given["nan_ok"] and wanted != wanted and actual != actual
        if math.isinf(abs(wanted)) or math.isinf(abs(actual)):
            return False
        rel, least = self.given["rel"], self.given["abs"]
        part = (1e-6 if rel is None and least is None else rel or 0.0) * abs(wanted)
        return abs(actual - wanted) <= max(part, 1e-12 if least is None else least)
