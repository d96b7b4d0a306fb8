"""What vLLM's worker process does while it decodes: its host's time by part, and when the GPU has nothing to do.

`begin` and `end` run in the worker's process: `llm.collective_rpc(begin)`, some steps, `llm.collective_rpc(end)`;
`begin_profile` and `end_profile` likewise, in other steps, since a profile makes Python slower.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Other programs share a CPU, and wall time says nothing there.
clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
PARTS = ("execute_model", "sample_tokens")


class Watch:
    """Seconds of the host in the runner's methods, and with a GPU a profile of its kernels."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.seconds, self.calls = runner, defaultdict[str, float](float), Counter[str]()
        for name in PARTS:
            setattr(runner, name, self._timed(name, getattr(runner, name)))
        self.profiler = profile(activities=[ProfilerActivity.CUDA]) if torch.cuda.is_available() else None
        if self.profiler is not None:
            self.profiler.start()

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[name] += clock() - start
                self.calls[name] += 1

        return call

    def end(self) -> dict[str, float]:
        """The methods are the runner's own again. Milliseconds a step by name, of the host's parts and the GPU."""
        for name in PARTS:
            delattr(self.runner, name)
        steps = max(self.calls["execute_model"], 1)
        found = {f"host {name}": 1e3 * self.seconds[name] / steps for name in PARTS}
        if self.profiler is not None:
            torch.cuda.synchronize()
            self.profiler.stop()
            found |= {name: value / steps for name, value in gpu_milliseconds(self.profiler.events()).items()}
        return found


def gpu_milliseconds(events: Iterable[Any]) -> dict[str, float]:
    """Of a profile's kernels and copies: from the first to the last, busy, idle, the ten dearest, and before which five
    the GPU was idle for longest."""
    device = torch.autograd.DeviceType.CUDA
    kernels = [event for event in events if event.device_type == device]
    if not kernels:
        return {}
    spans = sorted((event.time_range.start, event.time_range.end, event.name[:60]) for event in kernels)
    free_at, by_name, waited = spans[0][0], defaultdict[str, float](float), defaultdict[str, float](float)
    for start, end, name in spans:
        by_name[name] += end - start
        if start > free_at:
            waited[f"idle before {name}"] += start - free_at
        free_at = max(free_at, end)
    whole, idle = free_at - spans[0][0], sum(waited.values())
    found = {"GPU in all": whole, "GPU busy": whole - idle, "GPU idle": idle}
    found |= dict(Counter(by_name).most_common(10)) | dict(Counter(waited).most_common(5))
    return {name: value / 1e3 for name, value in found.items()}


def begin(worker: Any) -> None:
    """Watch the runner of vLLM's `worker` from now on."""
    worker.watch = Watch(worker.model_runner)


def end(worker: Any) -> tuple[str, dict[str, float]]:
    """The end of the watch: the module of vLLM's runner, of which there are two, and what was seen since `begin`."""
    watch: Watch = worker.watch
    del worker.watch
    return type(watch.runner).__module__, watch.end()


def begin_profile(worker: Any) -> None:
    """Profile the thread of vLLM's `worker` that launches its kernels."""
    worker.host_profile = cProfile.Profile()
    worker.host_profile.enable()


def end_profile(worker: Any) -> str:
    """The dearest functions since `begin_profile`, by their own time."""
    worker.host_profile.disable()
    text = io.StringIO()
    pstats.Stats(worker.host_profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(30)
    del worker.host_profile
    return text.getvalue()
