"""Rollouts over a scripted engine: order, masks, rounds, seeds, failures. The real engine has its own tests."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fastgrpo.errors import UserError
from fastgrpo.rollout import Sampling, collect
from fastgrpo.tiny import train_tokenizer
from fastgrpo.types import RewardTerms

TOKENIZER = train_tokenizer(["solve this problem please", "feedback: try again", "abcdefgh"], 320)
SAMPLING = Sampling(max_new_tokens=8, max_model_len=200)


class ScriptedEngine:
    """Finishes one request a step, the last submitted first."""

    def __init__(self, on_step: Callable[[], None] = lambda: None) -> None:
        self.requests: list[tuple[int, list[int], dict]] = []
        self.seen: list[tuple[list[int], dict]] = []
        self.on_step = on_step
        self.aborted = False

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def submit(self, key: int, prompt_ids: list[int], **options) -> None:
        self.requests.append((key, list(prompt_ids), options))
        self.seen.append((list(prompt_ids), options))

    def step(self) -> list[SimpleNamespace]:
        self.on_step()
        key, _, _ = self.requests.pop()
        text = TOKENIZER.encode("abc")
        ids = [*text, TOKENIZER.eos_token_id]
        return [SimpleNamespace(key=key, token_ids=ids, logprobs=[-0.5] * len(ids), finish_reason="stop")]

    def abort_all(self) -> None:
        self.aborted = True
        self.requests.clear()


class ScriptedEnvironment:
    def __init__(self, statuses: dict[int, str] | None = None) -> None:
        self.executed: list[tuple[str, int]] = []
        self.statuses = statuses or {}

    def prompt(self, problem) -> str:
        return f"solve {problem.id}"

    async def execute(self, problem, completion: str, seed: int):
        self.executed.append((completion, seed))
        return SimpleNamespace(status=self.statuses.get(len(self.executed), "ok"))

    def feedback_text(self, execution) -> str:
        return "feedback: try again"

    def rewards(self, problem, executions):
        return [
            None
            if execution.status == "infrastructure"
            else RewardTerms(total=1.0, performance=1.0, complexity=0.0, diversity=0.0, format=0.0)
            for execution in executions
        ]


def problems(count: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(id=f"p{number}") for number in range(count)]


def gather(engine, environment, count=2, size=3, sampling=SAMPLING, seed=0):
    return asyncio.run(
        collect(engine, environment, TOKENIZER, problems(count), group_size=size, sampling=sampling, seed=seed)
    )


def test_groups_keep_the_order_of_the_problems_and_their_size() -> None:
    groups = gather(ScriptedEngine(), ScriptedEnvironment())
    assert [group.problem.id for group in groups] == ["p0", "p1"]
    assert all(len(group.rollouts) == 3 for group in groups)


def test_every_rollout_draws_from_a_seed_of_its_own_and_the_same_again() -> None:
    first, second, other = ScriptedEngine(), ScriptedEngine(), ScriptedEngine()
    gather(first, ScriptedEnvironment())
    gather(second, ScriptedEnvironment())
    gather(other, ScriptedEnvironment(), seed=1)
    seeds = [options["seed"] for _, options in first.seen]
    assert len(set(seeds)) == 6
    assert seeds == [options["seed"] for _, options in second.seen]
    assert not set(seeds) & {options["seed"] for _, options in other.seen}


def test_two_rounds_append_feedback_that_the_loss_does_not_see() -> None:
    engine, environment = ScriptedEngine(), ScriptedEnvironment()
    sampling = Sampling(max_new_tokens=8, max_model_len=200, rounds=2)
    rollout = gather(engine, environment, count=1, size=1, sampling=sampling)[0].rollouts[0]
    completion = [*TOKENIZER.encode("abc"), TOKENIZER.eos_token_id]
    feedback = TOKENIZER.encode("feedback: try again")
    prompt = TOKENIZER.encode("solve p0")
    assert rollout.token_ids == prompt + completion + feedback + completion
    assert rollout.loss_mask == [0] * len(prompt) + [1] * len(completion) + [0] * len(feedback) + [1] * len(completion)
    assert [p for p, m in zip(rollout.logprobs, rollout.loss_mask, strict=True) if not m] == [0.0] * (
        len(prompt) + len(feedback)
    )
    assert len(rollout.executions) == len(rollout.completions) == 2
    assert engine.seen[1][0] == prompt + completion + feedback


def test_an_infrastructure_failure_ends_the_rollout_without_a_reward() -> None:
    sampling = Sampling(max_new_tokens=8, max_model_len=200, rounds=2)
    group = gather(ScriptedEngine(), ScriptedEnvironment({1: "infrastructure"}), 1, 2, sampling)[0]
    assert sorted(rollout.infrastructure for rollout in group.rollouts) == [False, True]
    failed = next(rollout for rollout in group.rollouts if rollout.infrastructure)
    assert len(failed.executions) == 1


def test_execution_starts_while_other_completions_are_still_decoding() -> None:
    environment = ScriptedEnvironment()
    executed_at_step: list[int] = []
    gather(ScriptedEngine(lambda: executed_at_step.append(len(environment.executed))), environment, count=1, size=6)
    assert executed_at_step[-1] > 0


def test_an_engine_failure_is_raised_as_it_is_and_leaves_nothing_running() -> None:
    def fail() -> None:
        raise RuntimeError("device lost")

    engine = ScriptedEngine(fail)
    with pytest.raises(RuntimeError, match="device lost"):
        gather(engine, ScriptedEnvironment())
    assert engine.aborted


def test_a_prompt_that_cannot_fit_names_the_problem_and_the_settings() -> None:
    with pytest.raises(UserError, match=r"p0 has .* grpo.max_new_tokens = 8 .* engine.max_model_len = 9"):
        gather(ScriptedEngine(), ScriptedEnvironment(), sampling=Sampling(max_new_tokens=8, max_model_len=9))


def test_a_completion_that_never_comes_ends_at_its_deadline() -> None:
    class Stuck(ScriptedEngine):
        def step(self):
            return []

    with pytest.raises(TimeoutError):
        gather(Stuck(), ScriptedEnvironment(), sampling=Sampling(max_new_tokens=8, max_model_len=200, deadline_s=0.2))


def test_cancelling_a_collection_aborts_the_engine() -> None:
    engine = ScriptedEngine()
    engine.step = lambda: []  # type: ignore[method-assign]

    async def cancelled() -> None:
        task = asyncio.create_task(
            collect(engine, ScriptedEnvironment(), TOKENIZER, problems(2), group_size=2, sampling=SAMPLING, seed=0)
        )
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert engine.aborted
    assert not engine.busy
