"""What the configuration asks of a device's memory."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from fastgrpo.config import Config
from fastgrpo.engine.choices import check_kv_cache, own_process
from fastgrpo.errors import UserError
from fastgrpo.policy.architecture import check_options
from fastgrpo.policy.experts import mixture
from fastgrpo.policy.fused_layers import may_fuse
from fastgrpo.policy.latent_attention import latent_widths
from fastgrpo.policy.placement import policy_device, policy_dtype
from fastgrpo.training.memory import MemoryPlan, Workload, device_capacity, plan_memory
from fastgrpo.training.model_sizes import Layers, has_mlps


def memory_plan(config: Config, model: PretrainedConfig, ranks: int = 1) -> MemoryPlan:
    """The memory of this device under `config`.

    Raises UserError naming the largest item where it does not fit, what is not made for its recurrent layers, why
    there are no routes to replay, and as `check_sampled` does.
    """
    tensor_parallel = config.engine.tensor_parallel
    check_options(config.model.path, model, compiled=config.model.compile, sharded=tensor_parallel > 1)
    check_sampled(config, model)
    _check_replay(config, model)
    device = policy_device()
    workload = Workload(
        micro_batch_tokens=config.grpo.micro_batch_tokens,
        max_num_seqs=config.engine.max_num_seqs,
        max_model_len=config.engine.max_model_len,
        kv_cache_gib=None if device.type == "cuda" else config.engine.kv_cache_gib,
        dtype=policy_dtype(config),
        kv_dtype=torch.float8_e4m3fn if config.engine.kv_cache_dtype == "fp8" else None,
        gradient_checkpointing=config.model.gradient_checkpointing,
        recompute_mlp=config.model.recompute_mlp,
        layers=_layers(config, model),
        offload_optimizer=config.model.offload_optimizer,
        reference=config.grpo.kl_weight > 0 and not config.model.lora_rank,
        lora_rank=config.model.lora_rank,
        overlapped=config.grpo.max_lag > 0,
        group_tokens=_group_tokens(config),
        key_copies=_key_copies(config),
        ranks=ranks,
        tensor_parallel=tensor_parallel,
        own_process=own_process(config),
        on_gpu=device.type == "cuda",
    )
    capacity = device_capacity(device)
    if device.type == "cuda":
        capacity = int(min(capacity, config.engine.gpu_memory_utilization * torch.cuda.mem_get_info(device)[1]))
    plan = plan_memory(model, workload, capacity)
    plan.check()
    return plan


def check_sampled(config: Config, model: PretrainedConfig) -> None:
    """Raise UserError where vLLM would not sample from the model as `config` has it.

    It says why the model cannot be cut into the ranks of `engine.tensor_parallel`, that sequences of
    `engine.max_model_len` have positions that the model does not know, or that it has no FP8 KV cache, here or at all.
    """
    check_kv_cache(config)
    if config.engine.kv_cache_dtype == "fp8" and latent_widths(model):
        # The trainer rounds keys and values as such a cache does, not what these are made of.
        raise UserError("engine.kv_cache_dtype fp8 is not made for latent attention: set it to auto")
    _check_positions(model, config.engine.max_model_len)
    _check_divisible(model, config.engine.tensor_parallel)


def _check_replay(config: Config, model: PretrainedConfig) -> None:
    if not config.grpo.routing_replay:
        return
    if mixture(model) is None:
        kind = model.get_text_config().model_type
        raise UserError(
            f"grpo.routing_replay trains with the experts that vLLM chose, and a model of the kind {kind} has none: set"
            " it to false"
        )
    if config.model.compile:
        raise UserError("model.compile compiles each layer's own choice of experts: unset it or grpo.routing_replay")


def _check_positions(model: PretrainedConfig, length: int) -> None:
    known = getattr(model, "max_position_embeddings", None)
    # Scaled rotations reach further than the configuration's number says.
    kind = (getattr(model, "rope_parameters", None) or {}).get("rope_type", "default")
    if known and kind == "default" and length > known:
        raise UserError(f"engine.max_model_len {length} is more than the {known} positions of the model: lower it")


def _layers(config: Config, model: PretrainedConfig) -> Layers:
    if config.model.compile:
        return "compiled"
    return "fused" if may_fuse(model) and not config.model.lora_rank else "plain"


def _check_divisible(model: PretrainedConfig, tensor_parallel: int) -> None:
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    names = ["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"]
    # A mixture may have it for no layer.
    if has_mlps(model) or not hasattr(model, "moe_intermediate_size"):
        names.append("intermediate_size")
    for name, size, unit in (
        ("num_attention_heads", model.num_attention_heads, tensor_parallel),
        *((name, getattr(model, name), tensor_parallel) for name in names if hasattr(model, name)),
        # Fewer heads than ranks are repeated.
        ("num_key_value_heads", max(heads, tensor_parallel), min(heads, tensor_parallel)),
    ):
        if size % unit:
            raise UserError(
                f"engine.tensor_parallel {tensor_parallel} does not fit the model's {name} {getattr(model, name)}: "
                "set it to a common divisor"
            )


def _group_tokens(config: Config) -> int:
    """Tokens of a group whose prompt and completions have full length; the prompt counts once."""
    return _prompt_tokens(config) + config.grpo.group_size * config.grpo.max_new_tokens


def _key_copies(config: Config) -> float:
    """Keys for each token of a group at full length: each completion's run has the prompt's keys, too."""
    prompt, group = _prompt_tokens(config), config.grpo.group_size
    return (prompt + group * (prompt + config.grpo.max_new_tokens)) / _group_tokens(config)


def _prompt_tokens(config: Config) -> int:
    return max(config.engine.max_model_len - config.grpo.max_new_tokens, 0)
