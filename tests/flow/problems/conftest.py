"""One jail for the tests of problems, and files of records."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgrpo.flow.problems import files
from fastgrpo.flow.solutions import run_all_tests
from fastgrpo.flow.types import Problem, WorkflowLimits
from fastgrpo_sandbox import BlockingSandboxPool, Limits, Outcome

Load = Callable[..., list[Problem]]
Judge = Callable[[Problem, str], tuple[Outcome, Outcome]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Records as one JSONL file, loaded."""

    def write(*records: object, name: str = "set.jsonl") -> list[Problem]:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return files.load(str(path))

    return write


@pytest.fixture(scope="session")
def judge() -> Iterator[Judge]:
    """(public, hidden) outcomes of a solution, in a jail."""
    with BlockingSandboxPool(cells=1, limits=Limits(wall_s=5, cpu_s=5)) as pool:

        def outcomes(problem: Problem, code: str) -> tuple[Outcome, Outcome]:
            run = run_all_tests(pool.pool, problem, code, limits=WorkflowLimits())
            return pool.wait(asyncio.wait_for(run, 30))

        yield outcomes
