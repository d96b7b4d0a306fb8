"""Problems in: the known data sets and your own, their tests split, their solutions scored, their difficulty measured.

The split is fixed, not drawn: tests 0, 3, 6, ... of a problem are public, the others hidden, so about a third is
public and both parts span easy and late (edge) cases; contest problems come with public tests of their own. A problem
with a single test has it in both (`Problem.shared_test`). Assertions that test nothing (`assert True`) are dropped. A
part's source holds its own tests and what all share: public tests reveal no hidden one.
"""

from fastgrpo.flow.problems.difficulty import measure_difficulty
from fastgrpo.flow.problems.files import load
from fastgrpo.flow.problems.formats import OwnProblem
from fastgrpo.flow.problems.splitting import describe_tests, preamble, split, split_tests

__all__ = ["OwnProblem", "describe_tests", "load", "measure_difficulty", "preamble", "split", "split_tests"]
