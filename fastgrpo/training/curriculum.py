"""Which problems are worth drawing: those that the policy sometimes solves, by its pass rate on them so far.

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

# What was seen of a problem before counts half at each new visit: the policy has changed since.
KEPT = 0.5


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

    def save(self, path: Path) -> None:
        """Write what `load` reads."""
        path.write_bytes(msgspec.json.encode(self.passes))

    def load(self, path: Path) -> None:
        """Take over the pass rates that an earlier process saved."""
        self.passes = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[float, float]])
