"""Generation in a process of its own: its decoding waits for no lock of this process's Python.

The process runs `Engine` (`host.py`). Its weights are this process's too, in shared memory, so that a sync copies
nothing; requests go there and finished completions come back in batches.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.engine.child import Child
from fastgrpo.engine.completion import Completion, unpacked
from fastgrpo.engine.engine import FIRST_STEP, free_memory_share, hangs_after, require_idle
from fastgrpo.engine.guards import interrupt_deferred
from fastgrpo.engine.shared_memory import Handles, Lent, opened
from fastgrpo.engine.weight_sync import SyncReport, WeightSync
from fastgrpo.errors import USER_ERROR, UserError, say_on_stderr

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastgrpo.policy.model import Policy

# Reading the weights, compiling and capturing graphs; a large model from a slow disk.
START_S = 1800.0
# How often a wait that goes on tells what the other process said last.
TELL_S = 180.0
# How long `step` waits where nothing finishes, and so how late a request may come to the other process.
STEP_S = 0.005
# What a step may take beyond its deadline before this process says so, when the other one has not.
GRACE_S = 5.0
CLOSE_S = 20.0
# Weights that are copied travel in batches of so many bytes, and the last tensor more: a mixture has thousands of them,
# and a message takes milliseconds. Merged ones are in memory so long.
BATCH_BYTES = 2**28


class EngineDied(UserError):
    """The engine's process has ended, failed or hangs: nothing can be generated any more."""


class EngineProcess:
    """What `Engine` is, in a process of its own, which decodes whether or not `step` is called.

    `step` sends what was submitted and returns what has finished since, after a few milliseconds at most. A policy in
    sync lives in the other process's memory: on a GPU it is lost with that process. Every wait ends with EngineDied
    where the other process ends, fails or is silent for longer than `step_timeout_s`.
    """

    def __init__(
        self, model_path: str | os.PathLike[str], *, parity_threshold: float = 0.1, seed: int = 0, **options: Any
    ) -> None:
        """`options`: those of `Engine`."""
        self.max_model_len: int = options["max_model_len"]
        self._step_timeout_s: float = options.get("step_timeout_s", 40.0)
        # By the number that the other process knows a request by: a dropped one's key may be used again.
        self._keys: dict[int, int] = {}
        self._requests: list[tuple[int, np.ndarray, dict[str, Any]]] = []
        self._next, self._paused, self._stepped = 0, False, False
        self._last_message = time.monotonic()
        self._lost: Exception | None = None
        gpu, fp8 = torch.cuda.is_available(), options.get("kv_cache_dtype") == "fp8"
        share = free_memory_share() if gpu else None
        options |= {"model_path": os.fspath(model_path), "seed": seed, "free_share": share}
        self._child: Child | None = Child(self._step_timeout_s + GRACE_S)
        try:
            self._tell("start", {"worker_process": gpu} | options)
            handles, vocab = self._answer(START_S, "vLLM has not started")
            model = _Model(handles, partial(self._call, "load"))
        except BaseException:
            self._child.end()
            raise
        self._weights = WeightSync(model, vocab, self.max_model_len, parity_threshold, seed, fp8_cache=fp8)

    @property
    def pid(self) -> int:
        """The other process."""
        return self._alive.process.pid

    @property
    def busy(self) -> bool:
        """True while a submitted request is unfinished."""
        return bool(self._keys)

    def submit(self, key: int, prompt_ids: Sequence[int] | np.ndarray, **sampling: Any) -> None:
        """Queue one completion, as `Engine.submit` does; it leaves with the next `step`.

        Raises ValueError where its prompt leaves no room for a token.
        """
        if key in self._keys.values():
            raise ValueError(f"request {key} is already in flight")
        if not 0 < len(prompt_ids) < self.max_model_len:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens does not fit {self.max_model_len} in all")
        self._requests.append((self._next, np.asarray(prompt_ids, np.int32), sampling))
        self._keys[self._next] = key
        self._next += 1

    def step(self) -> list[Completion]:
        """What has finished since the last call, after a wait of `STEP_S` at most where nothing has."""
        if self._paused:
            self._paused = False
            self._tell("go")
        self._send_requests()
        finished: list[Completion] = []
        wait = STEP_S
        while (message := self._hear(wait)) is not None:
            finished += self._finished(message)
            wait = 0.0 if finished else STEP_S
        if finished:
            self._stepped = True
        elif self.busy:
            limit = self._step_timeout_s * (1 if self._stepped else FIRST_STEP)
            if time.monotonic() - self._last_message > limit + GRACE_S:
                raise self._hangs(limit)
        return finished

    def abort(self, keys: Sequence[int]) -> None:
        """Drop those of the requests `keys` that are unfinished: nobody waits for them any more."""
        unwanted = set(keys)
        dropped = {number for number, key in self._keys.items() if key in unwanted}
        waiting = {number for number, _, _ in self._requests}
        self._requests = [request for request in self._requests if request[0] not in dropped]
        for number in dropped:
            del self._keys[number]
        if dropped - waiting and self._lost is None:
            self._tell("abort", sorted(dropped - waiting))

    def abort_all(self) -> None:
        """Drop every unfinished request; the engine stays usable."""
        self.abort(list(self._keys.values()))

    def settle(self) -> list[Completion]:
        """Stop between two steps and return what finished: nothing reads the weights until the next `step`."""
        self._send_requests()
        finished: list[Completion] = []
        self._call("settle", finished=finished)
        self._paused = True
        return finished

    def score(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[list[float]]:
        """Logprobs at temperature 1 of tokens 1.. of each sequence (the first token has none). Must not be busy."""
        require_idle(self.busy, "score")
        return self._call("score", sequences)

    def complete(
        self, prompts: Sequence[Sequence[int] | np.ndarray], *, max_tokens: int, seed: int
    ) -> list[Completion]:
        """A completion of each prompt, as `Engine.complete` makes them. Must not be busy."""
        require_idle(self.busy, "complete")
        return self._call("complete", prompts, max_tokens, seed)

    def sync(self, policy: Policy, *, version: int = 0, in_flight: bool = False) -> SyncReport:
        """Make vLLM sample from `policy`'s present weights and check parity, as `Engine.sync` does."""
        require_idle(self.busy and not in_flight, "sync")

        def renew() -> None:
            if torch.cuda.is_available():
                # The other process does not wait for what this one has launched.
                torch.cuda.synchronize()
            self._call("renew", version)

        return self._weights(policy, renew, None if self.busy else self)

    def sleep(self) -> None:
        """Free the KV cache's memory for training (GPU; on CPU nothing). Weights stay: the trainer lives in them."""
        self._call("sleep")

    def wake(self) -> None:
        """Undo `sleep`; a no-op when awake. What training's allocator keeps in reserve is given back first."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._call("wake")

    def close(self) -> None:
        """End the process. Idempotent; a policy that shared the weights keeps them, unless the process died before."""
        child, self._keys = self._child, {}
        if child is None:
            return
        try:
            with suppress(EngineDied, ValueError):
                if torch.cuda.is_available():
                    # What it gives back makes room for the policy's own weights.
                    self._call("sleep", seconds=CLOSE_S)
                    self._weights.release()
                self._call("close", seconds=CLOSE_S)
        finally:
            self._child = None
            child.end(GRACE_S)

    @property
    def _alive(self) -> Child:
        """The other process; raises what it was lost by, again and again."""
        if self._lost is not None:
            raise self._lost
        if self._child is None:
            raise EngineDied("the engine's process has ended")
        return self._child

    def _lose(self, error: Exception, patience_s: float = 0.0) -> Exception:
        """End the process, if it has not ended within `patience_s`, by an error that is then every later call's."""
        child = self._alive
        child.end(patience_s)
        self._lost = error
        return error

    def _send_requests(self) -> None:
        if self._requests:
            requests, self._requests = self._requests, []
            self._tell("submit", requests)

    def _tell(self, command: str, *arguments: Any) -> None:
        child = self._alive
        self._last_message = time.monotonic()
        try:
            with interrupt_deferred():
                child.connection.send((command, arguments))
        except BlockingIOError:
            raise self._hangs(self._step_timeout_s) from None
        except OSError:
            raise self._died() from None

    def _call(
        self, command: str, *arguments: Any, finished: list[Completion] | None = None, seconds: float | None = None
    ) -> Any:
        """Have a command done and return its reply; completions that come first are added to `finished`, or dropped.

        Its deadline of `seconds` is that of a first step where none is given.
        """
        self._tell(command, *arguments)
        complaint = f"the engine's process does not answer ({command})"
        fix = "; continue with --resume, and raise engine.step_timeout_s where it was slow"
        return self._answer(seconds or FIRST_STEP * self._step_timeout_s, complaint, finished, fix)

    def _answer(self, seconds: float, complaint: str, finished: list[Completion] | None = None, fix: str = "") -> Any:
        begun = told = time.monotonic()
        while (now := time.monotonic()) < begun + seconds:
            message = self._hear(0.2)
            if message is not None and message[0] == "reply":
                return message[1]
            if message is not None and finished is not None:
                finished += self._finished(message)
            if now > told + TELL_S:
                told = now
                say_on_stderr(f"{complaint} after {now - begun:.0f} s{self._alive.said()}")
        raise self._lose(EngineDied(f"{complaint} after {seconds:g} s{self._alive.said()}{fix}"))

    def _hear(self, seconds: float) -> tuple[Any, ...] | None:
        """The next message, None if there is none in `seconds`."""
        child = self._alive
        try:
            with interrupt_deferred():
                if not child.connection.poll(seconds):
                    if child.process.poll() is not None and not child.connection.poll(0):
                        raise self._died()
                    return None
                message: tuple[Any, ...] = child.connection.recv()
        except BlockingIOError:
            raise self._hangs(self._step_timeout_s) from None
        except (EOFError, OSError):
            raise self._died() from None
        self._last_message = time.monotonic()
        if message[0] == "failed":
            raise self._failed(*message[1:])
        return message

    def _finished(self, message: tuple[Any, ...]) -> list[Completion]:
        if message[0] != "finished":
            return []
        completions = unpacked(message[1])
        return [replace(one, key=self._keys.pop(one.key)) for one in completions if one.key in self._keys]

    def _hangs(self, limit: float) -> Exception:
        return self._lose(EngineDied(hangs_after(limit)))

    def _failed(self, kind: str, text: str) -> Exception:
        if kind == "ValueError":
            return self._lose(ValueError(text), GRACE_S)
        self._alive.show()
        reason = self._alive.worker_error() or f"{kind}: {text.splitlines()[0]}"
        return self._lose(EngineDied(f"the engine's process failed: {reason}"), GRACE_S)

    def _died(self) -> Exception:
        child = self._alive
        child.end(GRACE_S)
        words, status = child.said(), child.process.returncode
        if status == USER_ERROR:
            return self._lose(EngineDied(words.removeprefix(": ")))
        child.show()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return self._lose(EngineDied(f"the engine's process {how}{words}; continue with --resume"))


class _Model:
    """Stands for vLLM's model in the other process: the two methods that `adopt_weights` calls."""

    def __init__(self, handles: Handles, load: Callable[[Handles], Any]) -> None:
        self._parameters, self._load = opened(handles), load

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self._parameters.items()

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for batch in _batches(weights):
            lent = Lent(batch)
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
            try:
                self._load(lent.handles)
            finally:
                lent.close()


def _batches(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        batch[name], size = tensor.detach(), size + tensor.nbytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch
