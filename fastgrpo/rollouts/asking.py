"""Questions to a task that end in time: each has a deadline, and what ignores its end is left behind."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from functools import partial
from types import coroutine
from typing import Any, TypeVar

from fastgrpo.errors import described
from fastgrpo.ranks.collectives import STAGE_WAIT_S
from fastgrpo.ranks.deadlines import within
from fastgrpo.rollouts.environment import BLOCKED_S, EnvironmentFailure

Value = TypeVar("Value")
# What a coroutine has to tidy up once it is cancelled: connections and files are closed by then, and what takes longer
# (a jail on a busy machine) ends by itself while the run goes on.
TIDY_S = 10.0
# For the end of a task's environment: whatever it closes has ended by then, or goes on without the run.
CLOSE_S = 60.0
LIBC = ctypes.CDLL(None)
CLONE_FS = 0x200  # os.unshare came with Python 3.12

log = logging.getLogger(__name__)
# Those that go on though they were cancelled: the loop itself holds tasks weakly.
_left_behind: set[asyncio.Task[Any]] = set()


async def ask(function: Callable[..., Any], *arguments: Any, clock: asyncio.Timeout, inline: bool = False) -> Any:
    """The value of an environment's `function`, coroutine or plain; a plain one has a thread unless it runs `inline`.

    Raises EnvironmentFailure, whatever goes wrong; TimeoutError where `clock` expires. A coroutine that ignores its
    cancellation is left behind after `TIDY_S`; what holds the event loop ends the process, `BLOCKED_S` after the
    deadline that the clock has at first.
    """
    name, now = getattr(function, "__name__", "the environment"), asyncio.get_running_loop().time()
    held = BLOCKED_S + max(0.0, (clock.when() or now) - now)
    try:
        async with clock:
            if inspect.iscoroutinefunction(function):
                return await _cancellable(function(*arguments), name, held)
            if inline:
                with _holding(name, held):
                    value = function(*arguments)
            else:
                value = await _aside(function, arguments)
            # As of an object whose `__call__` is a coroutine.
            return await _cancellable(value, name, held) if inspect.isawaitable(value) else value
    except EnvironmentFailure:
        raise
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if clock.expired() or (isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling()):
            raise
        raise EnvironmentFailure(f"{name} raised {described(error)}") from error


async def _cancellable(awaitable: Awaitable[Value], name: str, held: float) -> Value:
    """Its value; where the wait is cancelled, so is the awaitable, and is left behind if it has not ended in `TIDY_S`.

    It may hold the event loop for `held` seconds.
    """
    task = asyncio.create_task(_let_go(awaitable, name, held), name=f"the environment's {name}")
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        await _tidied(task)
        if not task.done():
            _leave_behind(task)
        elif not task.cancelled():
            task.exception()  # nobody asks for it any more
        raise
    return task.result()


async def _tidied(task: asyncio.Task[Any]) -> None:
    """Wait for the end of what was cancelled, for `TIDY_S` at most.

    Another cancellation changes nothing: where a run ends both its owner and the end of the loop cancel each wait, and
    the task, which tidies up already, was said to ignore its own.
    """
    given_up = asyncio.get_running_loop().time() + TIDY_S
    while not task.done() and (left := given_up - asyncio.get_running_loop().time()) > 0:
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task], timeout=left)


def _leave_behind(task: asyncio.Task[Any]) -> None:
    if all(other.get_name() != task.get_name() for other in _left_behind):
        log.warning("%s goes on though it was cancelled, and is left behind: let CancelledError pass", task.get_name())
    _left_behind.add(task)
    task.add_done_callback(_left_behind.discard)


async def _let_go(awaitable: Awaitable[Value], name: str, held: float) -> Value:
    """Its value; the process ends where it lets `held` seconds pass without letting the event loop go on."""

    async def whole() -> Value:
        return await awaitable

    try:
        return await _in_steps(whole(), name, held)
    except SystemExit as error:  # which would leave the event loop
        raise EnvironmentFailure(f"{name} raised {described(error)}") from error


@coroutine
def _in_steps(steps: Coroutine[Any, Any, Value], name: str, held: float) -> Generator[Any, Any, Value]:
    """`await steps`, each of which has `held` seconds."""
    step = partial(steps.send, None)
    while True:
        try:
            with _holding(name, held):
                pending = step()
        except StopIteration as end:
            return end.value
        try:
            step = partial(steps.send, (yield pending))
        except BaseException as error:
            step = partial(steps.throw, error)


def _holding(name: str, held: float) -> AbstractContextManager[None]:
    """The block of a task's own code in the event loop, which ends the process where it takes longer than `held`."""
    return within(
        held,
        f"the environment's {name} has held the event loop for {round(held, 1):g} s, in which nothing else goes on: "
        "await what it waits for, or make it a plain function, which has a thread of its own unless it is "
        "feedback_text; continue with --resume",
    )


@asynccontextmanager
async def opened(environment: AbstractAsyncContextManager[Value]) -> AsyncIterator[Value]:
    """What a task's `open_environment` gives, in the length of the block.

    Its end is cancelled after `CLOSE_S`, which is said, and goes on without the run; one that lets no cancellation pass
    ends the process, as an opening does that takes longer than stages wait.
    """
    late = f"open_environment has not opened in {STAGE_WAIT_S:g} s: its code before the yield hangs"

    async def close(*error: Any) -> bool | None:
        clock = asyncio.timeout(CLOSE_S)
        left = CLOSE_S + BLOCKED_S
        try:
            with within(left, f"open_environment has not closed in {left:g} s: its code after the yield hangs"):
                async with clock:
                    return await environment.__aexit__(*error)
        except TimeoutError:
            if not clock.expired():
                raise
            log.warning("open_environment has not closed in %g s and is cancelled: its code after the yield", CLOSE_S)
            return None

    async with AsyncExitStack() as stack:
        with within(STAGE_WAIT_S, late):
            value = await environment.__aenter__()
        stack.push_async_exit(close)
        yield value


async def all_of(coroutines: Iterable[Coroutine[Any, Any, Value]]) -> list[Value]:
    """Results in order; the first failure cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _aside(function: Callable[..., Value], arguments: Sequence[Any]) -> Value:
    """`function(*arguments)` in a thread of its own: one that hangs holds up neither other calls nor the exit.

    `os.chdir` and `os.umask` there are the thread's own, where the kernel lets it: the run's files have relative paths.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Value] = loop.create_future()

    def settle(error: Exception | None, value: Any) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def tell(error: Exception | None, value: Any) -> None:
        # The loop may have ended meanwhile.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, error, value)

    def call() -> None:
        LIBC.unshare(CLONE_FS)
        try:
            value = function(*arguments)
        except BaseException as error:
            # No future takes a StopIteration, as of `next` on what is empty; others would end the loop.
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                tell(error, None)
            else:
                tell(RuntimeError(described(error)), None)
        else:
            tell(None, value)

    threading.Thread(target=call, name="environment", daemon=True).start()
    return await done
