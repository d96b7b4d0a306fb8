"""Solutions tried at load: who is left out and why, what deadline the others get, what is kept for the next run."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Meta
from msgspec.structs import replace

from fastgrpo.config import Config
from fastgrpo.config_keys import KEYS, resolve
from fastgrpo.errors import UserError
from fastgrpo.flow.jails import run_limits
from fastgrpo.flow.problems import scoring
from fastgrpo.flow.problems.loading import load_problems
from fastgrpo.flow.problems.scoring import Trial, solvable
from fastgrpo.flow.types import Problem, WorkflowLimits
from fastgrpo_sandbox import Limits, Outcome, Tests
from tests.flow.problems.conftest import Load
from tests.helpers.full_disk import full_disk

OWN = {
    "id": "right",
    "prompt": "Add two numbers.",
    "entry_point": "add",
    "solution": "def add(a, b):\n    return a + b\n",
    "asserts": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
}
WRONG = OWN | {"id": "wrong", "solution": "def add(a, b):\n    return a - b\n"}
HANGS = OWN | {"id": "hangs", "solution": "def add(a, b):\n    while True: pass\n"}
UNSOLVED = {key: value for key, value in OWN.items() if key != "solution"} | {"id": "unsolved"}


def test_the_jails_take_what_a_configuration_may_ask_of_them() -> None:
    keys = [name for name in KEYS if name.startswith("sandbox.")]
    most = {name: m.le for name in keys for m in KEYS[name].type.__metadata__ if isinstance(m, Meta) and m.le}
    assert len(most) == 8
    sandbox = resolve(most).sandbox
    limits = run_limits(sandbox)
    assert replace(limits, wall_s=scoring._PATIENCE * limits.wall_s).wall_s == 86400
    session = replace(WorkflowLimits().session, wall_s=sandbox.workflow_s)
    assert WorkflowLimits(session=session).jail.wall_s > sandbox.workflow_s


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> dict[str, Trial]:
    """What the jails would find, by the problem's id."""
    found: dict[str, Trial] = {}
    monkeypatch.setattr(scoring, "_tried", lambda problems, _: [found[problem.id] for problem in problems])
    return found


def kept(problems: list[Problem], cpu_s: float = 10.0, **data: Any) -> dict[str, Problem]:
    config = resolve(
        {f"data.{key}": value for key, value in data.items()} | {"sandbox.wall_s": 8.0, "sandbox.cpu_s": cpu_s}
    )
    return {problem.id: problem for problem in solvable(problems, config.data, config.sandbox)}


@pytest.mark.jail
def test_solutions_that_fail_are_left_out_with_count_and_reason(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    problems = load(OWN, WRONG, HANGS, UNSOLVED)
    found = kept(problems, cpu_s=0.5)
    assert list(found) == ["right", "unsolved"]
    assert 1.0 <= found["right"].wall_s <= 8.0
    assert found["unsolved"].wall_s is None
    [said] = caplog.messages
    assert said.startswith("2 of the 3 solutions of set fail their own tests here: ")
    assert "1 x timeout: " in said
    assert "1 of 2 tests failed (wrong)" in said
    assert said.endswith("they are left out (data.keep_unsolved)")
    assert list(kept(problems, cpu_s=0.5, keep_unsolved=True)) == ["right", "wrong", "hangs", "unsolved"]


def test_a_solution_that_a_busy_machine_slowed_is_tried_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([Trial(False, 9.0, "timeout: wall clock limit reached"), Trial(False, 1.0, "wrong"), Trial(True, 0.1)])

    async def attempt(pool: Any, problem: Problem, wall_s: float) -> Trial:
        allowed.append(wall_s)
        return next(found)

    monkeypatch.setattr(scoring, "_try", attempt)
    pool: Any = SimpleNamespace(limits=Limits(wall_s=9.0))
    allowed: list[float] = []
    trials = asyncio.run(scoring._try_all(pool, load(OWN, WRONG), 1))
    assert allowed == [9.0, 9.0, 54.0]
    assert [trial.passed for trial in trials] == [True, False]
    assert next(found, None) is None


@pytest.mark.parametrize(("wall_s", "cpu_s", "passed"), [(5.0, 0.0, True), (20.0, 0.1, False), (20.0, 4.0, True)])
def test_a_solution_that_waits_too_long_fails_and_one_that_computes_passes(
    load: Load, wall_s: float, cpu_s: float, passed: bool
) -> None:
    class Pool:
        limits = Limits(wall_s=10.0)

        async def run(self, code: str, *, tests: Tests, limits: Limits, order: int) -> Outcome:
            return Outcome("ok", tests=(True, True), wall_s=wall_s, cpu_s=cpu_s)

    pool: Any = Pool()
    trial = asyncio.run(scoring._try(pool, load(OWN)[0], 30.0))
    assert (trial.passed, trial.reason) == (passed, "" if passed else "timeout: it waits for longer than 10 s")


def test_a_set_of_which_nothing_passes_is_refused(load: Load, trials: dict[str, Trial]) -> None:
    trials["right"] = Trial(False, 0.1, "No module named 'numpy'")
    with pytest.raises(UserError, match=r"1 of the 1 solutions of set fail .*No module named 'numpy' \(right\); mend"):
        kept(load(OWN))


CONTEST = {"question_id": "long", "question_content": "How many?", "private_test_cases": "[]"}
LONG = CONTEST | {"public_test_cases": [{"input": "1" * (9 << 20), "output": "9"}]}
SHORT = CONTEST | {"question_id": "short", "public_test_cases": [{"input": "1", "output": "1"}]}


def test_tests_that_no_jail_takes_are_left_out_where_no_solution_shows_it(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(kept(load(LONG, SHORT))) == ["short"]
    [said] = caplog.messages
    assert said.startswith("the jails refuse the tests of 1 of the 2 problems of set: 1 x the job has 9437")
    assert said.endswith("(long); they are left out")
    with pytest.raises(UserError, match=r"of the 1 problems of set: .* \(long\); mend the file"):
        kept(load(LONG))


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        ("failed", "Traceback\nModuleNotFoundError: No module named 'numpy'\n", "No module named 'numpy'"),
        ("failed", "the tests themselves failed: NameError: x", "NameError: x"),
        ("timeout", "CPU limit reached", "timeout: CPU limit reached"),
        ("memory", "", "memory: "),
    ],
)
def test_reasons_are_short(status: str, error: str, reason: str) -> None:
    assert scoring._reason(status, error) == reason


@pytest.mark.parametrize(
    ("seconds", "factor", "deadline"), [(0.01, 20.0, 1.0), (0.1, 20.0, 2.0), (2.0, 20.0, 8.0), (0.1, 0.0, None)]
)
def test_the_deadline_is_a_multiple_of_the_solutions_time(
    load: Load, trials: dict[str, Trial], seconds: float, factor: float, deadline: float | None
) -> None:
    trials["right"] = Trial(True, seconds)
    assert kept(load(OWN), deadline_factor=factor)["right"].wall_s == deadline


def test_a_trial_is_kept_until_anything_changes_that_it_depends_on(
    load: Load, trials: dict[str, Trial], cache: Path
) -> None:
    trials["right"] = Trial(True, 0.1)
    kept(load(OWN))
    trials["right"] = Trial(True, 0.2)
    assert kept(load(OWN))["right"].wall_s == 2.0
    assert kept(load(OWN | {"asserts": ["assert add(1, 2) == 3"]}))["right"].wall_s == 4.0
    [file, _] = cache.rglob("*.json")
    for broken in (b"", b"[", b"[{}]", b'[{"reason": "\xff"}]'):
        for path in cache.rglob("*.json"):
            path.write_bytes(broken)
        assert kept(load(OWN))["right"].wall_s == 4.0
    assert file.parent.name == "solutions"


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    load: Load, trials: dict[str, Trial], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where a folder should be")
    trials["right"] = Trial(True, 0.1)
    assert kept(load(OWN))["right"].wall_s == 2.0
    assert "the next run tries the solutions again" in caplog.text


def test_a_disk_too_full_for_the_cache_leaves_nothing_half_written(
    load: Load, trials: dict[str, Trial], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    problems, trials["right"] = load(OWN), Trial(True, 0.1)
    with full_disk(10):
        assert kept(problems)["right"].wall_s == 2.0
    assert "File too large; the next run tries the solutions again" in caplog.text
    assert not [path for path in cache.rglob("*") if path.is_file()]


def settings(path: Path, *more: Path, **data: Any) -> Config:
    keys = {f"data.{key}": value for key, value in data.items()}
    return resolve({"data.dataset": tuple(map(str, (path, *more))), "data.held_out": 1} | keys)


def test_several_sets_are_split_each_and_weighted(load: Load, trials: dict[str, Trial], tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 7)):
        load(*[OWN | {"id": f"{name}{n}"} for n in range(count)], name=f"{name}.jsonl")
        trials |= {f"{name}{n}": Trial(True, 0.01) for n in range(count)}
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train, held_out = load_problems(settings(*files, held_out=(1, 3), weights=(1.5, 1.0)))
    assert [problem.dataset for problem in held_out] == ["a", "b", "b", "b"]
    assert [sum(problem.dataset == name for problem in train) for name in "ab"] == [6, 4]
    assert {problem.id for problem in train}.isdisjoint(problem.id for problem in held_out)
    assert len({problem.id for problem in train}) == 8
    assert (train, held_out) == load_problems(settings(*files, held_out=(1, 3), weights=(1.5, 1.0)))
    with pytest.raises(UserError, match=r"data\.held_out has 3 values and data\.dataset names 2"):
        load_problems(settings(*files, held_out=(1, 2, 3)))


def test_sets_for_evaluation_alone_take_the_place_of_those_held_out(
    load: Load, trials: dict[str, Trial], tmp_path: Path
) -> None:
    for name, count in (("a", 5), ("b", 2)):
        load(*[OWN | {"id": f"{name}{n}"} for n in range(count)], name=f"{name}.jsonl")
        trials |= {f"{name}{n}": Trial(True, 0.01) for n in range(count)}
    config = settings(tmp_path / "a.jsonl", eval_dataset=str(tmp_path / "b.jsonl"), held_out=3)
    train, held_out = load_problems(config)
    assert sorted(problem.id for problem in train) == [f"a{n}" for n in range(5)]
    assert sorted(problem.id for problem in held_out) == ["b0", "b1"]
    with pytest.raises(UserError, match=r"id 'a0' is in .*a\.jsonl and in .*a\.jsonl"):
        load_problems(settings(tmp_path / "a.jsonl", eval_dataset=str(tmp_path / "a.jsonl")))


def test_problems_of_the_hub(trials: dict[str, Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, *, split: str | None, **options: Any) -> dict[str, list[dict[str, Any]]]:
        assert (path, options) == ("org/problems", {"revision": "v1"})
        return {"test": [OWN, OWN | {"id": "other"}]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    trials |= {"right": Trial(True, 0.01), "other": Trial(True, 0.01)}
    config = resolve({"data.dataset": "org/problems@v1", "data.held_out": 1})
    train, held_out = load_problems(config)
    assert {problem.id for problem in train + held_out} == {"right", "other"}
    assert train[0].dataset == "problems"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"org/problems@v1 is no .*pip install 'fastgrpo\[hub\]'"):
        load_problems(config)


def test_a_part_of_each_set_is_drawn_by_the_seed(load: Load, trials: dict[str, Trial], tmp_path: Path) -> None:
    for name, count in (("a", 9), ("b", 3)):
        load(*[OWN | {"id": f"{name}{n}"} for n in range(count)], name=f"{name}.jsonl")
        trials |= {f"{name}{n}": Trial(True, 0.01) for n in range(count)}
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train, held_out = load_problems(settings(*files, problems=4))
    assert [sum(problem.dataset == name for problem in train + held_out) for name in "ab"] == [4, 3]
    assert (train, held_out) == load_problems(settings(*files, problems=4))


def test_an_id_in_two_sets_is_refused(load: Load, tmp_path: Path) -> None:
    load(OWN, name="a.jsonl")
    load(OWN, name="b.jsonl")
    with pytest.raises(UserError, match=r"id 'right' is in .*a\.jsonl and in .*b\.jsonl; rename one"):
        load_problems(settings(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))


def test_simulated_workers_need_solutions(load: Load, trials: dict[str, Trial], tmp_path: Path) -> None:
    load(UNSOLVED, UNSOLVED | {"id": "other"})
    with pytest.raises(UserError, match=r"2 of 2 problems of set have no solution, .*set workers\.kind to openai"):
        load_problems(settings(tmp_path / "set.jsonl"))


def test_problems_with_one_test_are_counted(
    load: Load, trials: dict[str, Trial], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trials |= {"right": Trial(True, 0.01), "one": Trial(True, 0.01)}
    problems = load(OWN, OWN | {"id": "one", "asserts": ["assert add(1, 2) == 3"]})
    assert [problem.shared_test for problem in problems] == [False, True]
    load_problems(settings(tmp_path / "set.jsonl"))
    assert "1 of 2 problems of set have one test, which is public and hidden at once" in caplog.text
