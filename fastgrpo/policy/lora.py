"""LoRA (arXiv 2106.09685) through peft: adapters on linear layers of the decoder are trained, all else is frozen.

vLLM samples from merged weights, W + alpha / rank B A, written into its tensors a few at a time; the trainer keeps
the base. The head has no adapter: the loss reads its weight as one matrix.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgrpo.errors import UserError
from fastgrpo.policy.experts import is_of_experts

ADAPTER = "default"


def peft_module(user: str) -> ModuleType:
    """The package of the adapters. Raises UserError where it is not installed, naming the `user` that needs it."""
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise UserError(f"{user} needs peft, which is not installed: pip install 'fastgrpo[lora]'") from None


def add_adapters(
    model: nn.Module, decoder: nn.Module, rank: int, alpha: float, *, base: str = "", revision: str = ""
) -> None:
    """Freeze `model` and give the `adapted_layers` of `decoder` adapters that change nothing yet.

    They start alike on every rank and after a resume. `base`, of that `revision`: what others load the frozen model by.
    Raises UserError where peft is missing.
    """
    peft = peft_module("model.lora_rank")
    model.requires_grad_(False)
    layers = {name.rpartition(".")[2] for name in adapted_layers(decoder)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(layers), task_type="CAUSAL_LM")
        config.base_model_name_or_path, config.revision = base or None, revision or None
        peft.inject_adapter_in_model(config, decoder, ADAPTER)


def adapted_layers(decoder: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of `decoder`, by name: all but a Mamba layer's last, and but the MLPs where some have experts.

    What other MLPs a mixture has peft takes by their names for its experts. Kernels of Mamba multiply by the last one's
    weight themselves, past an adapter.
    """
    mixture = any(map(is_of_experts, decoder.parameters()))
    past_adapters = {
        module.out_proj for module in decoder.modules() if hasattr(module, "A_log") and hasattr(module, "D")
    }
    return {
        name: layer
        for name, layer in decoder.named_modules()
        if isinstance(layer, nn.Linear) and layer not in past_adapters and not (mixture and ".mlp." in name)
    }


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's name and the value of each weight of `model`, tied ones once; adapters are merged on the way."""
    for name, parameter in model.named_parameters():
        layer_name, _, leaf = name.rpartition(".base_layer.")
        if is_adapter(name):
            continue
        if layer_name and leaf == "weight":
            yield f"{layer_name}.weight", _merged(model.get_submodule(layer_name))
        else:
            yield name.replace(".base_layer.", "."), parameter.detach()


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's parameter."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters by name, which share the model's memory."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if is_adapter(name)}


def save_adapters(adapters: Mapping[str, Tensor], decoder: Any, folder: Path) -> None:
    """Write `adapters`, on the host, which are those of `decoder`, as the folder of one that peft and vLLM load."""
    config = copy.copy(decoder.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(folder)
    # As in peft's own model, which holds the causal LM as base_model.model and leaves the adapter's name out.
    state = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in adapters.items()}
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """`model` is the frozen base until the block ends."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """W + alpha / rank B A, summed in fp32."""
    base, down, up = layer.base_layer.weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return torch.addmm(base.float(), up.float(), down.float(), alpha=layer.scaling[ADAPTER]).to(base.dtype)
