"""Exceptions that cross: the library's as the same objects when they come back, and what each was raised from."""

from __future__ import annotations

from typing import Any

from .known import error, known_name, set_state

KEPT = 16  # of each side; more would keep alive what their tracebacks hold
CHAIN = 16  # exceptions that are told as reasons of one
Link = list[Any]  # the places of cause and context among the exceptions, -1 for none, and whether the context is hidden


class Errors:
    """The library's exceptions that crossed lately: those of this side, and this side's copies of the other's."""

    def __init__(self) -> None:
        self._own: dict[int, BaseException] = {}
        self._theirs: dict[int, BaseException] = {}
        self._count = 0

    def number(self, value: BaseException) -> tuple[int, bool]:
        """The number of an exception that is sent, and whether it is the other side's."""
        for held, is_theirs in ((self._theirs, True), (self._own, False)):
            for number, each in held.items():
                if each is value:
                    return number, is_theirs
        self._count += 1
        _keep(self._own, self._count, value)
        return self._count, False

    def received(self, number: Any, is_own: Any, name: Any, args: Any, state: Any) -> BaseException:
        """The exception of a number, as it is now. Raises ValueError and TypeError for what is none."""
        found = (self._own if is_own else self._theirs).get(number)
        if found is not None and known_name(type(found)) == name:
            return set_state(found, args, state)
        made = error(name, args, state)
        if not is_own:
            _keep(self._theirs, number, made)
        return made


def _keep(held: dict[int, BaseException], number: int, value: BaseException) -> None:
    held[number] = value
    if len(held) > KEPT:
        del held[next(iter(held))]


def chained(first: BaseException) -> tuple[list[BaseException], list[Link]]:
    """The exceptions that `first` was raised from, itself at the beginning, and a link for each; no links if it was
    raised from none."""
    found, links = [first], []
    for each in found:
        reasons = (each.__cause__, each.__context__)
        for reason in reasons:
            if reason is not None and len(found) < CHAIN and not any(reason is other for other in found):
                found.append(reason)
        places = [next((place for place, other in enumerate(found) if other is reason), -1) for reason in reasons]
        links.append([*places, each.__suppress_context__])
    return found, links if links != [[-1, -1, False]] else []


def link(errors: list[Any], links: list[Link]) -> None:
    """Inverse of `chained`. Raises ValueError, TypeError and IndexError for what is malformed."""
    for each, (cause, context, is_hidden) in zip(errors, links, strict=False):
        if isinstance(each, BaseException):
            each.__cause__ = errors[cause] if cause >= 0 else None
            each.__context__ = errors[context] if context >= 0 else None
            each.__suppress_context__ = is_hidden is True
