"""The order in which runs get a cell where there are too few, and turns that nobody takes any more."""

from __future__ import annotations

import asyncio

import pytest

from fastgrpo_sandbox import CheckTests, Limits, SandboxPool, StdioTests
from fastgrpo_sandbox.turns import LANE, Turns


async def began(turns: Turns, orders: list[int], cancelled: tuple[int, ...] = ()) -> list[int]:
    """The places in `orders` of those that got a turn, as they got it, while one had the only."""
    got: list[int] = []

    async def one(place: int, order: int) -> None:
        async with turns.taken(order):
            got.append(place)

    async with turns.taken():
        tasks = [asyncio.create_task(one(place, order)) for place, order in enumerate(orders)]
        await asyncio.sleep(0)
        for place in cancelled:
            tasks[place].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return got


def test_the_lowest_order_goes_first_and_equals_as_they_came() -> None:
    async def main() -> None:
        turns = Turns(1)
        assert await began(turns, [2, 1, 2, 0, 1]) == [3, 1, 4, 0, 2]
        assert await began(turns, [0, 0, 0], cancelled=(0, 1)) == [2]
        assert await began(turns, [0]) == [0]

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_turn_that_comes_with_the_cancellation_is_handed_on() -> None:
    async def main() -> list[int]:
        turns, got = Turns(1), []
        await turns.acquire()
        first = asyncio.create_task(turns.acquire())
        await asyncio.sleep(0)
        turns.release()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        async with turns.taken():
            got.append(1)
        return got

    assert asyncio.run(asyncio.wait_for(main(), 10)) == [1]


def test_who_comes_and_goes_is_forgotten_and_the_order_stays() -> None:
    async def main() -> list[int]:
        turns, got = Turns(1), []

        async def one(place: int, order: int) -> None:
            async with turns.taken(order):
                got.append(place)

        async with turns.taken():
            stay = [asyncio.create_task(one(place, order)) for place, order in enumerate([2, 0, 1, 1, 0])]
            for number in range(5000):
                leaves = asyncio.create_task(one(99, number % 4))
                await asyncio.sleep(0)
                leaves.cancel()
                await asyncio.gather(leaves, return_exceptions=True)
                assert len(turns._waiting) <= 12
        await asyncio.gather(*stay)
        assert turns._waiting == []
        return got

    assert asyncio.run(asyncio.wait_for(main(), 30)) == [1, 4, 2, 3, 0]


@pytest.mark.jail
def test_tests_of_an_earlier_order_are_judged_before_those_that_waited_longer() -> None:
    """Of any form: a case of stdin and its checker have the order of their run."""
    slow = "import time\ntime.sleep(0.3)\n"
    check = CheckTests(source="def check(f):\n    assert f(1) == 1\n", entry_point="f")
    checker = "def checker(given, output, expected): return output == expected\n"
    cases = StdioTests(cases=(("", "1\n"),) * 2, checker=checker)

    async def main() -> list[str]:
        ended: list[str] = []

        async def run(name: str, code: str, **options: object) -> None:
            outcome = await pool.run(code, **options)
            assert outcome.status == "ok", outcome
            ended.append(name)

        async with SandboxPool(cells=1, limits=Limits(wall_s=30)) as pool:
            await pool.read(check)  # a process for that may start slowly
            later = [asyncio.create_task(run("later", slow, order=1)) for _ in range(40)]
            await asyncio.sleep(0)
            due = [
                run("due", f"{slow}print(1)", tests=cases),
                run("due", f"{slow}def f(x): return x", tests=check),
                run("due", slow),
            ]
            await asyncio.gather(*later, *due)
        return ended

    ended = asyncio.run(asyncio.wait_for(main(), 120))
    # Those that had a jail already end first; and a checker waits for its case. In turn all 40 would come first.
    assert [place for place, name in enumerate(ended) if name == "due"][-1] < 32


def test_lanes_go_on_in_turn_however_many_wait_in_one() -> None:
    async def main() -> None:
        turns, got = Turns(1), []

        async def one(lane: str, order: int = 0) -> None:
            LANE.set(lane)
            async with turns.taken(order):
                got.append(lane)

        async def wait(*given: tuple[str, int]) -> list[asyncio.Task[None]]:
            tasks = [asyncio.create_task(one(*each)) for each in given]
            await asyncio.sleep(0)
            return tasks

        async with turns.taken():
            many = await wait(*[("many", 0)] * 6)
            few = await wait(("few", 0), ("few", 0), ("one", 0), ("first", -1))
            gone = await wait(*[("gone", 0)] * 100)
            for each in gone:
                each.cancel()
        await asyncio.gather(*many, *few, *gone, return_exceptions=True)
        assert got == ["first", "many", "few", "one", "many", "few", "many", "many", "many", "many"]
        assert (turns._waiting, turns._last) == ([], {})
        got.clear()
        async with turns.taken():  # who has waited before has no worse place
            late = await wait(("many", 0), ("new", 0), ("many", 0))
        await asyncio.gather(*late)
        assert got == ["many", "new", "many"]

    asyncio.run(asyncio.wait_for(main(), 10))
