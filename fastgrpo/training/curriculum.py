"""Which problems a step draws: in endless shuffles, a share of them by what the policy sometimes solves so far.

A group's advantages vanish where all its answers are right or all wrong. With pass rate p their variance is p (1 - p),
which weighs the draw: "learnability" in Rutherford et al. (arXiv 2408.15099), for language models Foster et al. (arXiv
2502.12272), who take a share of each batch by it and the rest evenly.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.config import Config
from fastgrpo.ranks.collectives import replica_share

# What was seen of a problem before counts half at each new visit: the policy has changed since.
KEPT = 0.5


def draw_problems(
    problems: Sequence[Any], config: Config, step: int, extra: int = 0, curriculum: Curriculum | None = None
) -> list[Any]:
    """This replica's problems of `step`: consecutive pieces of endless shuffles, a function of seed and step alone.

    `extra` is 0, or the number, from 1, of one of the step's `grpo.refill` further batches, of shuffles of their own.
    The `curriculum`, where there is one, draws the share `grpo.curriculum` of them by the pass rates so far.
    """
    order_of = f"{config.seed}/refill" if extra else f"{config.seed}/order"
    batch = step * config.grpo.refill + extra - 1 if extra else step
    by_weight = round(config.grpo.curriculum * config.grpo.prompts_per_step) if curriculum else 0
    evenly = config.grpo.prompts_per_step - by_weight
    orders: dict[int, list[int]] = {}
    chosen: list[int] = []
    for position in range(batch * evenly, (batch + 1) * evenly):
        epoch, index = divmod(position, len(problems))
        if epoch not in orders:
            orders[epoch] = random.Random(f"{order_of}/{epoch}").sample(range(len(problems)), len(problems))
        chosen.append(orders[epoch][index])
    if curriculum and by_weight:
        chosen += curriculum.draw(problems, by_weight, set(chosen), f"{config.seed}/curriculum/{step}/{extra}")
    return [problems[index] for index in chosen[replica_share(config.engine.tensor_parallel)]]


class Curriculum:
    """The pass rates so far, by the problem's id, and the draw that they weigh.

    `passes`: (sum of pass rates, rollouts), both falling with age.
    """

    def __init__(self) -> None:
        self.passes: dict[str, tuple[float, float]] = {}

    def add(self, passes: Mapping[str, tuple[float, float]]) -> None:
        """One step's sums of pass rates and counts of rollouts, by the problem's id."""
        for name, (passed, count) in passes.items():
            before, counted = self.passes.get(name, (0.0, 0.0))
            self.passes[name] = KEPT * before + passed, KEPT * counted + count

    def weight(self, name: str) -> float:
        """p (1 - p), never 0: p begins at a half, which one right and one wrong rollout stand for."""
        passed, count = self.passes.get(name, (0.0, 0.0))
        rate = (passed + 1) / (count + 2)
        return rate * (1 - rate)

    def draw(self, problems: Sequence[Any], count: int, taken: Collection[int], seed: str) -> list[int]:
        """`count` indices of `problems` by weight, none twice and none that is `taken` while there are others."""
        generator, chosen = random.Random(seed), list[int]()
        pool = [index for index in range(len(problems)) if index not in taken]
        while len(chosen) < count:
            # Keys of Efraimidis and Spirakis (2006): the largest ones are a weighted draw without replacement.
            keys = {index: generator.random() ** (1 / self.weight(str(problems[index].id))) for index in pool}
            chosen += sorted(keys, key=keys.__getitem__, reverse=True)[: count - len(chosen)]
            pool = list(range(len(problems)))
        return chosen

    def encoded(self) -> bytes:
        """What `load` reads."""
        return msgspec.json.encode(self.passes)

    def load(self, path: Path) -> None:
        """Take over the pass rates that an earlier process had encoded."""
        self.passes = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[float, float]])
