"""Reward functions as TRL's users write them, the right ones and those that fail."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.functions import find_function
from fastgrpo.rollouts.dataset import Example
from fastgrpo.rollouts.environment import EnvironmentFailure
from fastgrpo.rollouts.reward_functions import RewardFunctions, TrainerState
from fastgrpo.tasks import reward_task
from fastgrpo.types import Result, Rollout


def rollout(text: str) -> Rollout:
    return Rollout([7, 8, 1, 2], [0, 0, 1, 1], [0.0] * 4, [text], [text])


def rewarded(
    *functions: Callable[..., Any], weights=None, prompt="Say hi", columns=None, deadline_s=20.0
) -> list[Result]:
    environment = RewardFunctions(functions, weights, deadline_s=deadline_s)
    example = Example("1", prompt, columns or {})
    return asyncio.run(environment.results(example, [rollout("hi"), rollout("hello")]))


async def in_time(function: Callable[..., Any]) -> list[Result]:
    """As the rollouts ask, whose own deadline is as long."""
    return await RewardFunctions([function], deadline_s=2.0).results(Example("1", "Say hi", {}), [rollout("hi")])


def length(completions, **columns) -> list[float]:
    return [len(text) for text in completions]


async def right(prompts, completions, completion_ids, answer, **_) -> list[float]:
    assert prompts == ["Say hi"] * 2
    assert completion_ids == [[1, 2]] * 2
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def test_weighted_values_of_plain_and_coroutine_functions_add_up() -> None:
    results = rewarded(length, right, weights=[0.5, 2.0], columns={"answer": "hello"})
    assert [result.reward.total for result in results] == [1.0, 4.5]
    assert results[1].reward.terms == {"length": 2.5, "right": 2.0}


def test_what_a_function_changes_is_its_own() -> None:
    def changes(prompts, completions, tests, **_):
        prompts[0].append(completions[0][0])
        completions[0][0]["content"] = ""
        tests[0]["inputs"].clear()
        completions.clear()
        return [1.0, 0.0]

    prompt = [{"role": "user", "content": "Say hi"}]
    columns = {"tests": {"inputs": [1, 2]}}
    results = rewarded(changes, content_length, prompt=prompt, columns=columns)
    assert [result.reward.terms["content_length"] for result in results] == [2.0, 5.0]
    assert (prompt, columns) == ([{"role": "user", "content": "Say hi"}], {"tests": {"inputs": [1, 2]}})


def content_length(completions, **_):
    return [len(turns[0]["content"]) for turns in completions]


def test_a_conversation_is_answered_by_a_message() -> None:
    results = rewarded(content_length, prompt=[{"role": "user", "content": "Say hi"}])
    assert [result.reward.total for result in results] == [2.0, 5.0]


def test_none_does_not_apply_and_nothing_that_applies_is_no_reward() -> None:
    def long_only(completions, **_):
        return [None if len(text) < 3 else 1.0 for text in completions]

    assert [result.reward.terms for result in rewarded(length, long_only)] == [
        {"length": 2.0},
        {"length": 5.0, "long_only": 1.0},
    ]
    short, long = rewarded(long_only)
    assert (short.status, short.reward) == ("infrastructure", None)
    assert long.reward.total == 1.0


class Unreadable:
    def __float__(self):
        raise RuntimeError

    __repr__ = __float__


def failing(error: BaseException) -> Callable[..., Any]:
    async def fails(**_):
        raise error

    return fails


def broken(completions, **_):
    raise KeyError("answer")


LINE_OF_BROKEN = rf"test_reward_functions\.py:{broken.__code__.co_firstlineno + 1}"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda **_: [1.0], "returned 1 values for 2 completions"),
        (lambda **_: iter(lambda: 1.0, None), "returned more than 2 values for 2 completions"),
        *(
            (
                lambda _value=value, **_: _value,
                f"must return a list with a number for each of 2 completions, got {kind}",
            )
            for value, kind in (
                (1.0, "float"),
                (None, "NoneType"),
                (np.array(1.0), "ndarray"),
                (torch.tensor(1.0), "Tensor"),
                ({"a": 1.0, "b": 2.0}, "dict"),
                ({1.0, 2.0}, "set"),
                ("12", "str"),
            )
        ),
        (lambda **_: [1.0, float("nan")], "returns, None where it does not apply, must be finite, got nan"),
        (lambda **_: ["high", 1.0], "must be a number, got 'high'"),
        *(
            (lambda _text=text, **_: [_text, 1.0], rf"must be a number, got .*{said}")
            for text, said in (("1", "'1'"), (" 1e0", "1e0"), (b"1", "b'1'"), (np.str_("1"), "'1'"))
        ),
        (lambda **_: [10**400, 1.0], "must be a number, got 1000"),
        (lambda **_: [Unreadable(), 1.0], "must be a number, got Unreadable"),
        (broken, rf"reward broken: KeyError: 'answer' \({LINE_OF_BROKEN}\)$"),
        (lambda **_: json.loads("{"), r"reward <lambda>: JSONDecodeError: .* \(test_reward_functions.py:\d+\)$"),
        (lambda **_: [next(iter(())), 1.0], "RuntimeError: StopIteration"),
        (lambda **_: (1 / 0 for _ in range(2)), "ZeroDivisionError: division by zero"),
        (failing(ValueError("two\nlines")), r"reward fails: ValueError: two lines \(test_reward_functions.py:\d+\)$"),
        (failing(SystemExit(3)), "reward fails: SystemExit: 3"),
        (failing(asyncio.CancelledError()), "reward fails: CancelledError"),
        (lambda completions: [1.0, 1.0], "unexpected keyword argument"),
    ],
)
def test_what_is_no_list_of_numbers_is_one_sentence(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(EnvironmentFailure, match=reason):
        rewarded(function)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_function_that_hangs_ends_at_its_deadline_by_its_name(blocking: bool) -> None:
    async def waits(**_):
        await asyncio.Event().wait()

    begun = time.monotonic()
    with pytest.raises(EnvironmentFailure, match=r"nearly all of grpo.execute_s = 0\.2 s"):
        rewarded((lambda **_: time.sleep(30)) if blocking else waits, deadline_s=0.2)
    assert time.monotonic() - begun < 25


def test_a_function_that_hangs_ends_before_the_rollouts_own_deadline() -> None:
    async def waits(**_):
        await asyncio.Event().wait()

    with pytest.raises(EnvironmentFailure, match="reward waits took nearly all"):
        asyncio.run(asyncio.wait_for(in_time(waits), 2.0))


def test_a_function_that_fails_ends_the_others() -> None:
    """Each may cost money; the group has no reward either way."""
    asked, ended = threading.Event(), list[str]()

    async def asks(completions, **_) -> list[float]:
        try:
            asked.set()
            await asyncio.sleep(60)
        finally:
            ended.append("asks")

    def fails(completions, **_) -> list[float]:
        assert asked.wait(20)
        raise ZeroDivisionError

    async def main() -> None:
        environment = RewardFunctions([asks, fails], deadline_s=20.0)
        with pytest.raises(EnvironmentFailure, match="reward fails: ZeroDivisionError"):
            await environment.results(Example("1", "Say hi", {}), [rollout("hi")])
        assert ended == ["asks"]

    asyncio.run(main())


def test_objects_that_are_called_and_awaited_are_functions_too() -> None:
    class Plain:
        def __call__(self, completions, **_):
            return [1.0] * len(completions)

    class Waiting:
        async def __call__(self, completions, **_):
            return [2.0] * len(completions)

    assert rewarded(Plain(), Waiting())[0].reward.terms == {"Plain": 1.0, "Waiting": 2.0}


def test_a_partial_has_its_functions_name_unless_it_has_its_own() -> None:
    def scaled(factor, completions, **_):
        return [factor * len(text) for text in completions]

    async def waited(factor, completions, **_):
        return [factor] * len(completions)

    named = partial(scaled, 3.0)
    named.__name__ = "thrice"  # type: ignore[attr-defined]
    functions = (partial(scaled, 2.0), named, partial(waited, factor=1.0))
    assert rewarded(*functions)[0].reward.terms == {"scaled": 4.0, "thrice": 6.0, "waited": 1.0}
    with pytest.raises(
        UserError, match="two functions called scaled: rewards are logged by name, so set another __name"
    ):
        RewardFunctions([scaled, partial(scaled, 2.0)], deadline_s=1.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 / 0", r"its module raises ZeroDivisionError: division by zero \(rewards_\d+\.py:1\)$"),
        ("def f(:", "its module raises SyntaxError"),
        ('import sys; sys.exit("usage: rewards.py")', "its module raises SystemExit: usage: rewards.py"),
        ("import no_such", "No module named 'no_such'$"),
        ("", "has no attribute 'f'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"rewards_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"data.reward: the function {name}:f cannot be imported.*{reason}"):
        find_function(f"{name}:f", "data.reward")


@pytest.mark.parametrize(
    ("name", "module"),
    [("./rewards.py", "rewards"), ("my/rewards.py", r"my\.rewards"), ("/abs/rewards.py", "rewards")],
)
def test_a_file_in_the_place_of_a_module_is_told_what_to_write(name: str, module: str) -> None:
    with pytest.raises(UserError, match=f"write {module}:right, which is looked for in the present folder"):
        find_function(f"{name}:right", "data.reward")


@pytest.mark.parametrize("name", ["no_such_file", "no_such_folder.file"])
def test_a_module_that_is_not_there_is_told_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f" in {tmp_path} or PYTHONPATH: name a file there, without .py")):
        find_function(f"{name}:right", "data.reward")


def test_what_is_named_and_no_function_is_told() -> None:
    with pytest.raises(UserError, match=r"data\.reward: sys:path is no function, but"):
        find_function("sys:path", "data.reward")


def test_trls_own_arguments_are_there_for_functions_that_take_them() -> None:
    def logs(completions, trainer_state, log_extra, **kwargs):
        log_extra("words", [text.split() for text in completions])
        for value in (1.0, np.float32(2.0), float("nan")):
            kwargs["log_metric"]("accuracy", value)
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    def by_name_alone(prompts, completions, completion_ids, log_metric):
        log_metric("accuracy", 6)
        return [0.0] * len(completions)

    def without(prompts, completions, completion_ids):
        return [0.0] * len(completions)

    async def main(at: int | None) -> list[Result]:
        plain = RewardFunctions([logs, by_name_alone, without], deadline_s=20.0, state=TrainerState(8, 8))
        environment = plain if at is None else plain.at_step(at)
        return await environment.results(Example("1", "Say hi", {}), [rollout("hi"), rollout("hello you")])

    first, second = asyncio.run(main(at=2))
    assert (first.reward.total, second.record, second.metrics) == (0.25, {"words": ["hello", "you"]}, {"accuracy": 3.0})
    assert asyncio.run(main(at=None))[0].reward.total == 1.0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda trainer_state, **_: [trainer_state.epoch] * 2,
            "trainer_state has no epoch here, but global_step",
        ),
        (
            lambda log_extra, **_: log_extra("said", [1]),
            "log_extra got 1 values of 'said' for 2 completions",
        ),
        (
            lambda log_metric, **_: log_metric("size", "big"),
            "the metric 'size' of log_metric must be a number",
        ),
        (lambda log_metric, **_: log_metric("size", "1"), "the metric 'size' of log_metric must be a number, got '1'"),
        (lambda log_metric, **_: log_metric("size", float("inf")), "the metric 'size' of log_metric must be finite"),
    ],
)
def test_what_of_trls_arguments_cannot_be_had_is_one_sentence(function: Callable[..., Any], reason: str) -> None:
    assert not hasattr(TrainerState(), "epoch")
    with pytest.raises(EnvironmentFailure, match=reason):
        rewarded(function)


def test_a_row_has_its_id_where_the_function_takes_it() -> None:
    def named(prompts, completions, completion_ids, id):
        return [float(each == "q1") for each in id]

    def unnamed(prompts, completions, completion_ids):
        return [1.0, 1.0]

    results = rewarded(named, unnamed, columns={"id": "q1"})
    assert [result.reward.total for result in results] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda data_source, solution_str, ground_truth, extra_info=None: 1.0,
            "cannot be called: missing .*docs/own-task.md has the form, and what makes it of verl's and OpenRLHF's",
        ),
        (
            lambda completions, answer, **_: [],
            "missing a required.* 'answer'; it is given completion_ids, .*, prompts, ",
        ),
        (
            lambda completions, wanted: [],
            r"unexpected keyword argument 'completion_ids'; .* wanted: end its arguments with \*\*_",
        ),
        (lambda id, **_: [], "missing a required.* 'id'"),
        (len, "reward len cannot be called"),
    ],
)
def test_a_function_that_does_not_take_the_columns_is_told_before_anything_starts(
    function: Callable[..., Any], reason: str
) -> None:
    rows = [{"prompt": f"Name {n} colours.", "wanted": n} for n in range(9)]
    assert reward_task([length, right_or_wanted], dataset=rows).load_problems(resolve({"data.held_out": 1}))
    with pytest.raises(UserError, match=reason):
        reward_task([function], dataset=rows).load_problems(resolve({"data.held_out": 1}))


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "trainer_state", "log_metric"])
@pytest.mark.parametrize("part", ["dataset", "eval_dataset"])
def test_a_column_by_the_name_of_a_functions_own_argument_is_refused(name: str, part: str) -> None:
    sets = {set: [{"prompt": "a", "wanted": 1, "completion": "b"}] for set in ("dataset", "eval_dataset")}
    assert reward_task([length], **sets).load_problems(resolve({}))
    sets[part][0][name] = ["x"]
    with pytest.raises(UserError, match=rf"the data set has a column '{name}', and by that name .*: rename the column"):
        reward_task([length], **sets).load_problems(resolve({}))


def right_or_wanted(prompts, completions, completion_ids, wanted, id=None):
    raise NotImplementedError


def test_names_and_weights_must_fit() -> None:
    with pytest.raises(UserError, match="weights of reward functions are finite numbers, got nan"):
        RewardFunctions([length], [float("nan")], deadline_s=1.0)
    with pytest.raises(UserError, match="reward has two functions called length"):
        reward_task([length, length])
    for weights, reason in (
        ([1.0, 2.0], "reward_weights has 2 values for 1 reward functions"),
        ([], "reward_weights has 0 values"),
        (0.5, "reward_weights must be a list of numbers, one for each function, got 0.5"),
        ([10**400], "weights of reward functions are finite numbers, got 1000"),
        (["1"], "finite numbers, got '1'"),
    ):
        with pytest.raises(UserError, match=reason):
            reward_task([length], weights)
    with pytest.raises(UserError, match="reward takes functions, got 'my_rewards:length'"):
        RewardFunctions(["my_rewards:length"], deadline_s=1.0)  # type: ignore[list-item]
    with pytest.raises(UserError, match="around a reward model a function that asks it"):
        RewardFunctions([torch.nn.Linear(1, 1)], deadline_s=1.0)
