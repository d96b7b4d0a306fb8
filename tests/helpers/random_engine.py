"""An engine that draws random completions, for the loop around it: no vLLM starts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from fastgrpo.engine.completion import Completion
from fastgrpo.engine.weight_sync import SyncReport


class RandomEngine:
    """Completes each request in one step."""

    def __init__(self) -> None:
        self.open: list[tuple[int, int]] = []

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def submit(self, key: int, prompt_ids: list[int], *, seed: int, **options: object) -> None:
        self.open.append((key, seed))

    def step(self) -> list[Completion]:
        key, seed = self.open.pop()
        ids = random.Random(seed).choices(range(100, 200), k=8)
        return [Completion(key, ids, [-5.0] * len(ids), "length", [0] * len(ids))]

    def settle(self) -> list[Completion]:
        return []

    def abort(self, keys: list[int]) -> None:
        self.open = [request for request in self.open if request[0] not in keys]

    def abort_all(self) -> None:
        self.open.clear()

    def sync(self, policy: object, **options: object) -> SyncReport:
        return SyncReport(0.0, 0, 0.0, 0.0, 0.0)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


@contextmanager
def random_engine(*_: object, **__: object) -> Iterator[RandomEngine]:
    yield RandomEngine()
