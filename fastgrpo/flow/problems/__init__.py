"""Problems in: the known data sets and your own, their tests split, their solutions scored, their difficulty measured.

The split is fixed, not drawn: tests 0, 3, 6, ... of a problem are public, the others hidden, so about a third is
public and both parts span easy and late (edge) cases; contest problems come with public tests of their own. A problem
with a single test has it in both (`Problem.shared_test`). Assertions that test nothing (`assert True`) are dropped. A
part's source holds its own tests and what all share: public tests reveal no hidden one.
"""
