"""Mutations are different programs that still parse."""

from __future__ import annotations

import ast

from fastgrpo.flow.problems.files import load
from fastgrpo.flow.workers.mutants import mutations


def test_every_humaneval_solution_has_different_mutations() -> None:
    for problem in load("humaneval")[::8]:
        found = mutations(problem.solution, 8, seed=problem.id)
        sources = {mutation.source for mutation in found}
        assert 4 <= len(found) == len(sources) <= 8
        assert ast.unparse(ast.parse(problem.solution)) not in sources
        assert all(mutation.hint.startswith("line ") for mutation in found)
        assert found == mutations(problem.solution, 8, seed=problem.id)


def test_while_loops_are_left_as_they_are() -> None:
    source = "def f(n):\n    while n > 3:\n        n -= 1\n    return n"
    assert all("while n > 3:\n        n -= 1" in mutation.source for mutation in mutations(source, 50, seed=""))


def test_a_hint_names_the_line() -> None:
    source = "def f(a, b):\n    c = a + b\n    return c"
    hints = {mutation.hint for mutation in mutations(source, 50, seed="")}
    assert "line 2: the operator is wrong" in hints
    assert "line 3: the result is not returned" in hints
