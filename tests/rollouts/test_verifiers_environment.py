"""Environments of verifiers: what is loaded, run and rewarded. By a stand-in of the package's interface, no more."""

from __future__ import annotations

import asyncio
import sys
from inspect import Parameter, isawaitable, signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.policy.chat import Chat
from fastgrpo.rollouts.rollouts import collect
from fastgrpo.rollouts.verifiers_environment import VerifiersEnvironment, VerifiersProblem
from fastgrpo.tasks import environment_task, task_of
from fastgrpo.types import Reward, Rollout
from tests.rollouts.test_endpoint import CALL, SAMPLING, TOKENIZER, TOOL, Scripted, split_apart

EXAMPLES = Path(__file__).parents[2] / "examples"


class EmptyModelResponseError(Exception):
    """As verifiers calls an answer without content."""


class InfraError(Exception):
    """As verifiers calls a failure of its own."""


class Client:
    """As verifiers wraps a client of OpenAI's."""

    def __init__(self, client: Any) -> None:
        self.client = client


class Rubric:
    def __init__(self) -> None:
        self.cleaned = 0

    async def score_group(self, states: list[dict[str, Any]]) -> None:
        for number, state in enumerate(states):
            state["reward"], state["metrics"] = float(number), {"turns": 2.0, "absent": None}

    async def cleanup(self, state: dict[str, Any]) -> None:
        self.cleaned += 1


class Swallowing(Rubric):
    """As verifiers scores: a function gets what it names, and where it raises that is logged, and counts 0."""

    def __init__(self, *functions: Any) -> None:
        super().__init__()
        self.funcs = list(functions)

    def _is_group_func(self, function: Any) -> bool:
        return not {"states", "completions"}.isdisjoint(signature(function).parameters)

    async def score_group(self, states: list[dict[str, Any]]) -> None:
        for state in states:
            state["reward"], state["metrics"] = 0.0, {}
        for function in self.funcs:
            if self._is_group_func(function):
                known = {"states": states, "completions": [state["completion"] for state in states]}
                scores = await self._called(function, known, [0.0] * len(states))
            else:
                own = [{"state": state, "completion": state["completion"]} for state in states]
                scores = await asyncio.gather(*(self._called(function, known, 0.0) for known in own))
            for state, score in zip(states, scores, strict=True):
                state["reward"] += score

    async def _called(self, function: Any, known: dict[str, Any], otherwise: Any) -> Any:
        taken = signature(function).parameters
        every = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values())
        try:
            value = function(**{name: value for name, value in known.items() if every or name in taken})
            value = await value if isawaitable(value) else value
            return value if isinstance(otherwise, list) else float(value)
        except Exception:
            return otherwise


async def raises(states: list[dict[str, Any]]) -> None:
    raise ZeroDivisionError("a reward divides by zero")


class ToolEnvironment:
    """Two turns with a tool, in the package's way: the state has what happened, an error too."""

    def __init__(self, error: Exception | None = None, *, evaluates: bool = False) -> None:
        self.rubric, self.error, self.eval_dataset = Rubric(), error, self._rows(9) if evaluates else None

    def _rows(self, count: int) -> list[dict[str, Any]]:
        return [{"prompt": [{"role": "user", "content": f"{n} + 2?"}], "example_id": n} for n in range(count)]

    def get_dataset(self) -> list[dict[str, Any]]:
        return self._rows(5)

    def get_eval_dataset(self) -> Any:
        return self.eval_dataset

    async def rollout(self, row: dict[str, Any], client: Client, model: str, sampling_args: Any) -> dict[str, Any]:
        messages = list(row["prompt"])
        for turn in range(2):
            answer = await client.client.chat.completions.create(
                model=model, messages=messages, tools=[TOOL], **sampling_args
            )
            message = answer.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if turn == 0:
                messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"})
        return {"error": self.error, "completion": messages, "trajectory": [1, 2], "stop_condition": "done"}


def installed(monkeypatch: pytest.MonkeyPatch, environment: Any) -> None:
    package, clients = ModuleType("verifiers"), ModuleType("verifiers.clients")
    clients.OpenAIChatCompletionsClient = Client  # type: ignore[attr-defined]
    if environment is not None:
        package.load_environment = environment  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "verifiers", package)
    monkeypatch.setitem(sys.modules, "verifiers.clients", clients)


def loaded(monkeypatch: pytest.MonkeyPatch, made: ToolEnvironment, **keys: Any) -> tuple[Any, list[Any], list[Any]]:
    installed(monkeypatch, lambda name, **_: made)
    config = resolve({"data.environment": "verifiers:adding", "data.held_out": 2} | keys)
    task = task_of(config)
    train, held_out = task.load_problems(config)

    async def opened() -> Any:
        async with task.open_environment(config, None) as environment:
            return environment

    return asyncio.run(opened()), train, held_out


def rollouts(environment: Any, problems: list[Any], *texts: str) -> list[Any]:
    size = len(texts) // 2
    engine = Scripted(*texts)
    groups = asyncio.run(
        collect(engine, environment, Chat(TOKENIZER), problems, group_size=size, sampling=SAMPLING, seed=0)
    )
    return groups[0].rollouts


def test_an_environment_is_run_and_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ToolEnvironment()
    environment, train, held_out = loaded(monkeypatch, made)
    assert (len(train), len(held_out)) == (3, 2)
    assert environment.prompt(train[0]) == train[0].prompt
    found = rollouts(environment, train[:1], CALL, CALL, "3.", "4.")
    assert [rollout.reward.total for rollout in found] == [0.0, 1.0]
    assert all(rollout.result.metrics == {"turns": 2.0} for rollout in found)
    assert all(rollout.result.record == {"stop_condition": "done", "turns": 2} for rollout in found)
    assert sum(found[0].loss_mask) == len(split_apart(CALL)) + len(split_apart("3."))
    assert made.rubric.cleaned == 2


def test_an_environment_may_be_passed_as_the_object_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    train, held_out = environment_task(ToolEnvironment(), ()).load_problems(resolve({"data.held_out": 2}))  # type: ignore[arg-type]
    assert (len(train), len(held_out)) == (3, 2)
    with pytest.raises(UserError, match="has its own rows: leave dataset and eval_dataset out"):
        environment_task(ToolEnvironment(), train)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the name 'verifiers:adding' belongs in the key data\.environment"):
        environment_task("verifiers:adding", ())  # type: ignore[arg-type]


def test_its_own_evaluation_set_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _, train, held_out = loaded(monkeypatch, ToolEnvironment(evaluates=True))
    assert len(train) == 5
    assert len({task.id for task in held_out}) == 2
    assert all(task.id.startswith("eval/") for task in held_out)
    _, train, held_out = loaded(monkeypatch, ToolEnvironment(evaluates=True), **{"data.problems": 1})
    assert (len(train), len(held_out)) == (1, 1)


def last_said(completion: list[dict[str, Any]]) -> str:
    return str(completion[-1]["content"])


def right(completion: list[dict[str, Any]]) -> float:
    """Raises for an answer that is no number."""
    return float(int(last_said(completion).rstrip(".")))


async def asked(state: dict[str, Any], **_: Any) -> float:
    if last_said(state["completion"]) == "4.":
        raise ConnectionError("the judge is away")
    return 0.25


def ranked(completions: list[Any]) -> list[float]:
    return [0.5] * len(completions)


def unranked(completions: list[Any]) -> list[float]:
    raise KeyError("no rank")


def silent(completion: list[dict[str, Any]]) -> None:
    return None


SILENT = "what the rubric's silent returns must be a number, got None"


def said(completion: list[dict[str, Any]]) -> str:
    """A text that reads as a number is none."""
    return last_said(completion)


@pytest.mark.parametrize(
    ("functions", "first", "second"),
    [
        ((right, ranked), 3.5, 4.5),
        ((ranked, asked), 0.75, "the rubric's asked raised ConnectionError: the judge is away (test_verifiers"),
        ((unranked,), "the rubric's unranked raised KeyError", "the rubric's unranked raised KeyError"),
        ((silent,), SILENT, SILENT),
        ((said,), "what the rubric's said returns must be a number, got '3.'", "must be a number, got '4.'"),
    ],
)
def test_a_rubrics_function_that_raises_is_a_failure_and_no_reward_of_0(
    monkeypatch: pytest.MonkeyPatch, functions: tuple[Any, ...], first: float | str, second: float | str
) -> None:
    made = ToolEnvironment()
    made.rubric = Swallowing(*functions)
    environment, train, _ = loaded(monkeypatch, made)
    for rollout, wanted in zip(rollouts(environment, train[:1], CALL, CALL, "3.", "4."), (first, second), strict=True):
        if isinstance(wanted, str):
            assert rollout.reward is None
            assert wanted in rollout.result.error
        else:
            assert rollout.reward.total == wanted


def test_the_parts_of_a_rubric_are_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made, part = ToolEnvironment(), Swallowing(right)
    made.rubric = Swallowing()
    made.rubric.rubrics, made.rubric.score_group = [part], part.score_group  # type: ignore[attr-defined, method-assign]
    environment, train, _ = loaded(monkeypatch, made)
    found = rollouts(environment, train[:1], CALL, CALL, "3.", "four")
    assert [rollout.result.status for rollout in found] == ["ok", "infrastructure"]


def test_what_a_group_holds_is_given_back_where_its_scores_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ToolEnvironment()
    made.rubric.score_group = raises  # type: ignore[method-assign]
    environment, train, _ = loaded(monkeypatch, made)
    found = rollouts(environment, train[:1], CALL, CALL, "3.", "4.")
    assert all("a reward divides by zero" in rollout.result.error for rollout in found)
    assert made.rubric.cleaned == 2


@pytest.mark.parametrize(
    ("error", "status"), [(EmptyModelResponseError("empty"), "ok"), (InfraError("gone"), "infrastructure")]
)
def test_what_the_policy_brought_about_is_rewarded(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    made = ToolEnvironment(error)
    environment, train, _ = loaded(monkeypatch, made)
    (rollout,) = rollouts(environment, train[:1], CALL, "")
    assert rollout.result.status == status
    assert made.rubric.cleaned == 1, "what it holds, as a sandbox, is given back either way"
    assert ("InfraError: gone" in rollout.result.error) == (status == "infrastructure")


def refuse(name: str, **_: Any) -> Any:
    raise ValueError(f"no key for {name}")


def lack(name: str, **_: Any) -> Any:
    try:
        raise ModuleNotFoundError("No module named 'math_verify'")
    except ModuleNotFoundError as error:
        raise ValueError("install as `verifiers[all]`.\nOr not") from error


@pytest.mark.parametrize(
    ("keys", "load", "sentence"),
    [
        ({"data.environment": "gym:adding"}, refuse, "data.environment must be verifiers:NAME, got 'gym:adding'"),
        ({}, refuse, "the environment verifiers:adding does not load: no key for adding"),
        ({}, lack, r"\[all\]`. Or not, from ModuleNotFoundError: No module named 'math_verify' \(test_ver"),
        (
            {"data.dataset": "rows.jsonl"},
            None,
            r"data\.dataset = 'rows.jsonl' would not be read: an environment of veri",
        ),
        ({"data.eval_dataset": ("a", "b")}, None, r"data\.eval_dataset = \('a', 'b'\) would not be read"),
        ({"data.reward": "a:b"}, refuse, "data.environment has rewards of its own"),
        ({}, None, r"has no load_environment \(.*\): pip install 'fastgrpo\[verifiers\]'"),
        ({"data.environment_args": "{"}, refuse, "data.environment_args is no JSON"),
        ({"data.environment_args": "[]"}, refuse, "data.environment_args must be a JSON object"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], load: Any, sentence: str
) -> None:
    installed(monkeypatch, load)
    config = resolve({"data.environment": "verifiers:adding"} | keys)
    with pytest.raises(UserError, match=sentence):
        task_of(config).load_problems(config)


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers", None)
    config = resolve({"data.environment": "verifiers:adding"})
    with pytest.raises(UserError, match=r"verifiers:adding needs the package verifiers .*: pip install"):
        task_of(config).load_problems(config)


def test_problems_have_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    _, train, held_out = loaded(monkeypatch, ToolEnvironment())
    assert sorted(task.id for task in [*train, *held_out]) == [f"train/{n}" for n in range(5)]


def test_the_package_itself_runs_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ToolEnv` and `Rubric` of verifiers, whatever version is installed, through its own client."""
    pytest.importorskip("verifiers", reason="verifiers is not installed beside this vLLM: see docs/own-task.md")
    monkeypatch.syspath_prepend(EXAMPLES)
    keys = {"data.environment": "verifiers:verifiers_env", "data.environment_args": '{"rows": 6}', "data.held_out": 2}
    task = task_of(resolve(keys))
    train, held_out = task.load_problems(resolve(keys))
    assert (len(train), len(held_out)) == (4, 2)

    async def opened() -> Any:
        async with task.open_environment(resolve(keys), None) as environment:
            return environment

    environment = asyncio.run(opened())
    answer = train[0].row["answer"]
    right, wrong = rollouts(environment, train[:1], CALL, CALL, f"It is {answer}.", "No idea")
    assert right.reward.total > 1.0 > wrong.reward.total > 0.0
    assert right.result.metrics["right"] == 1.0
    assert right.result.metrics["total_tool_calls"] == 1.0
    assert right.result.record["turns"] == 2
    written = [*split_apart(CALL), *split_apart(f"It is {answer}.")]
    assert [t for t, m in zip(right.token_ids, right.loss_mask, strict=True) if m] == written
    assert right.branches == wrong.branches == []
    assert "<tool_response>\n3" in TOKENIZER.decode(right.token_ids)


def test_the_package_itself_tells_what_its_rubric_raises() -> None:
    verifiers = pytest.importorskip(
        "verifiers", reason="verifiers is not installed beside this vLLM: see docs/own-task.md"
    )
    rubric = verifiers.RubricGroup([verifiers.Rubric(funcs=[right, ranked]), verifiers.Rubric(funcs=[asked])])
    agent = VerifiersEnvironment(SimpleNamespace(rubric=rubric))
    texts = ("3.", "4.", "four")
    states = [verifiers.State(prompt="?", completion=[{"content": text}], task="", trajectory=[]) for text in texts]
    done = [Rollout([], [], [], [text], [state]) for text, state in zip(texts, states, strict=True)]
    results = asyncio.run(agent.results(VerifiersProblem("p", "?", {}), done))
    assert [result.status for result in results] == ["ok", "infrastructure", "infrastructure"]
    assert results[0].reward == Reward(total=3.75)
    assert "asked raised ConnectionError" in results[1].error
    assert "right raised ValueError" in results[2].error
