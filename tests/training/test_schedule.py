"""Dynamic sampling over a scripted engine: groups without variance are replaced, up to a budget, and the same again."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgrpo import train as programs
from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.policy.chat import Chat
from fastgrpo.record.log import RunLog
from fastgrpo.rollouts.environment import at_step
from fastgrpo.rollouts.experience import Experience, Tally, from_bytes
from fastgrpo.rollouts.generator import open_generator
from fastgrpo.training import schedule as schedules
from fastgrpo.training.checkpoint import Checkpoints
from fastgrpo.training.curriculum import Curriculum, draw_problems
from fastgrpo.training.learner import EXPERIENCE, Learner
from fastgrpo.training.schedule import Schedule, open_schedule
from fastgrpo.types import Result, Reward
from tests.rollouts.test_rollouts import TOKENIZER, ScriptedEngine, ScriptedEnvironment, problems


class Environment(ScriptedEnvironment):
    """A group varies where its problem's number is in `varied`."""

    def __init__(self, varied: set[int]) -> None:
        super().__init__()
        self.varied = varied

    def results(self, problem, rollouts):
        varies = int(problem.id[1:]) in self.varied
        return [Result(reward=Reward(total=float(varies and i == 0))) for i in range(len(rollouts))]


def configuration(**grpo: object) -> Config:
    keys = {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 8, "refill": 3} | grpo
    return resolve({f"grpo.{name}": value for name, value in keys.items()} | {"engine.max_model_len": 200})


def experience(
    config: Config, varied: set[int], step: int = 0, environment: ScriptedEnvironment | None = None
) -> Experience:
    async def main() -> Experience:
        learner = SimpleNamespace(step=step, experiences=[], chat=Chat(TOKENIZER))
        draw = partial(draw_problems, problems(40), config)
        async with open_generator(ScriptedEngine()) as generator:
            schedule = Schedule(generator, learner, environment or Environment(varied), draw, config)
            await schedule.generated()
            return await asyncio.wait_for(schedule.experience(), 60)

    return asyncio.run(main())


def ids(found: Experience) -> list[str]:
    """The problem of each group."""
    return [record["problem_id"] for record in found.records[::2]]


def test_groups_without_variance_are_replaced_by_as_many_further_ones() -> None:
    config = configuration()
    numbers = [int(p.id[1:]) for p in draw_problems(problems(40), config, 0)]
    further = [[int(p.id[1:]) for p in draw_problems(problems(40), config, 0, extra)] for extra in (1, 2, 3)]
    # Two of the first four vary, one of the first batch's two, and the second batch's one.
    found = experience(config, {*numbers[:2], further[0][0], further[1][0]})
    assert ids(found) == [f"p{number}" for number in [*numbers, *further[0][:2], further[1][0]]]
    assert found.tally.sums["groups_refilled"] == 3
    assert found.tally.sums["rollouts"] == 14
    assert sorted(sample.advantage for sample in found.samples) == pytest.approx([-0.7071] * 4 + [0.7071] * 4, abs=1e-3)


class Traded(Environment):
    """Where a problem varies, two functions' terms do whose sum is the same."""

    def results(self, problem, rollouts):
        earned = [result.reward.total for result in super().results(problem, rollouts)]
        terms = [{"right": one, "short": 1 - one} for one in earned]
        return [Result(reward=Reward(total=1.0, terms=each, weights={"right": 1.0, "short": 0.5})) for each in terms]


def test_groups_that_vary_by_a_term_alone_are_kept() -> None:
    numbers = [int(p.id[1:]) for p in draw_problems(problems(40), configuration(), 0)]
    config = configuration(reward_scale="terms")
    found = experience(config, set(numbers), environment=Traded(set(numbers)))
    assert (found.tally.sums["groups_refilled"], len(found.samples)) == (0, 8)
    assert found.tally.values()["groups_without_variance"] == 0


@pytest.mark.parametrize("refill", [0, 1, 3])
def test_the_budget_bounds_what_a_step_without_any_variance_samples(refill: int) -> None:
    found = experience(configuration(refill=refill, loss="dr_grpo"), set())
    assert len(ids(found)) == 4 * (1 + refill)
    assert len(found.samples) == (0 if refill else 8)


def test_a_full_step_samples_nothing_further() -> None:
    assert len(ids(experience(configuration(), set(range(40))))) == 4


def test_a_resumed_step_refills_with_the_same_problems_and_other_steps_with_others() -> None:
    config = configuration()
    assert ids(experience(config, set(), step=5)) == ids(experience(config, set(), step=5))
    drawn = [draw_problems(list(range(40)), config, step, extra) for step in range(3) for extra in (1, 2, 3)]
    assert len({number for batch in drawn for number in batch}) == 36


def test_a_replica_replaces_its_own_groups_in_rounds_that_all_ranks_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def gathered(value: int, what: str) -> list[int]:
        asked.append(value)
        return [value, 2]

    monkeypatch.setattr(schedules, "gather_all", gathered)
    assert len(ids(experience(configuration(), set(range(40))))) == 4
    assert asked == [0, 0, 0]


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.own = self


def test_collections_beside_the_loop_look_through_what_came_since_and_nothing_else() -> None:
    learner = SimpleNamespace(engine=ScriptedEngine(), experiences=[], chat=Chat(TOKENIZER))

    async def main() -> tuple[int, int]:
        before = len(gc.get_objects())
        async with open_schedule(learner, Environment(set()), lambda step, extra: [], configuration()):
            inside, lost = len(gc.get_objects()), weakref.ref(Ring())
            gc.collect()
            assert lost() is None
            return before, inside

    gc.unfreeze()  # what an engine of another test has passed over
    before, inside = asyncio.run(main())
    assert inside < before / 10
    assert gc.get_freeze_count() == 0
    assert len(gc.get_objects()) > before / 2


class Growing(ScriptedEnvironment):
    """Pays a rollout by the training step that it is of."""

    paid = 0.0

    def at_step(self, step):
        other = Growing()
        other.paid = float(step)
        return other

    def results(self, problem, rollouts):
        return [Result(reward=Reward(total=self.paid + i)) for i in range(len(rollouts))]


@pytest.mark.parametrize("refill", [0, 1])
def test_an_environment_may_change_with_the_step(refill: int) -> None:
    found = [experience(configuration(refill=refill), set(), step, Growing()) for step in (0, 3)]
    assert [each.tally.values()["reward/total"] for each in found] == [0.5, 3.5]


class Lengthening(Growing):
    """From step 3 on the prompts of some problems do not fit, and one is none."""

    def at_step(self, step):
        other = Lengthening()
        other.paid = float(step)
        return other

    def prompt(self, problem):
        text = super().prompt(problem)
        if self.paid < 3 or problem.id not in self.changed:
            return text
        return text * 100 if problem.id == self.changed[0] else None

    changed: tuple[str, ...] = ()


def test_a_prompt_that_no_longer_fits_costs_its_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(refill=0)
    long, none, *_ = (problem.id for problem in draw_problems(problems(40), config, 3))
    monkeypatch.setattr(Lengthening, "changed", (long, none))
    assert experience(config, set(), 0, Lengthening()).tally.sums["infrastructure"] == 0
    found = experience(config, set(), 3, Lengthening())
    assert (found.tally.sums["rollouts"], found.tally.sums["infrastructure"], len(found.samples)) == (8, 4, 4)
    reasons = {record["error"] for record in found.records if record["reward"] is None}
    room = "engine.max_model_len = 200 less grpo.max_new_tokens = 8 leaves 192"
    assert any(reason.startswith(f"problem {long}: its prompt has ") and reason.endswith(room) for reason in reasons), (
        reasons
    )
    given = "prompt must give a text, or messages with role and content, and gave None"
    assert f"problem {none}: {given} for the problem {none}" in reasons


def test_groups_that_take_the_place_of_others_are_paid_as_of_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Growing, "results", lambda self, _, rollouts: [Result(reward=Reward(total=self.paid))] * 2)
    found = experience(configuration(refill=2), set(), 3, Growing())
    assert found.tally.sums["groups_refilled"] == 8
    assert found.tally.values()["reward/total"] == 3.0


def test_what_at_step_gives_is_checked_and_an_attribute_of_that_name_is_none() -> None:
    environment = Environment(set())
    environment.at_step = 3
    assert at_step(environment, 0) is environment
    assert at_step(None, 0) is None  # a rank that has no rollouts of its own

    def wrong(step: int) -> Environment:
        return {}[step]

    cases = (
        (print, "at_step of Environment must return an environment, .* gave NoneType"),
        (lambda: environment, r"at_step raised TypeError for the training step 7: .* takes 0 positional"),
        (wrong, "at_step raised KeyError for the training step 7: 7"),
    )
    for method, sentence in cases:
        environment.at_step = method
        with pytest.raises(UserError, match=sentence):
            at_step(environment, 7)


def test_the_overlong_term_is_logged_and_moves_the_policy() -> None:
    """The scripted completion, at most 8 tokens, is as long as all others of its group."""
    found = experience(configuration(refill=0, overlong_penalty_tokens=8, loss="dr_grpo"), set())
    mean = found.tally.values()
    assert -1.0 <= mean["reward/overlong"] < 0.0
    assert mean["reward/total"] == mean["reward/overlong"]


class InterruptedLearner(SimpleNamespace):
    """Its first update is given up while it waits to change the weights."""

    def update(self, timer, before_step=lambda: None) -> dict[str, float]:
        before_step()
        if self.interrupted:
            self.interrupted = False
            raise asyncio.CancelledError
        self.step += 1
        self.experiences.pop(0)
        return {}


@pytest.mark.parametrize("max_lag", [0, 1])
def test_an_update_that_is_interrupted_counts_no_pass_rates_which_a_resumed_run_counts(max_lag: int) -> None:
    async def main() -> None:
        config = configuration(curriculum=0.5, refill=0, max_lag=max_lag)
        learner = InterruptedLearner(
            step=0, experiences=[], chat=Chat(TOKENIZER), curriculum=Curriculum(), interrupted=True
        )
        draw = partial(draw_problems, problems(40), config, curriculum=learner.curriculum)
        async with open_generator(ScriptedEngine()) as generator:
            schedule = Schedule(generator, learner, Environment(set()), draw, config)
            await schedule.generated()
            tally = await schedule.tally(await schedule.experience())
            with pytest.raises(asyncio.CancelledError):
                await schedule.update(RunLog(None))
            assert not learner.curriculum.passes
            await schedule.update(RunLog(None))
            assert learner.curriculum.passes == tally.passes
            assert len(tally.passes) == 4
            await schedule.cancel()

    asyncio.run(main())


def learner_without_weights(config: Config, folder: Path) -> Learner:
    learner: Any = object.__new__(Learner)
    learner.config, learner.chat, learner.step, learner.experiences = config, Chat(TOKENIZER), 0, []
    learner.curriculum, learner.checkpoints = Curriculum(), Checkpoints(folder)
    learner.policy = SimpleNamespace(copied=lambda: lambda folder: None, copied_bytes=0, adapted=False)
    learner.optimizer = SimpleNamespace(parts=dict)
    return learner


@pytest.mark.parametrize("max_lag", [1, 3])
def test_a_checkpoint_waits_for_no_execution_and_what_was_under_way_joins_it(tmp_path: Path, max_lag: int) -> None:
    """It is whole before, without them; a step later they are in it, as they would be had it waited."""
    config = configuration(refill=0, max_lag=max_lag, steps=9)
    learner, begun = learner_without_weights(config, tmp_path), list[int]()

    async def main() -> None:
        go_on = asyncio.Event()
        first = {problem.id for problem in draw_problems(problems(40), config, 0)}

        class Slow(Environment):
            async def execute(self, problem, completion: str, seed: int) -> int:
                if problem.id not in first:
                    await go_on.wait()
                return await super().execute(problem, completion, seed)

        def draw(step: int, extra: int) -> list[Any]:
            begun.append(step)
            return draw_problems(problems(40), config, step)

        async with open_generator(ScriptedEngine()) as generator:
            schedule = Schedule(generator, learner, Slow(set()), draw, config)
            await schedule.generated()
            await schedule.experience()
            learner.experiences.pop(0)
            learner.step = 1
            await asyncio.wait_for(schedule.save(), 20)
            assert begun == list(range(max_lag + 2)), "what is due begins before the checkpoint is written"
            held = learner.checkpoints.latest() / "state" / EXPERIENCE
            assert not held.exists()
            go_on.set()
            while learner.step < max_lag + 1:
                assert not held.exists()
                await schedule.generated()
                await schedule.experience()
                learner.experiences.pop(0)
                learner.step += 1
            await schedule.cancel()
        assert learner.checkpoints.latest().name == "step-000001"
        drawn = [{record["problem_id"] for record in each.records} for each in from_bytes(held.read_bytes())]
        assert drawn == [{each.id for each in draw_problems(problems(40), config, s)} for s in range(1, max_lag + 1)]

    asyncio.run(main())


def test_an_interrupt_while_a_checkpoint_is_written_costs_none_of_its_rollouts(tmp_path: Path) -> None:
    config = configuration(refill=0, max_lag=2, steps=9)
    learner = learner_without_weights(config, tmp_path)

    async def main() -> None:
        draw = partial(draw_problems, problems(40), config)
        async with open_generator(ScriptedEngine()) as generator:
            schedule = Schedule(generator, learner, Environment(set()), draw, config)
            await schedule.generated()
            await schedule.experience()
            learner.experiences.pop(0)
            learner.step, loop = 1, asyncio.get_running_loop()
            saving = asyncio.create_task(schedule.save())
            learner.optimizer.parts = lambda: loop.call_soon_threadsafe(saving.cancel) and {}
            with pytest.raises(asyncio.CancelledError):
                await saving
            await schedule.settle()
            learner.save()
            await schedule.cancel()
        assert len(from_bytes((learner.checkpoints.latest() / "state" / EXPERIENCE).read_bytes())) == 2

    asyncio.run(main())


def test_rollouts_that_the_environment_failed_are_in_no_checkpoint_that_a_resumed_run_takes(tmp_path: Path) -> None:
    """Those of step 1 are there before the checkpoint of that step, which is written again without them."""
    config = configuration(refill=0, max_lag=1)
    learner = learner_without_weights(config, tmp_path)
    later = {problem.id for problem in draw_problems(problems(40), config, 1)}

    class Failing(Environment):
        async def execute(self, problem, completion: str, seed: int) -> int:
            if problem.id in later:
                raise ZeroDivisionError
            return await super().execute(problem, completion, seed)

    async def main() -> None:
        draw = partial(draw_problems, problems(40), config)
        async with open_generator(ScriptedEngine()) as generator:
            schedule = Schedule(generator, learner, Failing(set()), draw, config)
            await schedule.generated()
            await schedule.tally(await schedule.experience())
            learner.experiences.pop(0)
            learner.step = 1
            await schedule.save()
            saved = learner.checkpoints.latest() / "state" / EXPERIENCE
            await schedule.generated()
            found = await schedule.experience()
            learner.checkpoints.wait()
            assert saved.exists()
            with pytest.raises(UserError, match="8 of 8 rollouts of a step failed"):
                await schedule.tally(found)
            assert learner.checkpoints.latest().name == "step-000001"
            assert not saved.exists()
            await schedule.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("together", [True, False])
def test_an_interrupt_that_comes_with_the_last_update_leaves_a_checkpoint_unless_ranks_are_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], together: bool
) -> None:
    saved: list[int] = []
    learner: Any = SimpleNamespace(step=0, curriculum=None, save=lambda: saved.append(learner.step))
    learner.checkpoints = SimpleNamespace(check=lambda: None)

    class Scripted:
        async def generated(self) -> None: ...
        async def settle(self) -> None: ...

        async def experience(self) -> Experience:
            return Experience([], Tally(), [])

        async def tally(self, experience: Experience) -> Tally:
            return experience.tally

        async def update(self, log: RunLog) -> dict[str, float]:
            learner.step += 1
            asyncio.current_task().cancel()
            return {}

        def sync(self) -> dict[str, float]:
            return {}

    @asynccontextmanager
    async def opened(*_: object):
        yield Scripted()
        await asyncio.sleep(0)

    monkeypatch.setattr(programs, "open_schedule", opened)
    monkeypatch.setattr(programs, "met", lambda place: together and place == "the checkpoint of step 1")
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(programs.improve(learner, Environment(set()), problems(4), configuration(steps=1), RunLog(None)))
    assert saved == [1] * together
    assert ("no checkpoint of step 1: a resumed run" in capsys.readouterr().err) != together
