"""Models too large for one device: FSDP2 keeps a part of every parameter on each rank.

A decoder layer is whole only while it computes, in the policy's dtype; the embedding, the last norm and the head are
whole for one forward and one backward. The parts are fp32 and are the master weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fastgrpo.errors import UserError
from fastgrpo.policy.packed_attention import PACKED
from fastgrpo.ranks.collectives import awaiting, rank_and_world
from fastgrpo.training.checkpoint import load_tensors, save_tensors
from fastgrpo.training.optimizer import AdamW, StepReport, clip_gradients

if TYPE_CHECKING:
    from fastgrpo.policy.model import Policy


def load_sharded(path: Path, device: torch.device, dtype: torch.dtype, *, trained: bool) -> Any:
    """The causal LM in the folder `path`, computing in `dtype` and sharded over all ranks; collective.

    Parts are fp32 where they are `trained`, else of `dtype` and frozen. No rank ever holds more than one layer, or the
    embedding and head, besides its parts. `gathered_call(compute)` of the result is `compute()` while the parameters
    outside the layers are whole. Raises UserError for weights that are missing or no safetensors.
    """
    stored = torch.float32 if trained else dtype
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=stored, attn_implementation=PACKED)
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    _rebuild_buffers(model, device)
    names = {module: name for name, module in model.named_modules()}
    read = _reader(path)
    mesh = DeviceMesh(device.type, range(rank_and_world()[1]))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.base_model.layers, model):
        _fill(part, names[part], lambda name: read(name).to(device, stored), trained)
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


def optimizer_of(policy: Policy, *, offload: bool = False, **options: Any) -> AdamW | ShardedAdamW:
    """AdamW for the policy's parameters, over ranks as they are; the options are those of both classes."""
    if policy.sharded_as is not None:
        return ShardedAdamW(policy.model.parameters(), **options)
    return AdamW(policy.model.parameters(), offload=offload, **options)


class ShardedAdamW:
    """torch's AdamW on the parts of a sharded model, with the face and the rules of `optimizer.AdamW`.

    FSDP2 leaves each part's gradient, summed over micro-batches and ranks in fp32, in `parameter.grad`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        skip_grad_norm: float = math.inf,
    ) -> None:
        """Gradients are clipped to a global norm of `max_grad_norm`; above `skip_grad_norm` the step is skipped."""
        self.lr, self.max_grad_norm, self.skip_grad_norm = lr, max_grad_norm, skip_grad_norm
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in self._parameters if parameter.ndim > 1]},
            {"params": [parameter for parameter in self._parameters if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, lr, betas, eps, weight_decay, fused=True)
        for parameter in self._parameters:
            # What torch makes at the first step: a checkpoint is loaded into it.
            self._adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self) -> StepReport:
        """Apply the gradients gathered since the last step and forget them. Collective over the ranks."""
        gradients = [_local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        report = clip_gradients(gradients, self.max_grad_norm, self.skip_grad_norm)
        if not report.skipped:
            for group in self._adam.param_groups:
                group["lr"] = self.lr
            self._adam.step()
        self.zero_grad()
        return report

    def zero_grad(self) -> None:
        """Forget the gradients gathered since the last step."""
        self._adam.zero_grad()

    def save(self, folder: Path) -> None:
        """Write master weights and moments into `folder`, each rank its own; they load on any number of ranks."""
        save_tensors(self._state(), folder)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, the parameters included; each rank reads its own parts."""
        tensors = self._state()
        load_tensors(tensors, folder)
        for parameter, steps in zip(self._parameters, tensors["steps"], strict=True):
            self._adam.state[parameter]["step"].copy_(steps)

    def _state(self) -> dict[str, Tensor]:
        """Master weights and moments, in the memory where they are used."""
        states = [self._adam.state[parameter] for parameter in self._parameters]
        tensors = {"steps": torch.stack([state["step"] for state in states])}
        for index, (parameter, state) in enumerate(zip(self._parameters, states, strict=True)):
            tensors[f"{index}.master"] = parameter.detach()
            tensors |= {f"{index}.{name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
        return tensors


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor), "the gradient of a sharded parameter is sharded"
    return tensor.to_local()


def _reader(path: Path) -> Callable[[str], Tensor]:
    """Reads one tensor by name from the folder's safetensors files."""
    index = path / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    where: dict[str, Any] = {}
    for file in sorted(files):
        if not (path / file).exists():
            raise UserError(f"model folder {path} has no {file}, which engine.tensor_parallel above 1 reads")
        opened = safe_open(path / file, framework="pt")
        where |= dict.fromkeys(opened.keys(), opened)

    def read(name: str) -> Tensor:
        if name not in where:
            raise UserError(f"model folder {path} has no weight {name}: save it with transformers' save_pretrained")
        return where[name].get_tensor(name)

    return read


def _fill(part: nn.Module, name: str, read: Callable[[str], Tensor], trained: bool) -> None:
    """Give values to the parameters of `part`, called `name`, that have none yet; tied ones stay tied."""
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in part.named_modules(prefix=name):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter not in filled:
                    filled[parameter] = nn.Parameter(read(f"{prefix}.{leaf}"), requires_grad=trained)
                setattr(module, leaf, filled[parameter])


def _rebuild_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers are not in the files: the modules that have some, the rotary embedding, are made anew on `device`."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            kind: Any = type(module)
            if "Rotary" not in kind.__name__:
                raise UserError(f"engine.tensor_parallel above 1 does not know how to make {name} ({kind.__name__})")
            with torch.device(device):
                model.set_submodule(name, kind(module.config))
