"""The memory plan of one device: computed from the model's configuration before the first step, printed and checked.

Generation and training take turns, or overlap (`grpo.max_lag`). Weights and optimizer state are there in both; the KV
cache only in generation (the engine sleeps while training, unless both overlap or all fits at once), gradients and
activations only in training. The plan must hold in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from fastgrpo.engine.choices import STEP_TOKENS
from fastgrpo.engine.shared_weights import can_share
from fastgrpo.errors import UserError
from fastgrpo.kernels.tuning import CHUNK_BYTES
from fastgrpo.policy.host_memory import host_memory_free
from fastgrpo.training.model_sizes import (
    Layers,
    activation_bytes_per_token,
    count_adapters,
    count_parameters,
    expert_choices,
    kv_bytes_per_token,
    largest_experts,
    mlp_width,
    mlp_working,
    recurrent_working,
    state_bytes,
)
from fastgrpo.training.pieces import BUCKET_ELEMENTS, BUCKETS_IN_FLIGHT, PIECE_ELEMENTS

GIB = 2**30
# CUDA context, CUDA graphs, workspaces of vLLM and of the matrix libraries, fragmentation.
GPU_OVERHEAD = 4 * GIB
# NCCL's buffers; two GPUs held 2.8 GiB more than the rest of the plan.
NCCL_OVERHEAD = 3 * GIB
# What vLLM's logits took beyond that, in rows of fp32 logits for each sequence: 3 to 4 GiB for 512 sequences and a
# vocabulary of 152 k.
LOGIT_ROWS = 12
CPU_OVERHEAD = 2 * GIB
# A second process with torch and vLLM: on a GPU its CUDA context, on a CPU its modules.
PROCESS_OVERHEAD = GIB
TOKEN_STEP = 1024


@dataclass(frozen=True, slots=True)
class Item:
    """One use of memory in bytes, the phases that need it and the setting that shrinks it."""

    name: str
    size: int
    setting: str
    generating: bool = True
    training: bool = True


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of one device. Tokens count one rank's micro-batch; sequences one rank's engine."""

    micro_batch_tokens: int
    max_num_seqs: int
    max_model_len: int
    group_tokens: int = 0  # of a group at full length, whose prompt is computed once where a micro-batch holds it whole
    kv_cache_gib: float | None = None
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None  # of the KV cache; None = `dtype`
    gradient_checkpointing: bool = False
    recompute_mlp: bool = False  # nothing of the MLPs' products is kept
    layers: Layers = "plain"  # who computes them: transformers, torch.compile, or `policy.fused_layers`
    offload_optimizer: bool = False  # its state is on the host, but for the piece at work
    reference: bool = False
    overlapped: bool = False  # generation goes on beside training, so that the KV cache stays
    lora_rank: int = 0  # adapters of that rank are all that is trained, and vLLM has merged weights of its own
    key_copies: float = 1.0  # keys gathered for each token stored: more than 1 where sequences share a prompt
    ranks: int = 1
    tensor_parallel: int = 1  # ranks that hold one vLLM together; above 1 training is sharded over all `ranks`
    whole_gradients: bool = False  # each rank sums them whole
    awake: bool = False  # the engine does not sleep while training
    own_process: bool = False  # vLLM has one
    on_gpu: bool = True


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where `capacity` bytes go."""

    items: tuple[Item, ...]
    capacity: int
    kv_cache_gib: float  # the engine's share
    micro_batch_tokens: int  # the token budget
    engine_sleeps: bool = True  # while training; not where generation overlaps it, or all fits at once
    whole_gradients: bool = False  # each rank has room for their sums, which then travel once a step

    @property
    def generating(self) -> int:
        """Bytes needed while vLLM generates."""
        return sum(item.size for item in self.items if item.generating)

    @property
    def training(self) -> int:
        """Bytes needed in forward and backward."""
        return sum(item.size for item in self.items if item.training)

    def table(self) -> str:
        """The plan as lines of text, GiB."""
        lines = [f"{'memory of one device, GiB':<36}{'generating':>12}{'training':>12}"]
        for item in self.items:
            lines.append(f"{item.name:<36}{_gib(item.size, item.generating):>12}{_gib(item.size, item.training):>12}")
        lines.append(f"{'sum':<36}{_gib(self.generating):>12}{_gib(self.training):>12}")
        lines.append(f"{'available':<36}{_gib(self.capacity):>12}{_gib(self.capacity):>12}")
        return "\n".join(lines)

    def check(self) -> None:
        """Raise UserError, naming the largest item and its setting, where a phase does not fit."""
        for phase, need in (("generation", self.generating), ("training", self.training)):
            if need > self.capacity:
                raise UserError(
                    f"{phase} needs {need / GIB:.1f} GiB and {self.capacity / GIB:.1f} GiB are free; "
                    + self.advice(training=phase == "training")
                )

    def advice(self, *, training: bool = True) -> str:
        """What to change where memory runs out in a phase; also the end of an out-of-memory error's message."""
        there = [item for item in self.items if item.setting and (item.training if training else item.generating)]
        largest = max(there, key=lambda item: item.size)
        return f"the largest item is {largest.name}, {_gib(largest.size)} GiB: {largest.setting}"


def plan_memory(config: PretrainedConfig, workload: Workload, capacity: int) -> MemoryPlan:
    """The plan of a Hugging Face model under `workload` in `capacity` bytes; `check` says whether it holds.

    A `kv_cache_gib` of None becomes room for every sequence at full length, or what is left. Too many micro-batch
    tokens are cut to what fits, in steps of 1,024 or to one group's, but never below a single sequence of
    `max_model_len`. Where both are in memory at once the cache comes first, down to one group's tokens: decoding a part
    of the sequences after the other costs more than smaller micro-batches do. Where memory is left that neither cache
    nor micro-batches can use, gradients are summed whole over several ranks, and the engine stays awake.
    """
    parameters = count_parameters(config)
    trained = count_adapters(config, workload.lora_rank) if workload.lora_rank else parameters
    plan = _plan(config, workload, capacity, parameters, trained)
    whole = replace(workload, whole_gradients=workload.ranks > 1 and workload.tensor_parallel == 1)
    awake = workload.on_gpu and not workload.overlapped
    for roomier in (replace(whole, awake=awake), whole, replace(workload, awake=awake)):
        more = _plan(config, roomier, capacity, parameters, trained)
        same = (more.kv_cache_gib, more.micro_batch_tokens) == (plan.kv_cache_gib, plan.micro_batch_tokens)
        if same and max(more.generating, more.training) <= capacity:
            return more
    return plan


def _plan(config: PretrainedConfig, workload: Workload, capacity: int, parameters: int, trained: int) -> MemoryPlan:
    """The plan in which gradients are summed, and the engine sleeps, as `workload` says."""
    awake = workload.awake or workload.overlapped
    fixed = _state_items(config, parameters, trained, workload)
    if workload.tensor_parallel > 1:
        fixed = _sharded_items(config, parameters, workload)
    if workload.on_gpu:
        logits = LOGIT_ROWS * workload.max_num_seqs * config.vocab_size * 4
        # The widest moment of a layer: gate, up and their product, beside hidden states before and after norms; of a
        # mixture for each choice, whose result takes the place of gate and up.
        inner = 3 * mlp_width(config) // workload.tensor_parallel
        widest = max(inner, expert_choices(config) * config.hidden_size + inner // 3) + 4 * config.hidden_size
        size = logits + STEP_TOKENS * widest * workload.dtype.itemsize
        fixed = (*fixed, Item("vLLM's logits and activations", size, "lower engine.max_num_seqs", training=awake))
    room = capacity - sum(item.size for item in fixed if item.training)
    left = capacity - sum(item.size for item in fixed if item.generating)
    if workload.overlapped:
        left = room - sum(_step_sizes(config, workload, _whole_group(workload)))
    kv_cache = _kv_cache_size(config, workload, left)
    kept = awake or not workload.on_gpu
    if kept:
        room -= kv_cache
    budgets = _budgets(workload)
    tokens = next((tokens for tokens in budgets if sum(_step_sizes(config, workload, tokens)) <= room), budgets[-1])
    activations, transient = _step_sizes(config, workload, tokens)
    kv_setting = "lower engine.max_num_seqs" if workload.on_gpu else "lower engine.kv_cache_gib"
    held = max(tokens, workload.max_model_len)
    shrink = "lower grpo.micro_batch_tokens" if held > workload.max_model_len else "lower engine.max_model_len"
    if not workload.gradient_checkpointing:
        either = "model.gradient_checkpointing" if workload.recompute_mlp else "model.recompute_mlp"
        shrink = f"set {either} or {shrink}"
    items = (
        *fixed,
        Item("KV cache", kv_cache, kv_setting, training=kept),
        Item(f"activations, {held} tokens", activations, shrink, generating=False),
        Item(_transient_name(workload), transient, shrink, generating=False),
    )
    return MemoryPlan(items, capacity, kv_cache / GIB, tokens, not awake, workload.whole_gradients)


def _kv_cache_size(config: PretrainedConfig, workload: Workload, left: int) -> int:
    """Bytes of the KV cache: as asked for, else room for every sequence at full length, of the bytes that are `left`.

    One sequence must fit, or vLLM would not start: `MemoryPlan.check` says then what is too large.
    """
    if workload.kv_cache_gib is not None:
        return int(workload.kv_cache_gib * GIB)
    token = kv_bytes_per_token(config, workload.kv_dtype or workload.dtype, workload.tensor_parallel)
    sequence = workload.max_model_len * token + state_bytes(config)
    return max(min(workload.max_num_seqs * sequence, left), sequence)


def device_capacity(device: torch.device) -> int:
    """Bytes free on the device now, before anything of this program is there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory_free()


def _state_items(config: PretrainedConfig, parameters: int, trained: int, workload: Workload) -> tuple[Item, ...]:
    """Weights, optimizer state and gradients: what depends on the model alone."""
    b = workload.dtype.itemsize
    share = math.ceil(trained / workload.ranks)
    summed, of_what = (trained, "whole gradients") if workload.whole_gradients else (share, "gradients")
    state = share * (8 if workload.dtype == torch.float32 else 12)
    more_gpus = "train on more GPUs"
    shrink = more_gpus if workload.offload_optimizer else f"set model.offload_optimizer, or {more_gpus}"
    if workload.offload_optimizer and workload.on_gpu:
        state = min(state, 12 * PIECE_ELEMENTS)
    weights = [("weights (vLLM's and the trainer's)", parameters * b)]
    if workload.lora_rank:
        weights = [("vLLM's merged weights", parameters * b), ("the trainer's frozen base", parameters * b)]
    elif not can_share(config):
        weights = [("vLLM's weights", parameters * b), ("the trainer's weights", parameters * b)]
    items = [
        *(Item(name, size, "use a smaller model") for name, size in weights),
        Item("master weights, Adam moments", state, shrink),
        Item(of_what, summed * 4 + _largest_gradient(config, trained, workload), more_gpus, generating=False),
        Item("runtime and workspaces", _overhead(workload), ""),
    ]
    if workload.reference:
        items.append(Item("reference policy", parameters * b, "set grpo.kl_weight to 0"))
    return tuple(items)


def _sharded_items(config: PretrainedConfig, parameters: int, workload: Workload) -> tuple[Item, ...]:
    """Weights, optimizer state and gradients under FSDP2 and a tensor-parallel vLLM.

    The next layer is gathered while one computes, and gradients are reduced in fp32. Embedding and head are whole for
    a micro-batch. A weight sync's check computes, too, beside the KV cache.
    """
    b, share = workload.dtype.itemsize, math.ceil(parameters / workload.ranks)
    tables = (1 if getattr(config, "tie_word_embeddings", False) else 2) * config.vocab_size * config.hidden_size
    whole = tables + 2 * math.ceil((parameters - tables) / config.num_hidden_layers)
    more_gpus = "train on more GPUs"
    items = [
        Item("vLLM's weights", math.ceil(parameters / workload.tensor_parallel) * b, "raise engine.tensor_parallel"),
        Item("sharded master weights, Adam moments", share * 12, more_gpus),
        Item("sharded gradients", share * 4, more_gpus, generating=False),
        Item("gathered layers and head", whole * b, ""),
        Item("their gradients", whole * (b + 4), "", generating=False),
        Item("runtime and workspaces", _overhead(workload), ""),
    ]
    if workload.reference:
        items.append(Item("sharded reference policy", share * b, "set grpo.kl_weight to 0"))
    return tuple(items)


def _overhead(workload: Workload) -> int:
    process = PROCESS_OVERHEAD if workload.own_process else 0
    if not workload.on_gpu:
        return CPU_OVERHEAD + process
    return GPU_OVERHEAD + process + (NCCL_OVERHEAD if workload.ranks > 1 else 0)


def _budgets(workload: Workload) -> list[int]:
    """Token budgets to try, the largest first; the last one is all that can be done."""
    wanted, least = workload.micro_batch_tokens, workload.max_model_len
    return sorted({*range(wanted, least, -TOKEN_STEP), _whole_group(workload), min(wanted, least)}, reverse=True)


def _whole_group(workload: Workload) -> int:
    """The budget that holds one group, or a sequence where that is longer, as far as so many tokens are wanted."""
    return min(max(workload.group_tokens, workload.max_model_len), workload.micro_batch_tokens)


def _largest_gradient(config: PretrainedConfig, parameters: int, workload: Workload) -> int:
    """Gradients beside their sums: of one rank, or of whole sums, only the newest, here a tenth.

    Else one bucket fills while others travel, in fp32; those of whole sums leave after backward, for which they count.
    The experts of a layer, which are one tensor, fill one.
    """
    newest = parameters * workload.dtype.itemsize // 10
    buckets = min(parameters, (BUCKETS_IN_FLIGHT + 1) * max(BUCKET_ELEMENTS, largest_experts(config))) * 4
    if workload.ranks == 1:
        return newest
    return max(newest, buckets) if workload.whole_gradients else buckets


def _step_sizes(config: PretrainedConfig, workload: Workload, tokens: int) -> tuple[int, int]:
    """Bytes of a micro-batch of `tokens`, or of the longest sequence, which is never cut.

    First what forward keeps, then the largest working space after it.
    """
    tokens = max(tokens, workload.max_model_len)
    b, layers, hidden = workload.dtype.itemsize, config.num_hidden_layers, config.hidden_size
    layer = activation_bytes_per_token(
        config,
        workload.dtype,
        layers=workload.layers,
        recompute_mlp=workload.recompute_mlp,
        key_copies=workload.key_copies,
        widest=workload.gradient_checkpointing,
    )
    chunk = CHUNK_BYTES["cuda" if workload.on_gpu else "cpu"]
    head = chunk + 3 * tokens * b * hidden + config.vocab_size * hidden * b
    mlp = mlp_working(config, workload.dtype, layers=workload.layers, recompute_mlp=workload.recompute_mlp)
    part = max(tokens * mlp, recurrent_working(config, workload.dtype, tokens, workload.max_model_len))
    if not workload.gradient_checkpointing:
        return tokens * layers * layer, max(head, part)
    # One hidden state a layer is kept; a layer is recomputed and held with the gradients that pass through it, or with
    # what one of its parts works with.
    return tokens * layers * b * hidden, max(head, tokens * layer + max(tokens * layer, part))


def _transient_name(workload: Workload) -> str:
    return "loss head, or one layer recomputed" if workload.gradient_checkpointing else "loss head, or one MLP"


def _gib(size: int, present: bool = True) -> str:
    return f"{size / GIB:.2f}" if present else "-"
