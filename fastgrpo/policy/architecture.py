"""Which models are trained as vLLM samples them: what their heads do to the logits, and what is refused by name."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastgrpo.errors import UserError
from fastgrpo.kernels.reference import LogitTransform
from fastgrpo.policy.experts import MIXTURES
from fastgrpo.policy.latent_attention import LATENT, latent_settings
from fastgrpo.policy.layer_kinds import RECURRENT_LAYERS, is_recurrent, layer_kinds

# Kinds of layers that keep the sequences of a packed row apart by themselves.
PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "attention", "mlp", "moe"})
# Models with recurrent layers that vLLM computes as transformers does.
RECURRENT = frozenset({"falcon_h1", "granitemoehybrid", "nemotron_h", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"})
# Of these the ones whose layers hand no arguments of the caller's on, before transformers 5.17.
TOLD_NOTHING_BY_5_16 = frozenset({"falcon_h1", "nemotron_h"})
# Kinds of models to which vLLM gives a head of its own, whatever their configuration says of it.
UNTIED = LATENT | {"glm4_moe", "gpt_oss", "minimax_m2", "nemotron_h", "olmoe", "qwen3_next"}


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the model does to its head's products: Gemma's soft cap; Cohere's, Granite's, Falcon-H1's scale inverted."""
    config = config.get_text_config()
    temperature = 1.0
    if config.model_type.startswith("cohere"):
        temperature = 1.0 / config.logit_scale
    elif config.model_type.startswith("granite"):
        temperature = config.logits_scaling
    elif config.model_type == "falcon_h1":
        temperature = 1.0 / config.lm_head_multiplier
    return LogitTransform(temperature, getattr(config, "final_logit_softcapping", None))


def check_architecture(path: Path, config: PretrainedConfig) -> None:
    """Raise UserError naming what of the model in `path` cannot be trained; no weight is read."""
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method", "unknown")
        raise UserError(f"model folder {path} is quantized ({method}): train the model that it was made from")
    text = config.get_text_config()
    if text.tie_word_embeddings and text.model_type in UNTIED:
        raise UserError(
            f"model folder {path} ({config.model_type}) has its embedding as its head, where vLLM has another one that "
            "nothing fills: write the head as lm_head.weight, and tie_word_embeddings false into config.json"
        )
    known = PACKABLE_LAYERS | (RECURRENT_LAYERS if text.model_type in RECURRENT else frozenset())
    odd = sorted(set(layer_kinds(text)) - known)
    if odd:
        raise UserError(f"model folder {path} has layers of the kind {', '.join(odd)}, which cannot be trained packed")
    _check_settings(path, text)
    _check_transformers(path, text)
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
    if any(name.endswith("sinks") for name in names) and text.model_type != "gpt_oss":
        raise UserError(f"model folder {path} ({config.model_type}) has attention sinks, which cannot be trained here")
    if any("expert" in name or "moe" in name for name in names) and text.model_type not in MIXTURES:
        raise UserError(
            f"model folder {path} ({config.model_type}) is a mixture of experts of a kind that is not known here: take "
            f"a dense model, or a mixture of {', '.join(sorted(MIXTURES))}"
        )


def _check_settings(path: Path, text: Any) -> None:
    """Raise UserError where vLLM would read the configuration of the model in `path` otherwise than transformers."""
    settings: dict[str, tuple[Any, Any]] = {}
    if text.model_type in LATENT:
        settings = latent_settings(text)
    elif text.model_type == "gpt_oss":
        settings = _gpt_oss_settings(text)
    for name, (found, value) in settings.items():
        if found != value:
            raise UserError(
                f"model folder {path} ({text.model_type}) has {name} {found!r} in config.json, where vLLM "
                f"computes what transformers does with {value!r} alone: set it so if the model was trained with that"
            )


def _gpt_oss_settings(text: Any) -> dict[str, tuple[Any, Any]]:
    """What a gpt-oss has of what vLLM does not read, and what vLLM has there."""
    kinds = "sliding_attention", "full_attention"
    wanted: dict[str, Any] = {"rms_norm_eps": 1e-5, "attention_bias": True}
    # Older versions of transformers have these in their code.
    wanted |= {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    settings: dict[str, tuple[Any, Any]] = {name: (getattr(text, name, value), value) for name, value in wanted.items()}
    settings["layer_types"] = text.layer_types, [kinds[layer % 2] for layer in range(text.num_hidden_layers)]
    rotation = text.rope_parameters or {}
    settings["rope_type"] = rotation.get("rope_type", "default"), "yarn"
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        settings[name] = rotation.get(name), None
    settings["partial_rotary_factor"] = rotation.get("partial_rotary_factor") or 1.0, 1.0
    return settings


def _check_transformers(path: Path, text: PretrainedConfig) -> None:
    """Raise UserError where transformers, which is 5.16 at least, is too old for the model in `path`."""
    rotated, newer = getattr(text, "rotary_dim", None), ""
    if text.model_type == "minimax_m2" and rotated and "partial_rotary_factor" not in (text.rope_parameters or {}):
        newer = f"rotates all columns of each head and not {rotated}: install 5.18"
    elif text.model_type in TOLD_NOTHING_BY_5_16 and Version(transformers.__version__) < Version("5.17"):
        newer = "does not tell recurrent layers which tokens are one sequence: install 5.17"
    if newer:
        here = f"transformers {transformers.__version__}"
        raise UserError(f"for model folder {path} ({text.model_type}) {here} {newer} or newer")


def check_options(path: str | os.PathLike[str], config: PretrainedConfig, *, compiled: bool, sharded: bool) -> None:
    """Raise UserError where the model in `path` has recurrent layers, which are neither compiled nor sharded here.

    Or sinks, which are not compiled: what `packed_attention.Sunk` writes torch.compile would take for a copy.
    """
    if compiled and config.get_text_config().model_type == "gpt_oss":
        raise UserError(f"model folder {path} has attention sinks, for which model.compile is not made: leave it unset")
    if is_recurrent(config) and (compiled or sharded):
        key = "model.compile" if compiled else "engine.tensor_parallel"
        raise UserError(f"model folder {path} has recurrent layers, for which {key} is not made: leave it unset")


def check_weights(path: Path, model: nn.Module, missing: Collection[str], misshapen: Collection[str]) -> None:
    """Raise UserError where the folder lacks weights, which were then drawn at random, or has some that are not finite.

    `missing`: names of those that were not found; `misshapen`: of those whose shape is not the configuration's.
    """
    if misshapen:
        raise of_two_models(path, misshapen)
    if missing:
        raise UserError(
            f"model folder {path} has no weight {_some(missing)}: save it with transformers' save_pretrained"
        )
    broken = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
    if broken:
        raise UserError(f"model folder {path} has numbers that are not finite in {_some(broken)}: it is damaged")


def of_two_models(path: Path, misshapen: Collection[str]) -> UserError:
    """What is said of weights whose shape is not what the folder's configuration says."""
    return UserError(
        f"model folder {path}: {_some(misshapen)} has another shape than config.json says, as where files of two "
        "models are mixed: download or save it again"
    )


def _some(names: Collection[str]) -> str:
    first, *rest = sorted(names)
    return first + (f" and {len(rest)} more" if rest else "")
