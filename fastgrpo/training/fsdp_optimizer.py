"""AdamW where FSDP2 shards the model (`policy.fsdp`), and the choice between the two optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.training.optimizer import AdamW, AdamWOptions, StepReport, clip_gradients
from fastgrpo.training.tensor_files import Part, load_tensors, own_parts

if TYPE_CHECKING:
    from fastgrpo.policy.model import Policy


def optimizer_of(
    policy: Policy, options: AdamWOptions, *, offload: bool = False, whole_gradients: bool = False
) -> AdamW | ShardedAdamW:
    """AdamW for the policy's parameters, over the ranks as these are.

    A sharded policy's state is never offloaded, nor are its gradients ever whole.
    """
    if policy.sharded_as is not None:
        return ShardedAdamW(policy.model.parameters(), options)
    return AdamW(policy.model.parameters(), options, offload=offload, whole_gradients=whole_gradients)


class ShardedAdamW:
    """torch's AdamW on the parts of a sharded model, with the methods and the rules of `optimizer.AdamW`.

    FSDP2 leaves each part's gradient, summed over micro-batches and ranks in fp32, in `parameter.grad`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], options: AdamWOptions) -> None:
        """`lr` may change between steps."""
        self.lr, self._options = options.lr, options
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in self._parameters if parameter.ndim > 1]},
            {"params": [parameter for parameter in self._parameters if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, options.lr, options.betas, options.eps, options.weight_decay, fused=True)
        for parameter in self._parameters:
            # What torch makes at the first step: a checkpoint is loaded into it.
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self) -> StepReport:
        """Apply the gradients gathered since the last step and forget them. Collective over the ranks."""
        gradients = [_local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        report = clip_gradients(gradients, self._options)
        if not report.skipped:
            for group in self._adam.param_groups:
                group["lr"] = self.lr
            self._adam.step()
        self.zero_grad()
        return report

    def zero_grad(self) -> None:
        """Forget the gradients gathered since the last step."""
        self._adam.zero_grad()

    def parts(self) -> dict[str, Part]:
        """This rank's parts of master weights and moments, in the memory where they are used."""
        return own_parts(self._state())

    def load(self, folder: Path) -> None:
        """Restore all ranks' `parts`, the parameters included, on any number of ranks; each reads its own."""
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
