"""Which experts vLLM chose for each token: recorded where its layers choose, kept by place in the KV cache.

vLLM 0.25.1 tells them of its first model runner alone, and no version tells them on a CPU. Here the worker writes each
layer's choice beside the others of its step, in the CUDA graph too, and sends them with the step's tokens. The
scheduler's process keeps them by the slots of the KV cache that the tokens' keys went to. So a prompt that is read from
the cache has the choices that its keys were made with, and a request has all of its tokens' when it ends.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastgrpo.engine.completion import OpenRequest

# What vLLM's configuration, whose `additional_config` is for others' use, tells the worker's process.
ASKED = "fastgrpo_routes"


class Recorder:
    """A worker's choices of the step that runs, in a tensor [`most` tokens of a step, layers, k]; `tokens` of it."""

    def __init__(self, model: nn.Module, most: int, device: torch.device) -> None:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        runners: list[Any] = [module for module in model.modules() if isinstance(module, MoERunner)]
        sizes = {(runner.moe_config.num_experts, runner.moe_config.experts_per_token) for runner in runners}
        if len(sizes) != 1:
            raise ValueError(f"routes are recorded of mixtures of one size, not of {sorted(sizes)}")
        ((experts, choices),) = sizes
        dtype = torch.int8 if experts <= 128 else torch.int16
        self.tokens = 0
        self._chosen_TLK = torch.full((most, len(runners), choices), -1, dtype=dtype, device=device)
        for layer, runner in enumerate(runners):
            capture = partial(self._capture, layer)
            if not runner.routed_experts.quant_method.is_monolithic:
                runner.router.set_capture_fn(capture)
            elif device.type == "cpu":  # vLLM 0.25.1's; see `keep_experts_plain`
                runner.routed_experts.capture_routes = capture
            else:
                raise ValueError("its kernel chooses experts and tells nobody: set grpo.routing_replay to false")

    def _capture(self, layer: int, chosen_TK: Tensor) -> None:
        self._chosen_TLK[: len(chosen_TK), layer].copy_(chosen_TK)

    def taken(self, slots: Tensor) -> Taken:
        """The step's choices, on their way to the host: the next step waits on the device, not here."""
        return Taken(self._chosen_TLK[: self.tokens], slots[: self.tokens])


class Taken:
    """Choices and slots of a step's tokens in host memory, once `arrays` has waited for them."""

    def __init__(self, chosen_TLK: Tensor, slots_T: Tensor) -> None:
        self._parts = [part.to("cpu", non_blocking=True, copy=True) for part in (chosen_TLK, slots_T)]
        self._event = torch.cuda.Event(blocking=True) if chosen_TLK.is_cuda else None
        if self._event is not None:
            self._event.record()

    def arrays(self) -> list[np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return [part.numpy() for part in self._parts]


@cache
def record_routes() -> None:
    """For the workers of this process whose engine was started with `asked_options`."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    # The CPU's has the same class, after what must be imported before it there.
    Worker = importlib.import_module(f"vllm.v1.worker.{'gpu' if torch.cuda.is_available() else 'cpu'}_worker").Worker
    own_load, own_execute, own_sample = Worker.load_model, Worker.execute_model, Worker.sample_tokens

    def load_model(self: Any, **options: Any) -> None:
        own_load(self, **options)
        if ASKED in self.vllm_config.additional_config:
            most = self.vllm_config.scheduler_config.max_num_batched_tokens
            self.recorder = Recorder(self.model_runner.get_model(), most, self.device)

    def execute_model(self: Any, scheduled: Any) -> Any:
        if hasattr(self, "recorder"):
            self.recorder.tokens = scheduled.total_num_scheduled_tokens
        return own_execute(self, scheduled)

    def sample_tokens(self: Any, grammar: Any) -> Any:
        output = own_sample(self, grammar)
        if output is None or not hasattr(self, "recorder"):
            return output
        taken = self.recorder.taken(_slots(self.model_runner))
        if isinstance(output, AsyncModelRunnerOutput):
            output.get_output = partial(_with_routes, output.get_output, taken)  # type: ignore[method-assign]
        else:
            output.routes = taken.arrays()
        return output

    Worker.load_model, Worker.execute_model, Worker.sample_tokens = load_model, execute_model, sample_tokens


def _with_routes(get_output: Any, taken: Taken) -> Any:
    output = get_output()
    output.routes = taken.arrays()
    return output


def _slots(runner: Any) -> Tensor:
    """Where in the KV cache each of the step's tokens is, int64, by the group of `attention_group`."""
    group = attention_group(runner.kv_cache_config)
    if hasattr(runner, "block_tables"):  # vLLM's second model runner
        return runner.block_tables.slot_mappings[group]
    return runner.input_batch.block_table[group].slot_mapping.gpu


def attention_group(config: Any) -> int:
    """The first of a KV cache's groups that keeps keys of all tokens."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    kinds = [isinstance(group.kv_cache_spec, FullAttentionSpec) for group in config.kv_cache_groups]
    if True not in kinds:
        raise ValueError("routes are kept by the slots of full attention, of which the model has no layer")
    return kinds.index(True)


def asked_options() -> dict[str, Any]:
    """Of vLLM's EngineArgs those by which its workers record routes."""
    return {"additional_config": {ASKED: True}}


class RouteKeeper:
    """The choices of all tokens in `llm`'s KV cache; `requests`, by their names, get theirs as they end.

    Host memory: a byte, or two above 128 experts, for each slot, layer and choice. Of a KV cache in bf16 that is about
    a hundredth or less, and 4 hundredths where few layers have keys and tokens many experts (Qwen3-Next).
    """

    def __init__(self, llm: Any, requests: Mapping[str, OpenRequest]) -> None:
        scheduler = llm.engine_core.engine_core.scheduler
        config, self._manager = scheduler.kv_cache_config, scheduler.kv_cache_manager
        self._group, self._requests = attention_group(config), requests
        self._block = config.kv_cache_groups[self._group].kv_cache_spec.block_size
        self._size, self._chosen_SLK = config.num_blocks * self._block, np.empty((0, 0, 0), np.int8)
        # Those that a preempted request had, by its name in vLLM.
        self._left: dict[str, Sequence[int]] = {}
        self._update, self._free = scheduler.update_from_output, self._manager.free
        scheduler.update_from_output, self._manager.free = self._update_from_output, self._free_request

    def _update_from_output(self, scheduled: Any, sampled: Any) -> Any:
        # Before a request that ends with this step is freed.
        if (routes := getattr(sampled, "routes", None)) is not None:
            chosen_TLK, slots_T = routes
            if not len(self._chosen_SLK):
                # Memory comes with what is written. Of an expert its complement is, so that a slot without is -1.
                self._chosen_SLK = np.zeros((self._size, *chosen_TLK.shape[1:]), chosen_TLK.dtype)
            self._chosen_SLK[slots_T] = ~chosen_TLK
        return self._update(scheduled, sampled)

    def _free_request(self, request: Any) -> None:
        name = request.request_id
        # vLLM appends a random suffix.
        ours = self._requests.get(name.rpartition("-")[0])
        if ours is not None and len(self._chosen_SLK):
            blocks = self._manager.get_blocks(name).get_block_ids()[self._group]
            left = self._left.pop(name, [])
            if request.is_finished():
                # A preempted one ends by a token that was in flight then: what others write to its slots comes later.
                ours.routes = self._routes(blocks or left, request.num_tokens - 1)
            else:
                self._left[name] = blocks
        self._free(request)

    def _routes(self, blocks: Sequence[int], tokens: int) -> np.ndarray:
        """The choices of the first `tokens` of a sequence in these blocks: the last that was sampled was not read."""
        slots = np.array(blocks, np.int64)[:, None] * self._block + np.arange(self._block)
        return ~self._chosen_SLK[slots.ravel()[:tokens]]


def told_routes(routes: np.ndarray | None, tokens: int) -> np.ndarray:
    """The choices of a request's first `tokens`. Raises RuntimeError where one of them is not there."""
    if routes is None or len(routes) < tokens or (tokens and routes[:tokens].min() < 0):
        raise RuntimeError("vLLM has not told which experts its tokens had: set grpo.routing_replay to false")
    return routes[:tokens]
