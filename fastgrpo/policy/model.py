"""The policy: any Hugging Face causal LM, run over packed sequences."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastgrpo.kernels.reference import scaled_logits
from fastgrpo.policy.architecture import logit_transform
from fastgrpo.policy.experts import parts_in_files, router_biases
from fastgrpo.policy.fsdp import gathered
from fastgrpo.policy.fused_layers import fuse_experts, fuse_layers, recompute_mlps, restore_layers, stack_weights
from fastgrpo.policy.host_copy import host_copy
from fastgrpo.policy.layer_kinds import widths
from fastgrpo.policy.lora import adapter_state, adapters_off, add_adapters, merged_weights, save_adapters
from fastgrpo.policy.recurrent import rows_of
from fastgrpo.policy.routing_replay import replay
from fastgrpo.ranks.collectives import STEP_WAIT_S, is_first_rank
from fastgrpo.ranks.deadlines import within
from fastgrpo.types import Batch, RoutingReplay, Runs

Result = TypeVar("Result")
LATE = f"waited for the other ranks' parts of the model longer than {STEP_WAIT_S:.0f} s"


@dataclass(slots=True)
class Policy:
    """A causal LM in training and its tokenizer.

    `shares_weights`: its parameters are views of vLLM's tensors, so what the optimizer writes is what vLLM samples
    from. `copies_weights`: vLLM holds a copy, renewed at each sync. `adapted`: it has LoRA adapters, which alone train.
    `sharded_as`: each rank has its part of every parameter, and they compute in this dtype (see `policy.fsdp`); then
    `gathered`, `backward`, `logprobs`, `weights`, `copied` and `save_hf` are collective.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shares_weights: bool = False
    copies_weights: bool = False
    adapted: bool = False
    sharded_as: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """Where the head is, and all that is computed."""
        return self.head_weight.device

    @property
    def head_weight(self) -> nn.Parameter:
        """The output projection, [V, H]; with tied embeddings the embedding itself."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> nn.Parameter | None:
        """The output projection's bias, [V], where it has one."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    def head(self, temperature: float) -> dict[str, Any]:
        """The head's arguments of `kernels.linear_logprob` and `linear_grpo_loss`, at a sampling temperature."""
        transform = logit_transform(self.model.config)
        return {
            "weight_VH": self.head_weight,
            "bias": self.head_bias,
            "softcap": transform.softcap,
            "temperature": temperature * transform.temperature,
        }

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """logits_TV (fp32) at temperature 1; meant for few tokens."""
        raw_TV = functional.linear(hidden_TH, self.head_weight, self.head_bias)
        return scaled_logits(raw_TV, logit_transform(self.model.config))

    def gathered(self, compute: Callable[[], Result]) -> Result:
        """Run `compute`, which calls `hidden` or `forward` and reads the head, with all parameters gathered."""
        if self.sharded_as is None:
            return compute()
        with within(STEP_WAIT_S, LATE):
            return self.model.gathered_call(compute)  # type: ignore[operator]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to those of the step."""
        with within(STEP_WAIT_S, LATE) if self.sharded_as else nullcontext():
            loss.backward()

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states hidden_TH of a packed batch, after the last norm and before the head. No logits."""
        return self.forward(batch.input_ids_T, batch.position_ids_T, batch.runs, batch.replay)

    def forward(
        self, input_ids_T: Tensor, position_ids_T: Tensor, runs: Runs, routes: RoutingReplay | None = None
    ) -> Tensor:
        """`hidden` from what describes the packing."""
        replay(self.model, routes)
        inputs = packed_inputs(self.model.config, input_ids_T, position_ids_T, runs)
        return self.model.base_model(**inputs).last_hidden_state.squeeze(0)

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[Sequence[int]], *, fp8_cache: bool = False) -> list[Tensor]:
        """Logprobs (fp32) at temperature 1 of tokens 1.. of each sequence; meant for a few short ones.

        `fp8_cache`: over keys and values as vLLM keeps them in an FP8 cache.
        """
        lengths = [len(sequence) for sequence in sequences]
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        input_ids_T = torch.tensor([token for sequence in sequences for token in sequence], device=self.device)
        cu_seqlens_S = torch.tensor([0, *lengths], device=self.device).cumsum(0).int()
        runs = Runs(cu_seqlens_S, max(lengths), cu_seqlens_S, max(lengths), fp8_cache=fp8_cache)
        logits_TV = self.gathered(lambda: self.logits(self.forward(input_ids_T, positions, runs)))
        logprobs_TV = logits_TV.log_softmax(-1)
        # What a sequence's last token would predict is the next sequence's first: rolled in, then left out.
        logprobs_T = logprobs_TV.gather(1, input_ids_T.roll(-1)[:, None]).squeeze(1)
        return [part[:-1] for part in logprobs_T.split(lengths)]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The name and value that files have of each weight, tied ones once; merged or gathered one at a time."""
        whole = merged_weights(self.model) if self.sharded_as is None else gathered(self.model, self.sharded_as)
        parts = parts_in_files(self.model)
        for name, weight in chain(whole, router_biases(self.model)):
            yield from parts(name, weight)

    def add_lora(self, rank: int, alpha: float, **base: str) -> None:
        """Train adapters of `rank` on the decoder's linear layers, scaled by `alpha` / `rank`, and nothing else.

        `base` and `revision` are noted with what is saved of them.
        """
        add_adapters(self.model, self.model.base_model, rank, alpha, **base)
        self.adapted = True

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Keep one hidden state a layer and recompute the rest in backward: memory for a third more arithmetic."""
        if enabled:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def fuse_layers(self, *, recompute_mlp: bool = False) -> None:
        """Run the decoder's layers on the kernels of `kernels.layer` where their kind is known, else experts on theirs.

        `recompute_mlp` keeps attention's products and computes those of gate and up once more in backward.
        """
        decoder = self.model.base_model
        if fuse_layers(decoder, recompute_mlp=recompute_mlp):
            if self.sharded_as is None:
                stack_weights(decoder)
            return
        fuse_experts(decoder)
        if recompute_mlp:
            recompute_mlps(decoder)

    def compile_layers(self) -> None:
        """Fuse each decoder layer with torch.compile instead: a minute at the first step."""
        restore_layers(self.model.base_model)
        layers: Any = self.model.base_model.layers
        for layer in layers:
            layer.compile(dynamic=True)

    @torch.no_grad()
    def own_weights(self) -> None:
        """Move parameters that are views of vLLM's tensors back into memory of their own."""
        if self.shares_weights:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()
        self.shares_weights = False

    def save_hf(self, folder: str | os.PathLike[str]) -> None:
        """Write model and tokenizer in Hugging Face format; `load_policy(folder)` reads them back.

        Of adapters the model has them merged, and the folder `adapter` in it has them alone, in peft's format.
        Called on every rank, the first one writes.
        """
        self.copied()(Path(folder))

    def copied(self) -> Callable[[Path], object]:
        """What `save_hf` writes, copied into the first rank's host memory: call it with the folder, in any thread.

        The weights may change meanwhile. Called on every rank; what it returns is not collective.
        """
        first = is_first_rank()
        if self.sharded_as is None and not first:
            return lambda folder: None
        # A view of vLLM's stacked tensors would be saved with its whole storage, and what transformers cuts or finds in
        # one storage it copies once more.
        state = {name: host_copy(tensor) for name, tensor in self.weights() if first}
        adapters = {name: host_copy(tensor) for name, tensor in adapter_state(self.model).items() if first}
        # Here: transformers makes a model under another default type of torch, which all threads have in common.
        whole = self._whole_model() if first else None

        def write(folder: Path) -> None:
            if whole is not None:
                save_model(whole, folder, state)
                self.tokenizer.save_pretrained(folder)
            if adapters:
                save_adapters(adapters, self.model.base_model, folder / "adapter")

        return write

    @property
    def copied_bytes(self) -> int:
        """What `copied` takes of this rank's host memory."""
        if not is_first_rank():
            return 0
        weights = sum(each.numel() * (self.sharded_as or each.dtype).itemsize for each in self.model.parameters())
        return weights + sum(bias.nbytes for _, bias in router_biases(self.model))

    def _whole_model(self) -> PreTrainedModel:
        """What Hugging Face saves: the model, or one without memory of the class and dtype of a sharded one."""
        if self.sharded_as is None:
            return self.model
        return without_memory(self.model, self.sharded_as)


class BasePolicy(Policy):
    """A policy with LoRA as it is without its adapters, in the same memory."""

    def forward(
        self, input_ids_T: Tensor, position_ids_T: Tensor, runs: Runs, routes: RoutingReplay | None = None
    ) -> Tensor:
        with adapters_off(self.model):
            return Policy.forward(self, input_ids_T, position_ids_T, runs, routes)


def packed_inputs(config: PretrainedConfig, input_ids_T: Tensor, position_ids_T: Tensor, runs: Runs) -> dict[str, Any]:
    """The arguments of a transformers model of this configuration for one packed row."""
    layer = widths(config)
    recurrent = {} if layer is None else {"rows": rows_of(runs, layer.before)}
    return {
        "input_ids": input_ids_T[None],
        "position_ids": position_ids_T[None],
        "use_cache": False,
        "cu_seq_lens_q": runs.cu_queries_S,
        "cu_seq_lens_k": runs.cu_keys_S,
        "max_length_q": runs.max_queries,
        "max_length_k": runs.max_keys,
        "key_index_U": runs.key_index_U,
        "fp8_cache": runs.fp8_cache,
    } | recurrent


def without_memory(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the class and the settings of `model`, in `dtype`, whose weights have no memory."""
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    bare.generation_config = model.generation_config
    return bare


def save_model(model: PreTrainedModel, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write model and generation settings as they came: transformers refuses to save some of those that it loads.

    `state`: the weights as files have them, where they are not the model's own.
    """
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state, save_original_format=state is None)
    finally:
        model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / "generation_config.json")
