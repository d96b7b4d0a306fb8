"""Deadlines that stand still while a workflow waits for its turn, in virtual time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

import pytest

from fastgrpo.flow.clock import Clock
from fastgrpo.flow.operators import OperatorHost
from fastgrpo.flow.types import Reply, Request, WorkerError, WorkflowLimits
from tests.flow.conftest import ADD, RIGHT, TrustingPool


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time jumps to the next timer instead of passing."""

    def __init__(self) -> None:
        super().__init__(VirtualSelector(self))
        self.now = 0.0

    def time(self) -> float:
        return self.now


class VirtualSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.now += timeout or 0.0
        return super().select(0)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


async def stop(clock: Clock, seconds: float, charged: float) -> None:
    with clock.stopped():
        await asyncio.sleep(seconds)
        clock.charge(charged)


@pytest.mark.parametrize(("afterwards", "in_time"), [(0.9, True), (1.1, False)])
def test_what_several_tasks_wait_for_together_counts_as_charged_once(afterwards: float, in_time: bool) -> None:
    async def work(clock: Clock) -> str:
        await asyncio.sleep(2)
        await asyncio.gather(*[stop(clock, 100, charged=4) for _ in range(3)])
        await stop(clock, 3, charged=99)  # no more than it lasted
        await asyncio.sleep(afterwards)
        return "done"

    async def main() -> str:
        clock = Clock(10)
        return await clock.within(work(clock))

    if in_time:
        assert run(main()) == "done"
    else:
        with pytest.raises(TimeoutError):
            run(main())


def test_a_clock_may_be_stopped_before_and_after_its_work() -> None:
    async def main() -> None:
        clock = Clock(1)
        await stop(clock, 5, charged=0)
        with pytest.raises(TimeoutError):
            await clock.within(asyncio.sleep(2))
        await stop(clock, 5, charged=0)

    run(main())


class BusyWorker:
    """Answers `answer_s` seconds after a wait of `queue_s` and one failed attempt of `failed_s`."""

    names = ("worker",)

    def __init__(self, queue_s: float, failed_s: float, answer_s: float) -> None:
        self.times = queue_s, failed_s, answer_s

    async def ask(self, request: Request) -> Reply:
        queue_s, failed_s, answer_s = self.times
        with request.waiting():
            await asyncio.sleep(queue_s)
        await asyncio.sleep(failed_s)
        with request.waiting():
            await asyncio.sleep(1)
        await asyncio.sleep(answer_s)
        return Reply(text=RIGHT, seconds=answer_s)

    async def aclose(self) -> None:
        pass


async def generates(worker: BusyWorker, times: int) -> float:
    """Seconds of the workflow's clock that `times` parallel calls take."""
    limits = WorkflowLimits(call_s=5)
    host = OperatorHost(ADD, worker, TrustingPool(), limits, seed=0)

    async def workflow() -> None:
        await asyncio.gather(*[host("generate", {"instruction": str(index)}) for index in range(times)])
        await asyncio.sleep(limits.session.wall_s - 4.5)

    await host.clock.within(workflow())
    return asyncio.get_running_loop().time()


def test_neither_the_queue_nor_a_failed_attempt_counts_against_workflow_and_call() -> None:
    assert run(generates(BusyWorker(queue_s=1000, failed_s=4, answer_s=4), times=3)) > 1000
    with pytest.raises(TimeoutError):
        run(generates(BusyWorker(queue_s=0, failed_s=0, answer_s=4.6), times=1))


@pytest.mark.parametrize("times", [(0, 5.5, 1), (0, 0, 5.5)])
def test_each_attempt_has_a_deadline_of_its_own(times: tuple[float, float, float]) -> None:
    with pytest.raises(WorkerError, match="did not answer within 5 s"):
        run(generates(BusyWorker(*times), times=1))
