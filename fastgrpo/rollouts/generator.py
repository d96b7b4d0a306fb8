"""The engine's step loop in a thread of its own, awaited request by request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastgrpo.engine.tensor_parallel import Lockstep
from fastgrpo.errors import UserError
from fastgrpo.rollouts.endpoint import Endpoint, open_endpoint

if TYPE_CHECKING:
    from fastgrpo.engine.completion import Completion
    from fastgrpo.engine.opening import AnyEngine


class Work(NamedTuple):
    """What the engine is told before a step: requests (key, token ids, sampling), and keys that nobody waits for."""

    submitted: list[tuple[int, list[int], dict[str, Any]]]
    dropped: list[int]


class Generator:
    """An engine whose step loop is awaited: `await complete(...)` while other requests are decoding.

    `lockstep`: the ranks that hold the engine together; a rank that follows has no requests of its own. `stack` closes
    what is opened meanwhile.
    """

    def __init__(
        self, engine: AnyEngine, thread: ThreadPoolExecutor, lockstep: Lockstep, stack: AsyncExitStack
    ) -> None:
        self._stack, self._opening = stack, asyncio.Lock()
        self._endpoint: Endpoint | None = None
        self._engine, self._thread, self._lockstep, self.ranks = engine, thread, lockstep, lockstep.ranks
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._submitted: list[tuple[int, list[int], dict[str, Any]]] = []
        self._dropped: list[int] = []
        self._wake = asyncio.Event()
        self._stepping = asyncio.Lock()
        self.paused = False
        self._next_key = 0
        self._failure: Exception | None = None

    async def complete(self, prompt_ids: list[int], *, deadline_s: float, **sampling: Any) -> Completion:
        """One completion; raises UserError after `deadline_s` and whatever the engine raised if it failed.

        A wait that is cancelled frees the request's place in the engine.
        """
        if self._failure is not None:
            raise self._failure
        key, self._next_key = self._next_key, self._next_key + 1
        future = self._waiting[key] = asyncio.get_running_loop().create_future()
        self._submitted.append((key, prompt_ids, sampling))
        self._wake.set()
        try:
            return await asyncio.wait_for(future, deadline_s)
        except TimeoutError:
            raise UserError(
                f"a completion was not there after engine.completion_timeout_s = {deadline_s:g} s, its wait for others "
                "included: raise it, or lower grpo.max_new_tokens or the number of rollouts"
            ) from None
        finally:
            del self._waiting[key]
            if future.cancelled():
                self._dropped.append(key)
                self._wake.set()

    async def endpoint(self) -> Endpoint:
        """Where agents ask the engine; it listens from the first call on."""
        async with self._opening:
            if self._endpoint is None:
                self._endpoint = await self._stack.enter_async_context(open_endpoint())
        return self._endpoint

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """A block of rollouts on the rank that leads; one that follows has none and steps the engine until they end."""
        self._lockstep.begin()
        yield
        self._lockstep.end()
        if not self._lockstep.leads:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._follow)

    async def pause(self) -> None:
        """Stop between two steps, until `resume`: nothing reads the weights meanwhile, and open requests stay.

        Where this is cancelled, or the engine fails, there is no pause.
        """
        await self._stepping.acquire()
        self.paused = True
        try:
            await self._finished(self._engine.settle)
        except BaseException:
            self.resume()
            raise

    def resume(self) -> None:
        """Go on after `pause`."""
        self.paused = False
        self._stepping.release()

    async def freed(self) -> None:
        """Wait until the engine has dropped what nobody waits for any more."""
        async with self._stepping:
            if self._dropped:
                await self._step()

    async def drive(self) -> None:
        """Step the engine while requests are open; ends by cancellation, or by failing every open request."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._submitted or self._dropped or self._engine.busy:
                    async with self._stepping:
                        await self._step()
            except Exception as error:
                self._fail(error)
                raise

    async def _step(self) -> None:
        work = Work(self._submitted, self._dropped)
        self._submitted, self._dropped = [], []
        await self._finished(self._advance, work)

    async def _finished(self, work: Callable[..., list[Completion]], *arguments: Any) -> None:
        """What the engine's thread finishes by this `work` is delivered, also where the wait for it is cancelled."""
        done = asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        done.add_done_callback(lambda ended: self._deliver([] if ended.exception() else ended.result()))
        await asyncio.shield(done)

    def _follow(self) -> None:
        while (work := self._lockstep.hear()) is not None:
            self._advance(work)

    def _advance(self, work: Work) -> list[Completion]:
        self._lockstep.tell(work)
        for key, ids, sampling in work.submitted:
            self._engine.submit(key, ids, **sampling)
        if work.dropped:
            self._engine.abort(work.dropped)
        return self._engine.step() if self._engine.busy else []

    def _deliver(self, completions: list[Completion]) -> None:
        for completion in completions:
            future = self._waiting.get(completion.key)
            if future is not None and not future.done():
                future.set_result(completion)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)


@asynccontextmanager
async def open_generator(engine: AnyEngine, *, own_stream: bool = False, ranks: int = 1) -> AsyncIterator[Generator]:
    """A `Generator` whose step loop lives as long as the block; requests still open at its end are aborted.

    `own_stream`: on a GPU the engine's kernels go before those that other threads launch meanwhile. `ranks` hold the
    engine together, and all of them enter the block.
    """
    lockstep, thread, stack = Lockstep(ranks), device_thread("engine", own_stream=own_stream), AsyncExitStack()
    generator = Generator(engine, thread, lockstep, stack)
    driver = asyncio.create_task(generator.drive(), name="engine-steps")
    try:
        async with stack:
            yield generator
    finally:
        driver.cancel()
        await asyncio.gather(driver, return_exceptions=True)
        # A step under way ends first, on a rank that follows the leader's rollouts.
        thread.shutdown()
        lockstep.end()
        engine.abort_all()


def device_thread(name: str, *, own_stream: bool = False) -> ThreadPoolExecutor:
    """A one-thread executor bound to the caller's GPU and stream (torch tracks both per thread).

    `own_stream`: bound to a new stream of high priority instead.
    """
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(1, thread_name_prefix=name)
    device = torch.cuda.current_device()
    stream = torch.cuda.Stream(priority=-1) if own_stream else torch.cuda.current_stream()

    def begin() -> None:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream)

    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=begin)
