"""Types as annotations name them, such as `Optional[list[int]]`, and signatures: taken apart on one side and made again
on the other of what has crossed, so that no text of the other side is evaluated here.
"""

from __future__ import annotations

import functools
import importlib
import operator
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

FORMS = (typing._SpecialForm, typing._SpecialGenericAlias)  # type: ignore[attr-defined]
Parts = list[Any]


def alias_parts(value: Any) -> Parts | None:
    """Of an alias, a sort ("builtin", "union", "own" or "form"), the name of a form of `typing`, and its arguments in a
    list or None for a form without; None for what is no alias."""
    kind = type(value)
    if kind is types.GenericAlias:
        return ["builtin", "", [value.__origin__, *value.__args__]]
    if kind is types.UnionType:
        return ["union", "", list(value.__args__)]
    if value is Any:
        return ["form", "Any", None]
    if kind.__module__ != "typing" or isinstance(value, type):
        return None
    if isinstance(value, FORMS):
        return ["form", value._name, None]  # type: ignore[union-attr]
    return _generic_parts(value) if isinstance(value, typing._GenericAlias) else None  # type: ignore[attr-defined]


def _generic_parts(value: Any) -> Parts:
    if typing.get_origin(value) is typing.Annotated:
        return ["form", "Annotated", [value.__origin__, *value.__metadata__]]
    name = "Union" if value.__origin__ is typing.Union else value._name
    if name is None and value.__origin__ is typing.Literal:
        name = "Literal"
    if name == "Callable":
        *given, answer = value.__args__
        return ["form", name, [... if given == [...] else given, answer]]
    if isinstance(getattr(typing, str(name), None), FORMS):
        return ["form", name, list(value.__args__)]
    return ["own", "", [value.__origin__, *value.__args__]]


def alias(sort: str, name: str, args: Sequence[Any] | None) -> Any:
    """Inverse of alias_parts. Raises ValueError for what is no form, and TypeError for arguments that none takes."""
    if sort == "builtin" and args:
        return types.GenericAlias(args[0], tuple(args[1:]))
    if sort == "own" and args:
        return typing._GenericAlias(args[0], tuple(args[1:]))  # type: ignore[attr-defined]
    if sort == "union" and args:
        return functools.reduce(operator.or_, args)
    form = getattr(typing, name, None)
    if sort != "form" or not (form in (Any, typing.Annotated) or isinstance(form, FORMS)):
        raise ValueError(f"{name} is no form of a type")
    if args is None:
        return form
    if name not in ("Literal", "Annotated") and any(isinstance(each, str) for each in args):
        raise ValueError("text is no type")  # it would be compiled here
    return form[args[0] if len(args) == 1 else tuple(args)]


def signature_parts(function: Any, held: Callable[[Any], Any] = lambda value: value) -> Parts:
    """Of each parameter its name, kind, and default and annotation in lists that may be empty; and the answer's
    annotation likewise. `held` makes of a default what may leave. Raises what inspect.signature does."""
    inspect = importlib.import_module("inspect")
    given = inspect.signature(function)

    def listed(value: Any, leaving: Callable[[Any], Any] = lambda value: value) -> Parts:
        return [] if value is inspect.Parameter.empty else [leaving(value)]

    parameters = [
        [p.name, int(p.kind), listed(p.default, held), listed(p.annotation)] for p in given.parameters.values()
    ]
    return [parameters, listed(given.return_annotation)]


def signature(parameters: Sequence[Parts], answer: Parts) -> Any:
    """Inverse of signature_parts. Raises ValueError and TypeError."""
    inspect = importlib.import_module("inspect")
    kinds = list(inspect._ParameterKind)
    made = [
        inspect.Parameter(
            name,
            kinds[kind],
            default=default[0] if default else inspect.Parameter.empty,
            annotation=annotation[0] if annotation else inspect.Parameter.empty,
        )
        for name, kind, default, annotation in parameters
    ]
    return inspect.Signature(made, return_annotation=answer[0] if answer else inspect.Signature.empty)
