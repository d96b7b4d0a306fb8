"""A policy from a Hugging Face folder, of which what cannot be trained as it is sampled is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from fastgrpo.config import Config
from fastgrpo.errors import UserError, first_line
from fastgrpo.policy.architecture import check_options, check_weights
from fastgrpo.policy.experts import keep_router_biases, router_biases_as_buffers
from fastgrpo.policy.folder import load_config, load_tokenizer
from fastgrpo.policy.fsdp import load_sharded
from fastgrpo.policy.fused_layers import recompute_mlps, ungroup_odd_experts
from fastgrpo.policy.latent_attention import norm_latents_as_vllm
from fastgrpo.policy.layer_kinds import is_recurrent
from fastgrpo.policy.model import Policy, packed_inputs
from fastgrpo.policy.packed_attention import PACKED
from fastgrpo.policy.placement import policy_device, policy_dtype
from fastgrpo.policy.recurrent import recur_within_runs
from fastgrpo.policy.routing_replay import let_replay
from fastgrpo.types import Runs


def load_policy(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    recompute_mlp: bool = False,
    compile_layers: bool = False,
    lora_rank: int = 0,
    lora_alpha: float = 32.0,
    lora_base: str = "",
    lora_revision: str = "",
    sharded: bool = False,
    trained: bool = True,
) -> Policy:
    """Load a Hugging Face causal LM folder for training; the options are `Policy`'s methods of the same names.

    Layers are fused (`Policy.fuse_layers`) unless torch compiles them. `lora_rank` 0 trains all weights; adapters note
    as their base `lora_base` of `lora_revision`, or else `path`. `sharded` over all ranks; one that is not to be
    `trained` is smaller then.

    Raises UserError if the folder is not a causal LM with its tokenizer and all of its weights, or one whose attention
    or head is not known here.
    """
    described = load_config(path)
    check_options(path, described, compiled=compile_layers, sharded=sharded)
    tokenizer = load_tokenizer(path)
    keep_router_biases(described)
    model = _load_model(Path(path), torch.device(device), dtype, sharded=sharded, trained=trained)
    ungroup_odd_experts(model, dtype)
    norm_latents_as_vllm(model, described)
    let_replay(model)
    for module in model.modules():
        # vLLM has none: what is trained would not be what sampled.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # A mixture's, of what its router reads.
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.0
    if is_recurrent(described):
        recur_within_runs(model.base_model)
    policy = Policy(model.train(), tokenizer, sharded_as=dtype if sharded else None)
    vocabulary = len(policy.head_weight)
    if tokenizer.eos_token_id >= vocabulary:
        raise UserError(
            f"the tokenizer in {path} ends with token {tokenizer.eos_token_id} and the model knows {vocabulary}: give"
            " the model that row with resize_token_embeddings, or the tokenizer another eos_token"
        )
    if not sharded:
        _check_head(Path(path), policy)
    if lora_rank:
        policy.add_lora(lora_rank, lora_alpha, base=lora_base or str(Path(path).resolve()), revision=lora_revision)
    policy.gradient_checkpointing(gradient_checkpointing)
    if not compile_layers:
        policy.fuse_layers(recompute_mlp=recompute_mlp)
        return policy
    if recompute_mlp:
        recompute_mlps(policy.model.base_model)
    policy.compile_layers()
    return policy


def load_configured(path: str | os.PathLike[str], config: Config, *, trained: bool = True) -> Policy:
    """`load_policy` as the run's configuration has it; what is not to be `trained`, a reference, is the bare model."""
    model = config.model
    # A folder that was made here from what the hub has is known here alone.
    of_hub = bool(model.revision) and Path(path).name == model.revision
    return load_policy(
        path,
        device=policy_device(),
        dtype=policy_dtype(config),
        gradient_checkpointing=trained and model.gradient_checkpointing,
        recompute_mlp=trained and model.recompute_mlp,
        compile_layers=trained and model.compile,
        lora_rank=model.lora_rank if trained else 0,
        lora_alpha=model.lora_alpha,
        lora_base=model.source if of_hub else "",
        lora_revision=model.revision if of_hub else "",
        sharded=config.engine.tensor_parallel > 1,
        trained=trained,
    )


def _load_model(path: Path, device: torch.device, dtype: torch.dtype, *, sharded: bool, trained: bool) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        if sharded:
            return load_sharded(path, device, dtype, trained=trained)
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": PACKED, "trust_remote_code": False}
        # What does not match is named by `check_weights`.
        told: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **told, **options)
    except (ValueError, OSError, KeyError, SafetensorError, UnpicklingError) as error:
        reason = first_line(error)
        raise UserError(f"model folder {path} does not load as a Hugging Face causal LM: {reason}") from error
    model, found = loaded
    router_biases_as_buffers(model.to(device))
    check_weights(path, model, found["missing_keys"], [name for name, *_ in found["mismatched_keys"]])
    return model


@torch.no_grad()
def _check_head(path: Path, policy: Policy) -> None:
    """Raise UserError where the model's own logits are not those of `Policy.logits`, which the loss is made of."""
    bounds = torch.tensor([0, 2], dtype=torch.int32, device=policy.device), 2
    ids = torch.arange(2, device=policy.device)
    runs = Runs(*bounds, *bounds)
    theirs = policy.model(**packed_inputs(policy.model.config, ids, ids, runs)).logits.squeeze(0).float()
    ours = policy.logits(policy.forward(ids, ids, runs))
    if not bool((theirs - ours).abs().max() <= 0.02 * theirs.abs().max()):
        kind = type(policy.model).__name__
        raise UserError(
            f"model folder {path}: {kind} does more to its logits than is known here, so it cannot be trained"
        )
