"""Rollouts over a scripted engine: order, masks, rounds, seeds, failures. The real engine has its own tests."""

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastgrpo.config_keys import resolve
from fastgrpo.engine.completion import Completion
from fastgrpo.errors import UserError
from fastgrpo.policy.chat import Chat
from fastgrpo.policy.demo_policy import train_tokenizer
from fastgrpo.record.log import RunLog
from fastgrpo.rollouts.asking import ask
from fastgrpo.rollouts.environment import checked_results
from fastgrpo.rollouts.generator import open_generator
from fastgrpo.rollouts.prompts import prompts_fit
from fastgrpo.rollouts.rollouts import Rollouts, collect
from fastgrpo.training.schedule import update_beside
from fastgrpo.types import Result, Reward, Sampling
from tests.helpers.chat_model import chat_tokenizer

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

    def step(self) -> list[Completion]:
        self.on_step()
        key, _, _ = self.requests.pop()
        text = TOKENIZER.encode("abc")
        ids = [*text, TOKENIZER.eos_token_id]
        return [Completion(key, ids, [-0.5] * len(ids), "stop", [3] * len(ids))]

    def settle(self) -> list[Completion]:
        return []

    def abort(self, keys: list[int]) -> None:
        self.requests = [request for request in self.requests if request[0] not in keys]

    def abort_all(self) -> None:
        self.aborted = True
        self.requests.clear()


class ScriptedEnvironment:
    """Rewards each rollout with 1; the executions whose numbers, from 1, are in `failures` do what is there."""

    def __init__(self, failures: dict[int, Callable[[], Awaitable[None]]] | None = None) -> None:
        self.executed: list[tuple[str, int]] = []
        self.failures = failures or {}

    def prompt(self, problem) -> str:
        return f"solve {problem.id}"

    async def execute(self, problem, completion: str, seed: int) -> int:
        self.executed.append((completion, seed))
        number = len(self.executed)
        if number in self.failures:
            await self.failures[number]()
        return number

    def feedback_text(self, execution: int) -> str:
        return "feedback: try again"

    def results(self, problem, rollouts):
        return [Result(reward=Reward(total=1.0), metrics={"rounds": len(r.executions)}) for r in rollouts]


async def raises() -> None:
    raise ZeroDivisionError("a reward divides by zero")


async def hangs() -> None:
    await asyncio.Event().wait()


def problems(count: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(id=f"p{number}") for number in range(count)]


def gather(engine, environment, count=2, size=3, sampling=SAMPLING, seed=0):
    return asyncio.run(
        collect(engine, environment, Chat(TOKENIZER), problems(count), group_size=size, sampling=sampling, seed=seed)
    )


def test_groups_keep_the_order_of_the_problems_and_their_size() -> None:
    groups = gather(ScriptedEngine(), ScriptedEnvironment())
    assert [group.problem.id for group in groups] == ["p0", "p1"]
    assert all(len(group.rollouts) == 3 for group in groups)


def test_a_paired_group_is_written_with_several_seeds_and_executed_with_one() -> None:
    async def seeds(paired: bool) -> tuple[set[int], list[int]]:
        engine, environment = ScriptedEngine(), ScriptedEnvironment()
        async with open_generator(engine) as generator:
            options = {"group_size": 3, "sampling": SAMPLING, "seed": 0, "paired": paired}
            await Rollouts(generator, environment, Chat(TOKENIZER), problems(2), **options).groups()
        return {options["seed"] for _, options in engine.seen}, [seed for _, seed in environment.executed]

    written, executed = asyncio.run(seeds(paired=True))
    assert len(written) == 6
    assert sorted(Counter(executed).values()) == [3, 3]
    again, apart = asyncio.run(seeds(paired=False))
    assert again == written == set(apart)


def test_every_rollout_draws_from_a_seed_of_its_own_and_the_same_again() -> None:
    first, second, other = ScriptedEngine(), ScriptedEngine(), ScriptedEngine()
    gather(first, ScriptedEnvironment())
    gather(second, ScriptedEnvironment())
    gather(other, ScriptedEnvironment(), seed=1)
    seeds = [options["seed"] for _, options in first.seen]
    assert len(set(seeds)) == 6
    assert seeds == [options["seed"] for _, options in second.seen]
    assert not set(seeds) & {options["seed"] for _, options in other.seen}


def test_ranks_draw_what_one_rank_with_all_problems_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds(rank: int, world: int) -> list[int]:
        monkeypatch.setattr("fastgrpo.rollouts.rollouts.rank_and_world", lambda: (rank, world))
        engine = ScriptedEngine()
        gather(engine, ScriptedEnvironment(), count=4 // world, size=1)
        return [options["seed"] for _, options in engine.seen]

    alone = seeds(0, 1)
    assert seeds(0, 2) == alone[0::2]
    assert seeds(1, 2) == alone[1::2]


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
    assert rollout.result.metrics == {"rounds": 2.0}
    assert len(rollout.completions) == 2
    assert engine.seen[1][0] == prompt + completion + feedback


def test_experts_of_tokens_are_kept_where_they_are_replayed() -> None:
    class Telling(ScriptedEngine):
        def step(self) -> list[Completion]:
            return [replace(one, routes=np.zeros((1, 2, 1), np.int8)) for one in super().step()]

    for wanted in (False, True):
        sampling = Sampling.of(resolve({"grpo.routing_replay": wanted, "grpo.max_new_tokens": 8}))
        (group,) = gather(Telling(), ScriptedEnvironment(), 1, 1, sampling)
        assert (group.rollouts[0].routes is not None) == wanted


def test_how_a_run_samples_reaches_the_engine() -> None:
    keys = {"grpo.temperature": 0.7, "grpo.top_p": 0.9, "grpo.top_k": 20, "grpo.min_p": 0.05, "grpo.stop": "\n\n"}
    keys |= {"grpo.max_new_tokens": 8, "engine.max_model_len": 200}
    engine = ScriptedEngine()
    gather(engine, ScriptedEnvironment(), 1, 1, Sampling.of(resolve(keys)))
    ((_, options),) = engine.seen
    assert {name: options[name] for name in ("temperature", "top_p", "top_k", "min_p", "stop")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "stop": ("\n\n",),
    }


def test_plain_feedback_has_no_thread_and_a_coroutine_is_awaited() -> None:
    threads = []

    class Plain(ScriptedEnvironment):
        def feedback_text(self, execution: int) -> None:
            threads.append(threading.current_thread())

    class Waiting(ScriptedEnvironment):
        async def feedback_text(self, execution: int) -> str:
            await asyncio.sleep(0)
            return "feedback: try again"

    class Failing(ScriptedEnvironment):
        def feedback_text(self, execution: int) -> str:
            raise ZeroDivisionError("feedback divides by zero")

    sampling = Sampling(max_new_tokens=8, max_model_len=200, rounds=2)
    rounds, reasons = [], []
    for environment in (Plain(), Waiting(), Failing()):
        (rollout,) = gather(ScriptedEngine(), environment, 1, 1, sampling)[0].rollouts
        rounds.append(len(rollout.executions))
        reasons.append(rollout.result.error)
    assert threads == [threading.main_thread()]
    assert rounds == [1, 2, 1]
    line = f"test_rollouts.py:{Failing.feedback_text.__code__.co_firstlineno + 1}"
    assert reasons == ["", "", f"problem p0: feedback_text raised ZeroDivisionError: feedback divides by zero ({line})"]


def test_each_plain_execution_has_a_working_directory_of_its_own(tmp_path: Path) -> None:
    """As of programs that are run where their files are; the run's own paths are relative."""
    before, together = Path.cwd(), threading.Barrier(3)

    class Moving(ScriptedEnvironment):
        def execute(self, problem, completion: str, seed: int) -> str:  # type: ignore[override]
            begun, own = Path.cwd(), tmp_path / str(threading.get_ident())
            own.mkdir()
            os.chdir(own)
            together.wait(10)
            return "" if (begun, Path.cwd()) == (before, own) else f"began in {begun}, is in {Path.cwd()} and not {own}"

    rollouts = gather(ScriptedEngine(), Moving(), 1, 3)[0].rollouts
    assert [rollout.executions for rollout in rollouts] == [[""]] * 3
    assert Path.cwd() == before


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (raises, "problem p0: execute raised ZeroDivisionError: a reward divides by zero"),
        (hangs, "took longer than grpo.exec"),
    ],
)
def test_an_environment_that_fails_once_costs_one_rollout(failure, reason: str) -> None:
    sampling = Sampling(max_new_tokens=8, max_model_len=200, rounds=2, execute_s=2)
    group = gather(ScriptedEngine(), ScriptedEnvironment({1: failure}), 1, 3, sampling)[0]
    assert sorted(rollout.reward is None for rollout in group.rollouts) == [False, False, True]
    failed = next(rollout for rollout in group.rollouts if rollout.reward is None)
    assert failed.result.status == "infrastructure"
    assert reason in failed.result.error
    assert len(failed.completions) == 1


@pytest.mark.parametrize("plain", [False, True])
def test_results_that_hang_cost_their_group(plain: bool) -> None:
    environment, over = ScriptedEnvironment(), threading.Event()

    async def waiting(problem, rollouts):
        await asyncio.sleep(60)

    environment.results = (lambda problem, rollouts: over.wait(60)) if plain else waiting  # type: ignore
    environment.results.__name__ = "results"
    sampling = Sampling(max_new_tokens=8, max_model_len=200, execute_s=0.3)
    (group,) = gather(ScriptedEngine(), environment, 1, 2, sampling)
    over.set()
    assert [each.result.error for each in group.rollouts] == [
        "problem p0: results took longer than grpo.execute_s = 0.3 s"
    ] * 2


def test_an_execution_that_ignores_its_cancellation_is_left_behind_by_its_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def ignores() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    monkeypatch.setattr("fastgrpo.rollouts.asking.TIDY_S", 0.1)
    sampling, begun = Sampling(max_new_tokens=8, max_model_len=200, execute_s=2), time.monotonic()
    group = gather(ScriptedEngine(), ScriptedEnvironment({1: ignores, 2: ignores}), 1, 3, sampling)[0]
    assert time.monotonic() - begun < 50
    assert [rollout.result.error for rollout in group.rollouts if rollout.reward is None] == [
        "problem p0: execute took longer than grpo.execute_s = 2 s"
    ] * 2
    assert caplog.messages == [
        "the environment's execute goes on though it was cancelled, and is left behind: let CancelledError pass"
    ]


@pytest.mark.parametrize("ignores", [False, True])
def test_what_tidies_up_while_it_is_cancelled_again_is_not_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ignores: bool
) -> None:
    """Its jail ends: the owner of the rollouts cancels them, and so does the end of the loop."""
    monkeypatch.setattr("fastgrpo.rollouts.asking.TIDY_S", 0.2 if ignores else 30.0)

    async def main() -> bool:
        asked, ended = asyncio.Event(), asyncio.Event()

        async def execute() -> None:
            asked.set()
            try:
                await asyncio.sleep(60)
            finally:
                await (asyncio.sleep(60) if ignores else ended.wait())

        rollout = asyncio.create_task(ask(execute, clock=asyncio.timeout(60)))
        await asked.wait()
        for _ in range(3):
            rollout.cancel()
            await asyncio.sleep(0.01)
        ended.set()
        done, _ = await asyncio.wait([rollout], timeout=10)
        return rollout in done and rollout.cancelled()

    assert asyncio.run(main())
    assert bool(caplog.messages) == ignores


def test_a_straggler_is_left_out_so_that_its_step_goes_on() -> None:
    sampling = Sampling(max_new_tokens=8, max_model_len=200, straggler_s=0.1)
    group = gather(ScriptedEngine(), ScriptedEnvironment({2: hangs}), 1, 3, sampling)[0]
    reasons = [rollout.result.error for rollout in group.rollouts if rollout.reward is None]
    assert reasons == ["problem p0: execute still ran grpo.straggler_s = 0.1 s after the step's last completion"]


def test_stragglers_are_left_out_beside_one_that_its_own_deadline_ends_just_then() -> None:
    """That one is cancelled and tidies up: its clock can be set no more."""

    async def main() -> list[str]:
        async def tidies_up() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                rollouts._drop_stragglers()

        async with open_generator(ScriptedEngine(lambda: time.sleep(0.05))) as generator:
            environment = ScriptedEnvironment({1: tidies_up, 2: hangs, 3: hangs})
            options = {"group_size": 3, "sampling": replace(SAMPLING, execute_s=0.5), "seed": 0}
            rollouts = Rollouts(generator, environment, Chat(TOKENIZER), problems(1), **options)
            (group,) = await asyncio.wait_for(rollouts.groups(), 10)
            return [rollout.result.error for rollout in group.rollouts]

    assert all("execute still ran" in reason for reason in asyncio.run(main()))


@pytest.mark.parametrize("answers", [True, False])
def test_the_tail_after_the_last_answer_is_told_where_somebody_was_asked(answers: bool) -> None:
    rollouts = asking(answers=answers)
    assert rollouts.waited[0] >= 0.4
    if answers:
        assert 0.1 <= rollouts.after_answers <= rollouts.waited[0] - 0.25
    else:
        assert rollouts.after_answers is None


def test_a_straggler_that_is_left_out_is_no_tail_after_the_last_answer() -> None:
    rollouts = asking(late={"p1": 60.0}, straggler_s=2.0)
    assert rollouts.waited[0] >= 2.0
    assert (rollouts.waited[1], rollouts.stragglers) == ("p1", 3)
    assert 0.1 <= rollouts.after_answers <= 1.4


def asking(*, answers: bool = True, late: dict[str, float] | None = None, straggler_s: float = 0) -> Rollouts:
    """Rollouts of two problems, ended, each with an answer after 0.3 s, or after those of `late`."""

    class Asking(ScriptedEnvironment):
        async def execute(self, problem, completion: str, seed: int) -> float:  # type: ignore[override]
            await asyncio.sleep((late or {}).get(problem.id, 0.3))
            answered = time.perf_counter()
            await asyncio.sleep(0.1)
            return answered

        def results(self, problem, rollouts):
            at = [rollout.executions[-1] if answers else None for rollout in rollouts]
            return [Result(reward=Reward(total=1.0), answered_at=when) for when in at]

    async def ended() -> Rollouts:
        async with open_generator(ScriptedEngine()) as generator:
            drawn = replace(SAMPLING, straggler_s=straggler_s)
            options = {"group_size": 3, "sampling": drawn, "seed": 0}
            rollouts = Rollouts(generator, Asking(), Chat(TOKENIZER), problems(2), **options)
            await rollouts.groups()
            return rollouts

    return asyncio.run(ended())


def test_a_plain_function_that_blocks_leaves_decoding_alone() -> None:
    """Each of six executions waits until the engine has decoded all others, which a blocked loop would prevent."""
    decoded, left = threading.Event(), iter(range(5, -1, -1))
    engine = ScriptedEngine(lambda: decoded.set() if next(left) == 0 else None)

    class Blocking(ScriptedEnvironment):
        def execute(self, problem, completion: str, seed: int) -> int:  # type: ignore[override]
            assert decoded.wait(timeout=20)
            return 1

    group = gather(engine, Blocking(), count=1, size=6)[0]
    assert [rollout.result.status for rollout in group.rollouts] == ["ok"] * 6


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ([Result(reward=Reward(total=1.0))], "one Result for each of 3 rollouts, got 1 values"),
        (None, "got NoneType"),
        ([1.0] * 3, "fastgrpo.types.Result objects, got float"),
        ([Result(reward=Reward(total=float("nan")))] * 3, "the reward must be finite, got nan"),
        ([Result(reward=Reward(total="high"))] * 3, "the reward must be a number, got 'high'"),
        ([Result(reward=Reward(total=1.0, terms={"a": None}))] * 3, "the reward's term 'a' must be a number"),
        ([Result(reward=Reward(total=1.0, weights={"a": -1.0}))] * 3, "the reward's weight 'a' must be 0 or more"),
        ([Result()] * 3, "a result of status 'ok' has no reward"),
        ([Result(reward=1.0)] * 3, "a Result's reward is a fastgrpo.types.Reward, as Reward(total=1.0), got 1.0"),
        ([Result(reward=Reward(total=1.0), metrics=[1])] * 3, "the metrics must be a dict, got list"),
        ([Result(reward=Reward(total=1.0), record={"a": "\ud800"})] * 3, "a Result has a field that cannot be read"),
        ([Result(reward=Reward(total=1.0), record={"a": 10**30})] * 3, "a Result has a field that cannot be read"),
        ([Result(reward=Reward(total=1.0), record=[1])] * 3, "a Result's record must be a dict, got list"),
        ([Result(reward=Reward(total=1.0), metrics={3: 1.0})] * 3, "the metric 3 needs a text as its name"),
        ([Result(reward=Reward(total=1.0), answered_at="now")] * 3, "answered_at must be a number, got 'now'"),
        ([Result(reward=Reward(total=1e30))] * 3, "the reward must be at most 1e+15, either way, got 1e+30"),
    ],
)
def test_what_is_no_result_costs_its_group_and_says_why(returned, reason: str) -> None:
    environment = ScriptedEnvironment()
    environment.results = lambda problem, rollouts: returned  # type: ignore[method-assign]
    group = gather(ScriptedEngine(), environment, count=1)[0]
    assert all(rollout.reward is None and reason in rollout.result.error for rollout in group.rollouts)


def test_results_become_plain_data_whatever_they_hold() -> None:
    record = {"seen": {1}, "at": SimpleNamespace(a=1), 3: (1, 2)}
    given = Result(status=7, reward=Reward(total=np.float32(1)), record=record, error=ValueError("a"))  # type: ignore[arg-type]
    (result,) = checked_results([given], 1)
    assert (result.status, result.error, result.reward) == ("7", "a", Reward(total=1.0))
    assert result.record == {"seen": [1], "at": "namespace(a=1)", "3": [1, 2]}


@pytest.mark.parametrize("prompt", [None, 5, [], [{"role": "user"}], [{"role": "user", "content": 5}], ["hi"]], ids=str)
def test_a_prompt_that_is_none_is_named_before_the_first_step(prompt) -> None:
    with pytest.raises(UserError, match=r"prompt must give a text, or messages with role and content, and gave .* p0"):
        prompts_fit([SimpleNamespace(id="p0")], lambda problem: prompt, Chat(TOKENIZER), SAMPLING)


def test_a_prompt_that_raises_or_is_empty_is_one_sentence() -> None:
    problems = [SimpleNamespace(id="p0", prompt=""), SimpleNamespace(id="p1", prompt="hi")]
    with pytest.raises(UserError, match=r"prompt raised AttributeError for the problem p0"):
        prompts_fit(problems, lambda problem: problem.text, Chat(TOKENIZER), SAMPLING)
    with pytest.raises(UserError, match=r"the prompt of the problem p0 is empty, .*: give it some text"):
        prompts_fit(problems[::-1], lambda problem: problem.prompt, Chat(TOKENIZER), SAMPLING)


def test_a_prompt_that_the_chat_template_refuses_is_named() -> None:
    tokenizer = chat_tokenizer()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    problems = [SimpleNamespace(id="p0", prompt="hi"), SimpleNamespace(id="p1", prompt=turns)]
    with pytest.raises(UserError, match=r"problem p1: .*fails: No system role; check .* the prompt's messages"):
        prompts_fit(problems, attrgetter("prompt"), Chat(tokenizer), SAMPLING)


def test_feedback_that_is_no_text_costs_its_rollout() -> None:
    environment = ScriptedEnvironment()
    environment.feedback_text = lambda execution: 5  # type: ignore[method-assign,assignment,return-value]
    sampling = Sampling(max_new_tokens=8, max_model_len=200, rounds=2)
    (rollout,) = gather(ScriptedEngine(), environment, 1, 1, sampling)[0].rollouts
    assert rollout.result.error == "problem p0: feedback_text must return a text or None, got int"


def test_rewards_of_any_number_type_become_floats() -> None:
    environment = ScriptedEnvironment()
    totals = [True, Fraction(2), np.float32(0.5)]
    environment.results = lambda problem, rollouts: [Result(reward=Reward(total=t)) for t in totals]  # type: ignore
    group = gather(ScriptedEngine(), environment, count=1)[0]
    assert [rollout.reward.total for rollout in group.rollouts] == [1.0, 2.0, 0.5]
    assert all(type(rollout.reward.total) is float for rollout in group.rollouts)


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


def test_texts_that_a_template_was_applied_to_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """TRL leaves a text as it is; here it is what the user says."""
    prompts = ["<|im_start|>user\nHi<|im_end|>\n", "Hi", [{"role": "user", "content": "Hi"}]]
    problems = [SimpleNamespace(id="p", prompt=prompt) for prompt in prompts]
    prompt = attrgetter("prompt")
    assert all(prompts_fit(problems, prompt, Chat(chat_tokenizer()), SAMPLING))
    assert "1 of 3 prompts are texts with the chat template's marks in them" in caplog.text
    caplog.clear()
    prompts_fit(problems[1:], prompt, Chat(chat_tokenizer()), SAMPLING)
    assert not caplog.text


def test_prompts_that_leave_no_room_are_found_before_a_step_draws_them() -> None:
    named = [SimpleNamespace(id="p"), SimpleNamespace(id="p" * 90)]
    prompt, sampling = ScriptedEnvironment().prompt, Sampling(max_new_tokens=8, max_model_len=40)
    fits = prompts_fit(named, prompt, Chat(TOKENIZER), sampling)
    assert fits == [True, False]
    with pytest.raises(UserError, match=r"no prompt fits: .* engine.max_model_len = 9 less grpo.max_new_tokens = 8"):
        prompts_fit(named, prompt, Chat(TOKENIZER), Sampling(max_new_tokens=8, max_model_len=9))


def test_a_completion_that_never_comes_ends_at_its_deadline() -> None:
    class Stuck(ScriptedEngine):
        def step(self):
            return []

    with pytest.raises(UserError, match=r"not there after engine\.completion_timeout_s = 0\.2 s.*: raise it"):
        gather(Stuck(), ScriptedEnvironment(), sampling=Sampling(max_new_tokens=8, max_model_len=200, deadline_s=0.2))


def test_cancelling_a_collection_aborts_the_engine() -> None:
    engine = ScriptedEngine()
    engine.step = lambda: []  # type: ignore[method-assign]

    async def cancelled() -> None:
        task = asyncio.create_task(
            collect(
                engine, ScriptedEnvironment(), Chat(TOKENIZER), problems(2), group_size=2, sampling=SAMPLING, seed=0
            )
        )
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert engine.aborted
    assert not engine.busy


def test_a_cancelled_wait_frees_its_place_in_the_engine() -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        engine.step = lambda: []  # type: ignore[method-assign]
        async with open_generator(engine) as generator:
            waits = [asyncio.create_task(generator.complete([1], deadline_s=10, seed=0)) for _ in range(2)]
            await asyncio.sleep(0.05)
            waits[0].cancel()
            await asyncio.sleep(0.05)
            assert [key for key, _, _ in engine.requests] == [1]
            waits[1].cancel()
            await asyncio.sleep(0.05)
            assert not engine.busy

    asyncio.run(main())


class PatientEnvironment(ScriptedEnvironment):
    """Executions end when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def execute(self, problem, completion: str, seed: int):
        await self.go.wait()
        return await super().execute(problem, completion, seed)


@asynccontextmanager
async def under_way(engine, environment, *, rounds: int = 1):
    chat, sampling = Chat(TOKENIZER), replace(SAMPLING, rounds=rounds)
    async with open_generator(engine) as generator:
        rollouts = Rollouts(generator, environment, chat, problems(2), group_size=2, sampling=sampling, seed=0)
        yield rollouts
        await rollouts.cancel()


def test_the_engine_is_free_before_the_last_workflow_ends() -> None:
    async def main() -> None:
        environment, engine = PatientEnvironment(), ScriptedEngine()
        async with under_way(engine, environment) as rollouts:
            await asyncio.wait_for(rollouts.generated(), 10)
            assert not engine.busy
            assert not environment.executed
            assert rollouts.seconds > 0
            environment.go.set()
            assert len(await rollouts.groups()) == 2

    asyncio.run(main())


def test_the_engine_is_not_free_while_another_round_may_come() -> None:
    async def main() -> None:
        environment, engine = PatientEnvironment(), ScriptedEngine()
        async with under_way(engine, environment, rounds=2) as rollouts:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(rollouts.generated(), 0.3)
            environment.go.set()
            await asyncio.wait_for(rollouts.generated(), 10)
            assert len(engine.seen) == 8

    asyncio.run(main())


class FakeLearner:
    """Notes whether the engine was busy when its weights changed."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.busy_at_step: list[bool] = []

    def update(self, timer, before_step) -> dict[str, float]:
        before_step()
        self.busy_at_step.append(self.engine.busy)
        return {"loss": 1.0}


def test_weights_change_when_the_engine_is_free_and_workflows_still_run() -> None:
    async def main() -> None:
        environment, engine = PatientEnvironment(), ScriptedEngine(lambda: time.sleep(0.02))
        learner = FakeLearner(engine)
        async with under_way(engine, environment) as rollouts:
            metrics = await asyncio.wait_for(update_beside(rollouts.generated, learner, RunLog(None)), 10)
        assert metrics == {"loss": 1.0}
        assert learner.busy_at_step == [False]
        assert len(engine.seen) == 4
        assert not environment.executed

    asyncio.run(main())


def test_an_interrupted_update_leaves_the_weights_as_they_were() -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        engine.step = lambda: []  # type: ignore[method-assign]
        learner = FakeLearner(engine)
        async with under_way(engine, ScriptedEnvironment()) as rollouts:
            task = asyncio.create_task(update_beside(rollouts.generated, learner, RunLog(None)))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 10)
        assert learner.busy_at_step == []

    asyncio.run(main())


def test_an_update_that_is_made_is_told_before_an_interrupt_goes_on() -> None:
    """The step's line is written: a resumed run begins behind it."""
    changing = threading.Event()

    class Slow(FakeLearner):
        def update(self, timer, before_step) -> dict[str, float]:
            before_step()
            changing.set()
            time.sleep(0.2)
            return {"loss": 1.0}

    async def main() -> None:
        told: list[dict[str, float]] = []

        async def free() -> None:
            pass

        async def step() -> None:
            told.append(await update_beside(free, Slow(None), RunLog(None)))
            await asyncio.sleep(60)

        task = asyncio.create_task(step())
        while not changing.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        assert told == [{"loss": 1.0}]

    asyncio.run(main())


def test_an_update_of_no_sample_is_told_before_an_interrupt_goes_on_and_the_engine_is_free_then() -> None:
    """Nothing in it waits for the engine, which the sync after it takes for idle."""

    class Empty(FakeLearner):
        def update(self, timer, before_step) -> dict[str, float]:
            updated.set()
            return {"samples": 0.0}

    updated, go, told = threading.Event(), threading.Event(), list[tuple[dict[str, float], bool]]()

    async def main() -> None:
        engine = ScriptedEngine(lambda: go.wait(10))
        async with under_way(engine, ScriptedEnvironment()) as rollouts:

            async def step() -> None:
                metrics = await update_beside(rollouts.generated, Empty(engine), RunLog(None))
                told.append((metrics, engine.busy))
                await asyncio.sleep(60)

            task = asyncio.create_task(step())
            while not (updated.is_set() and engine.busy):
                await asyncio.sleep(0.001)
            task.cancel()
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 10)
        assert told == [({"samples": 0.0}, False)]

    asyncio.run(main())


@pytest.mark.parametrize("empty", [False, True])
def test_what_an_update_waits_for_the_engine_is_generation(empty: bool) -> None:
    """Of one of no sample it was training."""
    log, begun = RunLog(None), threading.Event()

    class Learner(FakeLearner):
        def update(self, timer, before_step) -> dict[str, float]:
            begun.set()
            return {} if empty else super().update(timer, before_step)

    async def free() -> None:
        assert begun.is_set()
        await asyncio.sleep(0.2)

    async def main() -> None:
        with log.phase("train"):
            await update_beside(free, Learner(SimpleNamespace(busy=False)), log)

    asyncio.run(main())
    assert log.timer.spent("generate") > 0.1


def test_an_engine_failure_during_the_update_is_the_error_that_ends_it() -> None:
    async def main() -> None:
        def fail() -> None:
            raise RuntimeError("device lost")

        engine = ScriptedEngine(fail)
        async with under_way(engine, ScriptedEnvironment()) as rollouts:
            with pytest.raises(RuntimeError, match="device lost"):
                await asyncio.wait_for(update_beside(rollouts.generated, FakeLearner(engine), RunLog(None)), 10)

    asyncio.run(main())


def test_a_paused_engine_makes_no_step_and_loses_no_request() -> None:
    async def main() -> None:
        steps: list[bool] = []
        engine = ScriptedEngine(lambda: (steps.append(True), time.sleep(0.02))[0])
        async with open_generator(engine) as generator:
            rollouts = Rollouts(
                generator, ScriptedEnvironment(), Chat(TOKENIZER), problems(2), group_size=2, sampling=SAMPLING, seed=0
            )
            await asyncio.sleep(0.03)
            await generator.pause()
            made = len(steps)
            assert generator.paused
            assert engine.busy
            await asyncio.sleep(0.1)
            assert len(steps) == made < 4
            generator.resume()
            (one, other) = await asyncio.wait_for(rollouts.groups(), 10)
            assert len(steps) == 4
            assert one.rollouts[0].versions == [3 * mask for mask in one.rollouts[0].loss_mask]
            assert len(other.rollouts) == 2

    asyncio.run(main())


def test_who_asks_an_engine_that_has_failed_is_told_at_once() -> None:
    """As a rollout that was executing when it failed, and has another round to write."""

    def fail() -> None:
        raise RuntimeError("device lost")

    async def main() -> None:
        async with open_generator(ScriptedEngine(fail)) as generator:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="device lost"):
                    await asyncio.wait_for(generator.complete([1], deadline_s=60, seed=0), 5)

    asyncio.run(main())


def test_what_finished_as_the_engine_settled_is_not_lost_with_a_cancelled_pause() -> None:
    class Settling(ScriptedEngine):
        settling = threading.Event()

        def step(self) -> list[Completion]:
            time.sleep(0.01)
            return []

        def settle(self) -> list[Completion]:
            self.settling.set()
            time.sleep(0.1)
            return super().step() if self.busy else []

    async def main() -> None:
        engine = Settling()
        async with open_generator(engine) as generator:
            waiting = asyncio.create_task(generator.complete([1], deadline_s=60, seed=0))
            while not engine.busy:
                await asyncio.sleep(0.01)
            pause = asyncio.create_task(generator.pause())
            while not engine.settling.is_set():
                await asyncio.sleep(0.01)
            pause.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pause
            assert not generator.paused
            assert (await asyncio.wait_for(waiting, 5)).finish_reason == "stop"
            # As the checkpoint that an interrupt leaves after one that it came into.
            await asyncio.wait_for(generator.pause(), 5)
            generator.resume()

    asyncio.run(main())
