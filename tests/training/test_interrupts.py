"""Runs that are cut anywhere, over a scripted engine: what is resumed trains on what the whole run does."""

from __future__ import annotations

import asyncio
import copy
import random
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.engine.completion import Completion
from fastgrpo.policy.chat import Chat
from fastgrpo.record.log import RunLog
from fastgrpo.train import improve
from fastgrpo.training import schedule
from fastgrpo.training.curriculum import Curriculum
from fastgrpo.types import Result, Reward
from tests.rollouts.test_rollouts import TOKENIZER, problems


class Engine:
    """A token a step for each request; tokens follow the request's seed and the weights' version."""

    def __init__(self) -> None:
        self.version = 0
        self.open: dict[int, Completion] = {}
        self.seeds: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def submit(self, key: int, prompt_ids: list[int], *, seed: int, **options: object) -> None:
        self.open[key], self.seeds[key] = Completion(key, [], [], "length", []), seed

    def step(self) -> list[Completion]:
        finished = []
        for key, request in list(self.open.items()):
            draw = random.Random(f"{self.seeds[key]}/{len(request.token_ids)}/{self.version}")
            request.token_ids.append(draw.randrange(20, 200))
            request.logprobs.append(-1.0 - self.version)
            request.versions.append(self.version)
            if len(request.token_ids) == 1 + self.seeds[key] % 6:
                finished.append(self.open.pop(key))
        return finished

    def settle(self) -> list[Completion]:
        return []

    def abort(self, keys: list[int]) -> None:
        for key in keys:
            self.open.pop(key, None)

    def abort_all(self) -> None:
        self.open.clear()


class Learner:
    """Notes what it trains on; `saved` is its last checkpoint."""

    def __init__(self, config: Config, saved: Any) -> None:
        self.config, self.engine, self.chat, self.curriculum = config, Engine(), Chat(TOKENIZER), Curriculum()
        self.saved, self.killed, self.checkpoints = saved, False, SimpleNamespace(check=lambda: None)
        # Whether no rollout is still to join the last checkpoint.
        self.whole = True
        self.step, self.experiences, self.curriculum.passes, self.trained = copy.deepcopy(saved) or (0, [], {}, [])
        self.sync()

    def update(self, timer: object, before_step: Any = lambda: None) -> dict[str, float]:
        before_step()
        self.step += 1
        experience = self.experiences.pop(0)
        # Of each step: whose rollouts, with which words, of which versions; and the logprobs that are trained.
        records = [(each["problem_id"], each["completions"], each["versions"]) for each in experience.records]
        self.trained.append((records, [sample.logprobs.tolist() for sample in experience.samples]))
        return {}

    def sync(self) -> dict[str, float]:
        assert self.config.grpo.in_flight or not self.engine.busy
        self.engine.version = self.step
        return {}

    def save(self, *, anew: bool = False) -> None:
        if not self.killed:
            self.whole = not self.config.grpo.max_lag
            self.saved = copy.deepcopy((self.step, self.experiences, self.curriculum.passes, self.trained))

    def join(self, step: int, experiences: list[Any]) -> None:
        if not self.killed and self.saved[0] == step:
            self.whole, self.saved = True, (step, copy.deepcopy(experiences), *self.saved[2:])


class Environment:
    """Executions of all lengths; the reward is by the words alone."""

    def prompt(self, problem: Any) -> str:
        return f"solve {problem.id}"

    async def execute(self, problem: Any, completion: str, seed: int) -> str:
        for _ in range(random.Random(completion).randrange(12)):
            await asyncio.sleep(0)
        return completion

    def feedback_text(self, execution: str) -> str:
        return "again"

    def results(self, problem: Any, rollouts: list[Any]) -> list[Result]:
        return [Result(reward=Reward(total=float(len(each.completions[-1]) % 3))) for each in rollouts]


def trained(config: Config, saved: Any = None, cut: int | None = None, *, kill: bool = False) -> Learner:
    """A run to its end, or cancelled after `cut` turns of the event loop, with `kill` without a checkpoint of that."""

    async def main() -> Learner:
        learner: Any = Learner(config, saved)
        run = asyncio.create_task(improve(learner, Environment(), problems(16), config, RunLog(None)))
        turns = 0
        while not run.done() and turns != cut:
            turns += 1
            await asyncio.sleep(0)
        learner.killed = kill
        run.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(run, 20)
        return learner

    return asyncio.run(main())


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize(("max_lag", "in_flight"), [(0, False), (1, False), (4, False), (1, True), (4, True)])
def test_a_run_that_is_cut_anywhere_goes_on_as_if_it_had_not_been(
    monkeypatch: pytest.MonkeyPatch, max_lag: int, in_flight: bool, kill: bool
) -> None:
    monkeypatch.setattr(schedule, "nothing_here_garbage", nullcontext)
    monkeypatch.setattr(schedule, "share_cores", lambda: None)
    grpo = {"steps": 5, "prompts_per_step": 3, "group_size": 2, "max_new_tokens": 8, "rounds": 2}
    grpo |= {"max_lag": max_lag, "in_flight": in_flight, "curriculum": 0.0 if in_flight else 0.34}
    config = resolve({f"grpo.{name}": value for name, value in grpo.items()} | {"checkpoint.every": 2})
    whole, draw = trained(config), random.Random(f"{max_lag}{in_flight}{kill}")
    assert len(whole.trained) == 5
    for _ in range(8):
        learner, cuts, whole_ones = trained(config, None, draw.randrange(250), kill=kill), list[int](), True
        while learner.step < 5:
            cuts.append(learner.step)
            whole_ones = whole_ones and (learner.whole or not kill)
            cut = draw.randrange(250) if len(cuts) < 3 else None
            learner = trained(config, learner.saved, cut, kill=kill)
        # What a checkpoint of a killed run still lacked is drawn anew, by its weights.
        if not in_flight and whole_ones:
            assert learner.trained == whole.trained, cuts
        for number, (records, logprobs) in enumerate(learner.trained):
            assert [name for name, _, _ in records] == [name for name, _, _ in whole.trained[number][0]], cuts
            versions = {version for _, _, runs in records for version, _ in runs}
            assert versions <= set(range(number - max_lag, number + 1)), cuts
            # Each token that is trained has the logprob of the weights whose version it says.
            assert {value for sample in logprobs for value in sample} <= {0.0} | {-1.0 - each for each in versions}
