"""Environments of verifiers itself, through its interception and clients, over a scripted engine: `make verifiers`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.policy.chat import Chat
from fastgrpo.rollouts import endpoint
from fastgrpo.rollouts.rollouts import collect
from fastgrpo.tasks import environment_task, task_of
from fastgrpo.types import Result, Rollout, Sampling
from tests.rollouts.test_endpoint import CALL, SAMPLING, TOKENIZER, Scripted, split_apart

vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed: make verifiers")
EXAMPLES = Path(__file__).parents[2] / "examples"
HERE = {"type": "subprocess"}


@pytest.fixture(autouse=True)
def sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's module anew."""
    monkeypatch.syspath_prepend(EXAMPLES)
    sys.modules.pop("verifiers_env", None)
    import verifiers_env

    yield verifiers_env
    sys.modules.pop("verifiers_env", None)


def configured(agent: dict[str, Any] | None = None, keys: dict[str, Any] | None = None, **arguments: Any) -> Any:
    given = {"taskset": {"rows": 6}, "agent": {"runtime": HERE} | (agent or {})} | arguments
    base = {"data.environment": "verifiers:verifiers_env", "data.environment_args": json.dumps(given)}
    return resolve(base | {"data.held_out": 2} | (keys or {}))


def run(
    *texts: str | None, config: Any = None, sampling: Sampling = SAMPLING, size: int = 2, engine: Any = None
) -> list[Rollout]:
    """One group's rollouts, which write the `texts`."""
    config = config or configured()
    task = task_of(config)
    train, _ = task.load_problems(config)

    async def main() -> Any:
        async with task.open_environment(config, None) as environment:
            scripted = engine or Scripted(*texts)
            return await collect(
                scripted, environment, Chat(TOKENIZER), train[:1], group_size=size, sampling=sampling, seed=0
            )

    return asyncio.run(main())[0].rollouts


def only(rollouts: list[Rollout]) -> Result:
    return rollouts[0].result


def test_the_example_is_run_and_scored() -> None:
    config = configured()
    train, held_out = task_of(config).load_problems(config)
    assert (len(train), len(held_out)) == (4, 2)
    assert sorted(problem.id for problem in [*train, *held_out]) == [str(n) for n in range(6)]
    answer = train[0].task.data.answer
    right, wrong = run(CALL, CALL, f"It is {answer}.", "No idea")
    assert right.reward.terms["right"] == 1.0
    assert 1.0 < right.reward.total == sum(right.reward.terms.values()) < 1.1
    assert 0.0 < wrong.reward.total < 0.1
    assert right.result.record == {"stop_condition": "agent_completed", "turns": 2}
    written = [*split_apart(CALL), *split_apart(f"It is {answer}.")]
    assert [t for t, m in zip(right.token_ids, right.loss_mask, strict=True) if m] == written
    assert right.branches == wrong.branches == []
    assert "<tool_response>\n3" in TOKENIZER.decode(right.token_ids)


def test_an_environment_may_be_passed_as_the_object_that_it_is() -> None:
    config = vf.resolve_env_config({"taskset": {"id": "verifiers_env", "rows": 5}, "agent": {"runtime": HERE}})
    environment = vf.load_environment(config)
    train, held_out = environment_task(environment, ()).load_problems(resolve({"data.held_out": 2}))
    assert (len(train), len(held_out)) == (3, 2)
    with pytest.raises(UserError, match="has its own rows: leave dataset and eval_dataset out"):
        environment_task(environment, train)


def test_a_set_without_end_needs_a_count(monkeypatch: pytest.MonkeyPatch, sums: Any) -> None:
    monkeypatch.setattr(sums.Sums, "INFINITE", True)
    config = configured(keys={"data.problems": 4})
    train, held_out = task_of(config).load_problems(config)
    assert (len(train), len(held_out)) == (2, 2)
    with pytest.raises(UserError, match=r"makes tasks without end: say by data\.problems"):
        task_of(configured()).load_problems(configured())


def test_a_prompt_has_its_system_message_and_its_parts(monkeypatch: pytest.MonkeyPatch, sums: Any) -> None:
    said = [vf.UserMessage(content=[vf.TextContentPart(text="What"), vf.TextContentPart(text=" is it?")])]
    whole = sums.Sum(prompt=said, system_prompt="Be short.", answer="1")
    bare = sums.Sum(answer="1")
    monkeypatch.setattr(sums.Sums, "load", lambda self: [sums.SumTask(data) for data in (whole, bare)])
    task = task_of(configured())
    train, _ = task.load_problems(configured(keys={"data.held_out": 0}))
    assert task.prompt(resolve({}), train[0]) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is it?"},
    ]
    assert task.prompt(resolve({}), train[1]) == [{"role": "user", "content": ""}]


async def scored(self: Any, trace: Any) -> float:
    """Raises for an answer that is no number."""
    return float(trace.last_reply.rstrip("."))


async def silent(self: Any, trace: Any) -> Any:
    return None


async def said(self: Any, trace: Any) -> Any:
    return trace.last_reply


async def raises(self: Any, trace: Any, runtime: Any = None) -> Any:
    if trace.last_reply == "4.":
        raise ConnectionError("the judge is away")
    return 0.25


async def hangs(self: Any, trace: Any) -> float:
    await asyncio.sleep(60)
    return 1.0


@pytest.mark.parametrize(
    ("marked", "function", "first", "second"),
    [
        (vf.reward, scored, 3.0, 4.0),
        (vf.reward(weight=2.0), scored, 6.0, 8.0),
        (vf.reward, raises, 0.25, "ConnectionError: the judge is away"),
        (vf.metric, raises, 0.5, "ConnectionError: the judge is away"),
        (vf.reward, silent, "TypeError", "TypeError"),
        (vf.reward, said, "ValueError", "ValueError"),
        (vf.reward, hangs, "scoring_timeout", "scoring_timeout"),
    ],
)
def test_a_score_that_fails_is_a_failure_and_no_reward_of_0(
    monkeypatch: pytest.MonkeyPatch, sums: Any, marked: Any, function: Any, first: Any, second: Any
) -> None:
    async def half(self: Any) -> float:
        return 0.5

    monkeypatch.delattr(sums.SumTask, "brevity")
    # A copy: verifiers marks the function itself.
    copied = FunctionType(function.__code__, globals(), function.__name__, function.__defaults__)
    monkeypatch.setattr(sums.SumTask, "right", marked(copied))
    if marked is vf.metric:
        monkeypatch.setattr(sums.SumTask, "half", vf.reward(half), raising=False)
    texts = ("nil.", "nil") if function is said else ("3.", "4.")
    found = run(CALL, CALL, *texts, config=configured({"timeout": {"scoring": 0.5}}))
    for rollout, wanted in zip(found, (first, second), strict=True):
        if isinstance(wanted, str):
            assert rollout.result.status == "infrastructure"
            assert rollout.reward is None
            assert wanted in rollout.result.error
        else:
            assert rollout.reward.total == wanted
    if marked is vf.metric:
        assert found[0].result.metrics == {"raises": 0.25}


def test_a_score_that_is_not_finite_costs_its_own_rollout_alone(monkeypatch: pytest.MonkeyPatch, sums: Any) -> None:
    monkeypatch.setattr(sums.SumTask, "right", vf.reward(scored))
    good, bad = run(CALL, CALL, "3.", "nan")
    assert good.reward.terms["scored"] == 3.0
    assert (bad.reward, bad.result.status) == (None, "infrastructure")
    assert "must be finite" in bad.result.error


def test_a_task_that_rewards_nothing_is_told(monkeypatch: pytest.MonkeyPatch, sums: Any) -> None:
    monkeypatch.delattr(sums.SumTask, "right")
    monkeypatch.delattr(sums.SumTask, "brevity")
    assert "the task gave no reward" in only(run("3.", size=1)).error


@pytest.mark.parametrize("hook", ["setup", "finalize"])
def test_a_hook_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch, sums: Any, hook: str) -> None:
    async def broken(self: Any, trace: Any, runtime: Any) -> None:
        raise OSError("no disk")

    monkeypatch.setattr(sums.SumTask, hook, broken)
    result = only(run("3.", size=1))
    assert (result.status, result.reward) == ("infrastructure", None)
    assert f"TaskError: task {hook}: OSError: no disk" in result.error


def test_a_harness_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch, sums: Any) -> None:
    monkeypatch.setattr(sums, "added", lambda arguments: 1 / 0)
    result = only(run(CALL, size=1))
    assert (result.status, result.reward) == ("infrastructure", None)
    assert "HarnessError: harness 'verifiers_env': ZeroDivisionError" in result.error


def test_a_limit_of_turns_or_of_time_is_rewarded(monkeypatch: pytest.MonkeyPatch, sums: Any) -> None:
    limited = run(CALL, CALL, CALL, CALL, config=configured({"max_turns": 2}))
    assert [rollout.result.status for rollout in limited] == ["truncated"] * 2
    assert all(rollout.reward.terms["right"] == 0.0 for rollout in limited)
    assert limited[0].result.record == {"stop_condition": "max_turns", "turns": 2}

    (short,) = run(CALL, size=1, config=configured({"max_output_tokens": 5}))
    assert (short.result.status, short.result.record["stop_condition"]) == ("truncated", "max_output_tokens")

    timed = run(CALL, None, size=1, config=configured({"timeout": {"rollout": 0.7}}))
    assert (timed[0].result.status, timed[0].reward.terms["right"]) == ("truncated", 0.0)
    assert timed[0].result.record == {"stop_condition": "agent_timeout", "turns": 1}


def test_a_conversation_that_outgrew_the_model_is_rewarded_where_the_harness_ends_by_it() -> None:
    for length in range(150, 400, 5):  # what the first request leaves room for, and the second does not
        sampling = replace(SAMPLING, max_model_len=length)
        (rollout,) = run(CALL, "3.", size=1, sampling=sampling)
        if rollout.result.record.get("turns") == 1:
            break
    assert rollout.result.status == "ok"
    assert rollout.reward.terms["right"] == 0.0
    assert len(rollout.completions) == 1


def test_a_conversation_that_is_too_long_from_the_start_is_a_failure() -> None:
    result = only(run(CALL, size=1, sampling=replace(SAMPLING, max_model_len=20)))
    assert (result.status, result.reward) == ("infrastructure", None)


def test_two_runs_of_an_agent_have_two_rewards_and_are_refused() -> None:
    result = only(run("3.", "4.", size=1, config=configured(id="best-of-n", n=2)))
    assert (result.status, result.reward) == ("infrastructure", None)
    assert "more than one run of an agent asks the policy" in result.error


def test_an_agent_that_asks_another_model_than_the_policy_is_not_the_policy() -> None:
    other = {"model": "m", "client": {"type": "eval", "base_url": "http://127.0.0.1:9/v1"}}
    result = only(run(size=1, config=configured(other)))
    assert result.status == "infrastructure"
    assert "ProviderError" in result.error


def test_another_agent_with_a_client_of_its_own_is_not_trained(sums: Any) -> None:
    """And what the environment takes for valid is, though that agent fails."""

    class Judged(vf.EnvConfig):
        judge: vf.AgentConfig = vf.AgentConfig()
        agent: vf.AgentConfig = vf.AgentConfig()

    class Court(vf.Env[Judged]):
        async def run(self, task: Any, agents: Any) -> None:
            await agents.judge.run(task)
            await agents.agent.run(task)

        async def finalize(self, task: Any, episode: Any) -> None:
            episode.by_agent["agent"][0].record_reward("court", 0.5)

        def complete(self, episode: Any) -> bool:
            return bool(episode.by_agent["agent"][0].ok) and not episode.errors

    away = vf.EvalClientConfig(base_url="http://127.0.0.1:9/v1", api_key_var="NONE")
    here = vf.SubprocessConfig()
    judge, agent = vf.AgentConfig(runtime=here, client=away, model="m"), vf.AgentConfig(runtime=here)
    taskset = sums.SumsConfig(id="verifiers_env", rows=3)
    task = environment_task(Court(Judged(taskset=taskset, judge=judge, agent=agent)), ())
    train, _ = task.load_problems(resolve({"data.held_out": 1}))

    async def main() -> Any:
        async with task.open_environment(resolve({}), None) as environment:
            chat = Chat(TOKENIZER)
            return await collect(Scripted("3."), environment, chat, train[:1], group_size=1, sampling=SAMPLING, seed=0)

    (rollout,) = asyncio.run(main())[0].rollouts
    assert (rollout.result.status, rollout.result.error) == ("ok", "")
    assert rollout.reward.terms["court"] == 0.5
    assert rollout.completions == ["3."]


def test_code_of_the_policy_does_not_run_on_this_host() -> None:
    config = configured({"harness": {"id": "bash"}})
    with pytest.raises(UserError, match=r"the harness bash of agent would run what the policy writes on this machine"):
        task_of(config).load_problems(config)
    for agent in ({"harness": {"id": "null"}}, {"harness": {"id": "bash"}, "runtime": {"type": "docker"}}):
        assert task_of(configured(agent)).load_problems(configured(agent))


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("no_such_env", {}, "taskset 'no_such_env' not found"),
        ("verifiers_env", {"agent": {"max_turn": 3}}, "max_turn"),
        ("verifiers_env", {"id": "no-such-env"}, "environment 'no-such-env' not found"),
        ("json", {}, "exports no Taskset subclass"),
        ("linecache", {"taskset": {"rows": 1}}, "exports no Taskset subclass"),
    ],
)
def test_what_verifiers_cannot_load_is_one_sentence(name: str, arguments: dict[str, Any], sentence: str) -> None:
    keys = {"data.environment": f"verifiers:{name}", "data.environment_args": json.dumps(arguments)}
    with pytest.raises(UserError, match=f"the environment verifiers:{name} does not load: .*{sentence}"):
        task_of(resolve(keys)).load_problems(resolve(keys))


def test_no_key_of_the_user_s_goes_to_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    bearer: Callable[[Any], str] = endpoint._bearer
    monkeypatch.setenv("PRIME_API_KEY", "secret")
    monkeypatch.setattr(endpoint, "_bearer", lambda http: given.append(bearer(http)) or bearer(http))
    assert only(run("3.", size=1)).status == "ok"
    assert given == ["EMPTY"]


def test_a_harness_that_hangs_ends_by_its_deadline_and_the_next_batch_goes_on(
    monkeypatch: pytest.MonkeyPatch, sums: Any
) -> None:
    launch = sums.Calculator.launch

    async def sometimes(self: Any, *arguments: Any, **more: Any) -> Any:
        if len(ended) == 0:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)
        return await launch(self, *arguments, **more)

    ended: list[bool] = []
    monkeypatch.setattr(sums.Calculator, "launch", sometimes)
    task = task_of(configured())
    train, _ = task.load_problems(configured())

    async def main() -> list[Result]:
        async with task.open_environment(configured(), None) as environment:
            results = []
            for limit in (0.5, 20.0):
                sampling = replace(SAMPLING, execute_s=limit)
                engine, chat = Scripted("3."), Chat(TOKENIZER)
                groups = await collect(engine, environment, chat, train[:1], group_size=1, sampling=sampling, seed=0)
                results.append(groups[0].rollouts[0].result)
            return results

    late, good = asyncio.run(main())
    assert "act took longer than grpo.execute_s" in late.error
    assert (ended, good.status) == ([True], "ok")


def test_a_user_s_turns_are_appended_to_what_was_sampled(monkeypatch: pytest.MonkeyPatch, sums: Any) -> None:
    """Between them verifiers writes the conversation anew, from what it parsed."""
    from verifiers.v1.dialects.chat import message_to_wire

    launch = sums.Calculator.launch

    async def resumed(self: Any, ctx: Any, trace: Any, runtime: Any, at: Any, key: Any, urls: Any, data: Any) -> Any:
        said = data.prompt if isinstance(data.prompt, str) else [message_to_wire(each) for each in data.prompt]
        return await launch(self, ctx, trace, runtime, at, key, urls, data.model_copy(update={"prompt": said}))

    class Talk(vf.Env[vf.SingleAgentEnvConfig]):
        async def run(self, task: Any, agents: Any) -> None:
            async with agents.agent.interaction(task) as interaction:
                assert (await interaction.turn()).last_reply == "It is 3."
                assert (await interaction.turn("Are you sure?")).last_reply == "8"

    monkeypatch.setattr(sums.Calculator, "launch", resumed)
    monkeypatch.setattr(sums.Calculator, "SUPPORTS_RESUME", True)
    config = vf.resolve_env_config({"taskset": {"id": "verifiers_env"}, "agent": {"runtime": HERE}})
    task = environment_task(Talk(config), ())
    train, _ = task.load_problems(resolve({"data.held_out": 0}))
    train = [problem for problem in train if problem.task.data.answer == "8"]
    engine = Scripted(f"\n{CALL} ", " It is 3.\n", "8")

    async def main() -> Any:
        async with task.open_environment(resolve({}), None) as environment:
            return await collect(engine, environment, Chat(TOKENIZER), train, group_size=1, sampling=SAMPLING, seed=0)

    (rollout,) = asyncio.run(main())[0].rollouts
    assert (rollout.result.status, rollout.result.error) == ("ok", "")
    assert rollout.reward.terms["right"] == 1.0
    assert rollout.result.record == {"stop_condition": "user_closed", "turns": 3}
    assert rollout.branches == []
    written = [*split_apart(f"\n{CALL} "), *split_apart(" It is 3.\n"), *split_apart("8")]
    assert [t for t, m in zip(rollout.token_ids, rollout.loss_mask, strict=True) if m] == written


def test_the_engine_s_failure_is_the_run_s() -> None:
    class Broken(Scripted):
        def step(self) -> list[Any]:
            raise ZeroDivisionError("the engine")

    with pytest.raises(ZeroDivisionError, match="the engine"):
        run(engine=Broken("3."), size=1)
