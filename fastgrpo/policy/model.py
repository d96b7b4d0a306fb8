"""The policy: any Hugging Face causal LM, run over packed sequences."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fastgrpo.config import Config
from fastgrpo.errors import UserError, first_line
from fastgrpo.kernels.reference import scaled_logits
from fastgrpo.policy.architecture import (
    check_architecture,
    check_readable,
    check_weights,
    end_token_ids,
    logit_transform,
)
from fastgrpo.policy.fsdp import gathered, load_sharded
from fastgrpo.policy.fused_layers import fuse_layers, recompute_mlps, restore_layers, stack_weights
from fastgrpo.policy.lora import adapters_off, add_adapters, merged_weights
from fastgrpo.policy.packed_attention import PACKED
from fastgrpo.ranks.collectives import STEP_WAIT_S, rank_and_world
from fastgrpo.ranks.deadlines import within
from fastgrpo.types import Batch, Runs

Result = TypeVar("Result")
LATE = f"waited for the other ranks' parts of the model longer than {STEP_WAIT_S:.0f} s"


@dataclass(slots=True)
class Policy:
    """A causal LM in training and its tokenizer.

    `shares_weights`: its parameters are views of vLLM's tensors, so what the optimizer writes is what vLLM samples
    from. `copies_weights`: vLLM holds a copy, renewed at each sync. `adapted`: it has LoRA adapters, which alone train.
    `sharded_as`: each rank has its part of every parameter, and they compute in this dtype (see `policy.fsdp`); then
    `gathered`, `backward`, `logprobs`, `weights` and `save_hf` are collective.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shares_weights: bool = False
    copies_weights: bool = False
    adapted: bool = False
    sharded_as: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
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
        return self.forward(batch.input_ids_T, batch.position_ids_T, batch.runs)

    def forward(self, input_ids_T: Tensor, position_ids_T: Tensor, runs: Runs) -> Tensor:
        """`hidden` from what describes the packing."""
        return self.model.base_model(**_inputs(input_ids_T, position_ids_T, runs)).last_hidden_state.squeeze(0)

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
        """Hugging Face's name and the value of each weight, tied ones once; merged or gathered one at a time."""
        return merged_weights(self.model) if self.sharded_as is None else gathered(self.model, self.sharded_as)

    def add_lora(self, rank: int, alpha: float) -> None:
        """Train adapters of `rank` on the decoder's linear layers, scaled by `alpha` / `rank`, and nothing else."""
        add_adapters(self.model, self.model.base_model, rank, alpha)
        self.adapted = True

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Keep one hidden state a layer and recompute the rest in backward: memory for a third more arithmetic."""
        if enabled:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def fuse_layers(self, *, recompute_mlp: bool = False) -> None:
        """Run the decoder's layers on the kernels of `kernels.layer` where their kind is known, else as they are.

        `recompute_mlp` keeps attention's products and computes those of gate and up once more in backward.
        """
        decoder = self.model.base_model
        if fuse_layers(decoder, recompute_mlp=recompute_mlp):
            if self.sharded_as is None:
                stack_weights(decoder)
        elif recompute_mlp:
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

        Called on every rank, the first one writes.
        """
        first = rank_and_world()[0] == 0
        if self.sharded_as is None and not first:
            return
        # A view of vLLM's stacked tensors would be saved with its whole storage.
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self.weights() if first}
        if first:
            _save_model(self._whole_model(), Path(folder), state)
            self.tokenizer.save_pretrained(folder)

    def _whole_model(self) -> PreTrainedModel:
        """What Hugging Face saves: the model, or one without memory of the class and dtype of a sharded one."""
        if self.sharded_as is None:
            return self.model
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(self.model.config, dtype=self.sharded_as)
        whole.generation_config = self.model.generation_config
        return whole


class BasePolicy(Policy):
    """A policy with LoRA as it is without its adapters, in the same memory."""

    def forward(self, input_ids_T: Tensor, position_ids_T: Tensor, runs: Runs) -> Tensor:
        with adapters_off(self.model):
            return Policy.forward(self, input_ids_T, position_ids_T, runs)


def policy_device() -> torch.device:
    """This process's GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def policy_dtype(config: Config) -> torch.dtype:
    """The type of the weights, in vLLM and in the trainer alike."""
    if config.engine.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.engine.dtype)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; where it names no end token, the first one of the model's.

    Raises UserError if the folder has none that loads, or no end token anywhere.
    """
    _check_folder(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of whichever library reads the files
        raise UserError(f"the tokenizer in {path} does not load: {first_line(error)}; mend its files") from error
    if not tokenizer.encode("a", add_special_tokens=False):
        raise UserError(f"the tokenizer in {path} knows no text, as where tokenizer.json is missing: put it there")
    if tokenizer.eos_token_id is None and (ends := end_token_ids(Path(path))):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} has no eos_token, which ends a completion: set it and save it there")
    return tokenizer


def load_config(path: str | os.PathLike[str]) -> PretrainedConfig:
    """The architecture of a Hugging Face folder.

    Raises UserError if it is not a causal LM with its tokenizer, or one that cannot be trained.
    """
    _check_folder(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_architecture(Path(path), config)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"model folder {path} has no usable config.json: {first_line(error)}") from error
    return config


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
    sharded: bool = False,
    trained: bool = True,
) -> Policy:
    """Load a Hugging Face causal LM folder for training; the options are `Policy`'s methods of the same names.

    Layers are fused (`Policy.fuse_layers`) unless torch compiles them. `lora_rank` 0 trains all weights. `sharded` over
    all ranks; one that is not to be `trained` is smaller then.

    Raises UserError if the folder is not a causal LM with its tokenizer and all of its weights, or one whose attention
    or head is not known here.
    """
    load_config(path)
    tokenizer = load_tokenizer(path)
    model = _load_model(Path(path), torch.device(device), dtype, sharded=sharded, trained=trained)
    for module in model.modules():
        # vLLM has none: what is trained would not be what sampled.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
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
        policy.add_lora(lora_rank, lora_alpha)
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
    return load_policy(
        path,
        device=policy_device(),
        dtype=policy_dtype(config),
        gradient_checkpointing=trained and model.gradient_checkpointing,
        recompute_mlp=trained and model.recompute_mlp,
        compile_layers=trained and model.compile,
        lora_rank=model.lora_rank if trained else 0,
        lora_alpha=model.lora_alpha,
        sharded=config.engine.tensor_parallel > 1,
        trained=trained,
    )


def _load_model(path: Path, device: torch.device, dtype: torch.dtype, *, sharded: bool, trained: bool) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        if sharded:
            return load_sharded(path, device, dtype, trained=trained)
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": PACKED, "trust_remote_code": False}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (ValueError, OSError, KeyError, SafetensorError, UnpicklingError) as error:
        reason = first_line(error)
        raise UserError(f"model folder {path} does not load as a Hugging Face causal LM: {reason}") from error
    model, found = loaded
    model.to(device)
    check_weights(path, model, found["missing_keys"])
    return model


@torch.no_grad()
def _check_head(path: Path, policy: Policy) -> None:
    """Raise UserError where the model's own logits are not those of `Policy.logits`, which the loss is made of."""
    bounds = torch.tensor([0, 2], dtype=torch.int32, device=policy.device), 2
    ids = torch.arange(2, device=policy.device)
    runs = Runs(*bounds, *bounds)
    theirs = policy.model(**_inputs(ids, ids, runs)).logits.squeeze(0).float()
    ours = policy.logits(policy.forward(ids, ids, runs))
    if not bool((theirs - ours).abs().max() <= 0.02 * theirs.abs().max()):
        kind = type(policy.model).__name__
        raise UserError(
            f"model folder {path}: {kind} does more to its logits than is known here, so it cannot be trained"
        )


def _inputs(input_ids_T: Tensor, position_ids_T: Tensor, runs: Runs) -> dict[str, Any]:
    """The arguments of a transformers model for one packed row."""
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
    }


def _save_model(model: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> None:
    """Write model and generation settings as they came: transformers refuses to save some of those that it loads."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / "generation_config.json")


def _check_folder(path: Path) -> None:
    needed = {
        "config.json": "a Hugging Face model has one; point --model at the folder that holds it",
        "tokenizer_config.json": "save the tokenizer into the same folder with tokenizer.save_pretrained",
    }
    if not path.is_dir():
        wrong = "is a file" if path.exists() else "does not exist"
        raise UserError(f"model folder {path} {wrong}; --model takes a folder, a name on the hub, a GGUF file")
    check_readable(path)
    for name, fix in needed.items():
        if not (path / name).is_file():
            raise UserError(f"model folder {path} has no {name}: {fix}")
