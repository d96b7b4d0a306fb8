"""Monkey-patches applied to vLLM: what is private of vLLM is reached here, for `engine.py` and `worker.py`.

Five patches are files of their own: `steady_decoding.py`, `one_pass_sampling.py`, `shared_prefix.py`, `routes.py` and
`cpu_experts.py`.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial, partialmethod
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fastgrpo.engine.cpu_experts import keep_experts_plain
from fastgrpo.engine.guards import output_kept_back, replaced
from fastgrpo.engine.one_pass_sampling import sample_in_one_pass
from fastgrpo.engine.routes import record_routes
from fastgrpo.engine.shared_prefix import share_prefixes
from fastgrpo.engine.steady_decoding import spare_steady_steps


@contextmanager
def patched_vllm(*, quiet: bool = True, recurrent: bool = False) -> Iterator[None]:
    """Import and start vLLM as this project needs it, and give back what vLLM changes in the process.

    - Its scheduler is in this process; `quiet`: what it prints at start is shown only where it fails.
    - CPU: weights of linear layers, experts and convolutions stay plain. vLLM would prepack them for oneDNN and its own
      products and empty the parameters; in float32 the plain path decodes as fast, and leaves tensors that the trainer
      can share. The bias of a mixture's router counts: vLLM leaves it out where experts are in no groups. Ranks of
      sampled tokens, which nobody reads here, are not counted: vLLM would compile a kernel for that, half a minute on a
      fresh machine. Latent attention is not rotated by the kernel, which would read it wrongly. Ranks speak
      through gloo, not through shared memory whose name all runs on a machine would have in common.
    - GPU: weights live outside vLLM's sleep pool, so that sleeping drops the KV cache only. A third decoding step is in
      flight where vLLM has two: the GPU then waits neither for a step's tokens to be read nor for the next launch. Its
      second model runner serves mixtures of experts too, for which vLLM 0.25.1 would take the first one; it knows no
      `recurrent` layers.
      Tokens are drawn in one read of the logits, and keys of a prompt read once for all its completions.
    - Of a sampled token only its own logprob is kept, not the lists that say where it ranks.
    - Models that vLLM runs by transformers' code, as SmolLM3's: their classes stay as they are. vLLM would have them
      compiled by themselves, and in the same process the trainer could make none of them any more.
    - vLLM replaces `torch.set_num_threads` by a no-op and adds libraries to LD_PRELOAD, which every jail would inherit.
      Its process group has torch write "[rank0]: " before each line of an uncaught error, of the caller's own, too.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("GLOO_LOG_LEVEL", "ERROR")
    if torch.cuda.is_available():
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0" if recurrent else "1"
    preload, set_num_threads, hook = os.environ.get("LD_PRELOAD"), torch.set_num_threads, sys.excepthook
    try:
        with ExitStack() as stack:
            if quiet:
                stack.enter_context(output_kept_back())
            keep_own_logprobs_only()
            stack.enter_context(plain_transformers())
            stack.enter_context(patched_worker())
            yield
    finally:
        torch.set_num_threads, sys.excepthook = set_num_threads, hook
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload


@contextmanager
def plain_transformers() -> Iterator[None]:
    """In the block vLLM decorates its own classes of models alone."""
    from vllm.compilation import decorators

    own = getattr(decorators, "_support_torch_compile", None)
    if own is None:
        yield
        return

    def decorated(kind: Any, *given: Any, **options: Any) -> Any:
        return kind if issubclass(kind, PreTrainedModel) else own(kind, *given, **options)

    with replaced(decorators, "_support_torch_compile", decorated):
        yield


@contextmanager
def patched_worker() -> Iterator[None]:
    """`patched_vllm`'s part in the process that has vLLM's worker, which loads the model in the block."""
    record_routes()
    with ExitStack() as stack:
        if torch.cuda.is_available():
            from vllm.config import VllmConfig
            from vllm.v1.worker.gpu_worker import Worker

            own = vars(VllmConfig)["max_concurrent_batches"].fget
            stack.enter_context(replaced(VllmConfig, "max_concurrent_batches", property(partial(_one_more, own))))
            sample_in_one_pass()
            share_prefixes()
            pool = Worker._maybe_get_memory_pool_context
            stack.enter_context(
                replaced(
                    Worker,
                    "_maybe_get_memory_pool_context",
                    lambda self, tag: nullcontext() if tag == "weights" else pool(self, tag),
                )
            )
        else:
            from vllm.config import ModelConfig
            from vllm.distributed import parallel_state
            from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
            from vllm.model_executor.layers import utils
            from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
            from vllm.v1.sample import sampler

            look_for_kernels_once()
            sampler.batched_count_greater_than = _no_ranks  # type: ignore[assignment]
            stack.enter_context(replaced(utils, "dispatch_cpu_unquantized_gemm", _plain_linear))
            keep_experts_plain()
            keep_convolutions_plain()
            rotate = partialmethod(_rotate, RotaryEmbedding.forward_cpu)
            stack.enter_context(replaced(RotaryEmbedding, "forward_cpu", rotate))
            own_groups = parallel_state.initialize_model_parallel

            def with_experts_group(*sizes: Any, **options: Any) -> None:
                # The groups stay when the engine goes, and the next one may be of a mixture.
                with replaced(ModelConfig, "is_moe", property(lambda self: True)):
                    own_groups(*sizes, **options)

            stack.enter_context(replaced(parallel_state, "initialize_model_parallel", with_experts_group))
            stack.enter_context(replaced(CpuCommunicator, "_all_group_ranks_share_shm_group_name", lambda self: False))
            # torch 2.13 says so at each of vLLM's gathers.
            warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)
        yield


def _one_more(own: Callable[[Any], int], config: Any) -> int:
    """Steps in flight, of which vLLM would have `own(config)`. Its first model runner was not run with three."""
    steps = own(config)
    return steps + 1 if steps > 1 and config.use_v2_model_runner else steps


def _plain_linear(layer: nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = functional.linear  # type: ignore[assignment]


def _rotate(self: Any, own: Callable[..., Any], positions: Tensor, query: Tensor, key: Tensor | None = None) -> Any:
    """vLLM's rotation on a CPU: its kernel takes [T, H D], and would read latent attention's [T, H, D] as such."""
    if query.ndim == 3:
        return self.forward_native(positions, query, key)
    return own(self, positions, query, key)


def _no_ranks(logprobs_NV: Tensor, chosen_N1: Tensor) -> Tensor:
    return torch.zeros(len(chosen_N1), dtype=torch.int64)


@cache
def keep_convolutions_plain() -> None:
    """On a CPU that multiplies in bfloat16 a convolution of linear attention takes its weight as it is loaded.

    vLLM has it packed by what `_plain_linear` is in place of, and then could not load it again.
    """
    from vllm import _custom_ops as kernels

    for name in ("causal_conv1d_fwd_cpu", "causal_conv1d_update_cpu"):
        if hasattr(kernels, name):  # not in older versions
            setattr(kernels, name, partial(_plain_convolution, getattr(kernels, name)))


def _plain_convolution(own: Callable[..., Tensor], *, weight: Tensor, **inputs: Any) -> Tensor:
    packed = "is_vnni" if "is_vnni" in inputs else "is_weight_packed"  # the first in vLLM 0.25.1
    return own(weight=weight.flatten(1), **inputs | {packed: False})


def start_vllm(options: dict[str, Any]) -> Any:
    """vLLM's LLMEngine; `options` are those of its EngineArgs."""
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    # vLLM collects garbage five times as it starts. Of all that is imported by now nothing is garbage.
    gc.collect()
    gc.freeze()
    grouped = torch.distributed.is_initialized()  # the trainer's ranks, or another engine
    try:
        llm = LLMEngine.from_engine_args(EngineArgs(**options))
    except BaseException:
        # Kernels of Triton's that are never garbage are told as leaks at the process's end, 25 lines after the error.
        gc.unfreeze()
        if not grouped:
            # Its own group's file lies among the temporary ones until then.
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
        raise
    idle_inside_blocks(llm)
    resume_when_known(llm)
    spare_steady_steps(llm)
    return llm


@torch.no_grad()
def absorb_again(model: nn.Module) -> None:
    """The parts of `kv_b_proj` that latent attention multiplies queries and outputs by are those of its present weight.

    In one process they are views of it, and nothing changes. Where it was moved into memory that two processes have in
    common, vLLM copies it into them, in place.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "W_UK_T"):
            module.process_weights_after_loading(module.kv_b_proj.weight.dtype)


@cache
def keep_own_logprobs_only() -> None:
    """For requests that ask for no other token's logprob; others in this process are served as vLLM does."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    general = LogprobsProcessor._update_sample_logprobs

    def update(self: Any, lists: Any) -> None:
        if self.num_logprobs == 0 and hasattr(self.logprobs, "logprobs"):
            # Column 0 is the sampled token's.
            self.logprobs.logprobs.extend(lists.logprobs[:, 0].tolist())
        else:
            general(self, lists)

    LogprobsProcessor._update_sample_logprobs = update  # type: ignore[assignment, method-assign]


@cache
def look_for_kernels_once() -> None:
    """vLLM goes through all modules for kernels that a CPU lacks, at each start of an engine; one search finds them."""
    from vllm.platforms.cpu import CpuPlatform

    replace_kernels = getattr(CpuPlatform, "register_triton_kernel_overrides", None)  # not in older versions
    if replace_kernels is not None:
        CpuPlatform.register_triton_kernel_overrides = staticmethod(cache(replace_kernels))  # type: ignore[method-assign]


def idle_inside_blocks(llm: Any) -> None:
    """Spare vLLM's scheduler the question, for each request and token, whether the KV cache needs another block.

    A token that continues a block needs no other, and fills it at most; a full block is cached with the next question.
    Decoding many sequences is bound by the scheduler's Python, not by the GPU; this was a quarter of it.
    """
    manager = kv_cache_manager(llm)
    allocate, cache, size = manager.allocate_slots, manager.cache_blocks, llm.vllm_config.cache_config.block_size

    def allocate_slots(request: Any, num_new_tokens: int, **options: Any) -> Any:
        if num_new_tokens == 1 and "new_computed_blocks" not in options and request.num_computed_tokens % size:
            return manager.empty_kv_cache_blocks
        return allocate(request, num_new_tokens, **options)

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens % size == 0:
            cache(request, num_computed_tokens)

    manager.allocate_slots, manager.cache_blocks = allocate_slots, cache_blocks


def resume_when_known(llm: Any) -> None:
    """Have preempted requests wait for their tokens in flight before they are read again, as newer versions of vLLM do.

    0.25.1 would sample anew what arrives a step later, where two tokens were in flight: with the step of `_one_more`.
    """
    from vllm.v1.core.sched.request_queue import create_request_queue
    from vllm.v1.request import Request, RequestStatus

    if "num_stale_output_tokens" in Request.__init__.__code__.co_names:
        return
    scheduler = llm.engine_core.engine_core.scheduler
    own = scheduler.schedule

    def schedule(*given: Any) -> Any:
        # They stand before all others.
        preempted = takewhile(lambda request: request.status is RequestStatus.PREEMPTED, scheduler.waiting)
        if not any(request.num_output_placeholders for request in preempted):
            return own(*given)
        waiting, scheduler.waiting = scheduler.waiting, create_request_queue(scheduler.policy)
        try:
            return own(*given)
        finally:
            for request in reversed(list(scheduler.waiting)):
                waiting.prepend_request(request)
            scheduler.waiting = waiting

    scheduler.schedule = schedule


def prefixes_cached(llm: Any) -> bool:
    """Whether a request could still be served from a block that an earlier one filled."""
    return len(kv_cache_manager(llm).block_pool.cached_block_hash_to_block) > 0


def forget_prefixes(llm: Any) -> None:
    """No later request is served from a block filled until now; open requests go on with the blocks they have."""
    pool = kv_cache_manager(llm).block_pool
    pool.evict_blocks({block.block_id for block in pool.blocks if block.block_hash is not None})


@contextmanager
def nothing_scheduled(llm: Any) -> Iterator[None]:
    """A step in the block ends what is launched already and launches nothing."""
    with replaced(llm.engine_core.engine_core.scheduler, "has_requests", lambda: False):
        yield


def has_steps(llm: Any) -> bool:
    """Whether a step is in flight or would launch something."""
    core = llm.engine_core.engine_core
    return core.scheduler.has_requests() or bool(core.batch_queue)


def sampled_tokens(llm: Any) -> dict[str, int]:
    """How many tokens each open request has, by the name it was added with; nothing may be launched meanwhile."""
    open_requests = llm.engine_core.engine_core.scheduler.requests.values()
    # vLLM appends a random suffix to the name.
    return {request.request_id.rpartition("-")[0]: request.num_output_tokens for request in open_requests}


def kv_cache_manager(llm: Any) -> Any:
    """What hands out the blocks of the KV cache, in this process."""
    return llm.engine_core.engine_core.scheduler.kv_cache_manager


def vllm_model(llm: Any) -> nn.Module:
    """vLLM's own module of the model, in this process."""
    return llm.apply_model(lambda model: model)[0]
