"""Models too large for one device: FSDP2 keeps a part of every parameter on each rank.

A decoder layer is whole only while it computes, in the policy's dtype; the embedding, the last norm and the head are
whole for one forward and one backward. The parts are fp32 and are the master weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fastgrpo.errors import UserError
from fastgrpo.policy.architecture import of_two_models
from fastgrpo.policy.experts import Parts, parts_in_files, read_parts, router_biases, router_biases_as_buffers
from fastgrpo.policy.packed_attention import PACKED
from fastgrpo.ranks.collectives import awaiting, rank_and_world


def load_sharded(path: Path, device: torch.device, dtype: torch.dtype, *, trained: bool) -> Any:
    """The causal LM in the folder `path`, computing in `dtype` and sharded over all ranks; collective.

    Parts are fp32 where they are `trained`, else of `dtype` and frozen. No rank ever holds more than one layer, or the
    embedding and head, besides its parts. `gathered_call(compute)` of the result is `compute()` while the parameters
    outside the layers are whole. Raises UserError for weights that are missing, of another shape or no safetensors.
    """
    # A fused layer's result is one, in which nothing writes.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    stored = torch.float32 if trained else dtype
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=stored, attn_implementation=PACKED)
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    router_biases_as_buffers(model)
    names = {module: name for name, module in model.named_modules()}
    read = _reader(path, parts_in_files(model))
    for name, bias in list(router_biases(model)):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, read(name, bias.shape).to(device, torch.float32))
    _rebuild_buffers(model, device)
    mesh = DeviceMesh(device.type, range(rank_and_world()[1]))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.base_model.layers, model):
        _fill(part, names[part], lambda name, shape: read(name, shape).to(device, stored), trained)
        # The root too: at rest every parameter is sharded, also after a forward without backward.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        # Losses are scaled so that gradients add up over ranks.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.gathered_call = lambda compute: compute()
    register_fsdp_forward_method(model, "gathered_call")
    return model


@torch.no_grad()
def gathered(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and whole value in `dtype` of each weight of a sharded `model`, tied ones once, one at a time.

    Collective: every rank must go through all of them.
    """
    for name, parameter in model.named_parameters():
        part: Any = parameter.detach().to(dtype)
        with awaiting("the other ranks' parts of the weights"):
            whole = part.full_tensor()
        yield name, whole


def _reader(path: Path, parts: Parts) -> Callable[[str, torch.Size], Tensor]:
    """Reads one tensor by name, of the shape that is expected, from the folder's safetensors files."""
    index = path / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    where: dict[str, Any] = {}
    for file in sorted(files):
        if not (path / file).exists():
            raise UserError(f"model folder {path} has no {file}, which engine.tensor_parallel above 1 reads")
        opened = safe_open(path / file, framework="pt")
        where |= dict.fromkeys(opened.keys(), opened)

    def stored(name: str) -> Tensor:
        if name not in where:
            raise UserError(f"model folder {path} has no weight {name}: save it with transformers' save_pretrained")
        return where[name].get_tensor(name)

    def read(name: str, shape: torch.Size) -> Tensor:
        tensor = read_parts(parts, name, shape, stored)
        if tensor.shape != shape:
            raise of_two_models(path, [name])
        return tensor

    return read


def _fill(part: nn.Module, name: str, read: Callable[[str, torch.Size], Tensor], trained: bool) -> None:
    """Give values to the parameters of `part`, called `name`, that have none yet; tied ones stay tied."""
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in part.named_modules(prefix=name):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter not in filled:
                    filled[parameter] = nn.Parameter(read(f"{prefix}.{leaf}", parameter.shape), requires_grad=trained)
                setattr(module, leaf, filled[parameter])


def _rebuild_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers that are not in files: the modules that have some, the rotary embedding, are made anew on `device`."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            kind: Any = type(module)
            if "Rotary" not in kind.__name__:
                raise UserError(f"engine.tensor_parallel above 1 does not know how to make {name} ({kind.__name__})")
            with torch.device(device):
                model.set_submodule(name, kind(module.config))
