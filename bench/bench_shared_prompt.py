"""A recurrent layer over groups that share their prompts: each prompt computed once, and again for each completion.

    python bench/bench_shared_prompt.py [--size qwen3-next] [--groups 4] [--members 8] [--prompt 512]
        [--completion 512] [--uneven] [--dtype bfloat16] [--save FILE]

The whole layer, forward and backward, with random weights: projections, convolution, the recurrent function, norm and
output. Both layouts take turns; each call of the layer takes rows of similar lengths. A layer whose calls, rows and
states cost nothing by themselves would take as much less time as there are fewer tokens in rows. Memory is what forward
leaves for backward. A CPU has a quarter of the width.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from bench_recurrent import DEVICE, MIB, Memory
from engine_setup import report, save
from model_shapes import CUDA, device_name, timed
from torch import Tensor, nn
from transformers.models.granitemoehybrid.configuration_granitemoehybrid import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from fastgrpo.policy.layer_kinds import widths
from fastgrpo.policy.recurrent import Group, Rows, recur_within_runs, rows_of
from fastgrpo.training.packing import pack
from fastgrpo.types import Sample

CUT = 1 if CUDA else 4
CONFIGS = {
    "qwen3-next": Qwen3NextConfig(
        hidden_size=2048 // CUT,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=16 // CUT,
        linear_num_value_heads=32 // CUT,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    ),
    "granite-4-tiny": GraniteMoeHybridConfig(
        hidden_size=1536 // CUT,
        num_hidden_layers=1,
        layer_types=["mamba"],
        mamba_n_heads=48 // CUT,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
    ),
}
TURNS = 5


def samples_of(prompt: int, completion: int, groups: int, members: int, *, uneven: bool) -> list[Sample]:
    """Samples of so many tokens, or of a quarter of them to all."""
    draw = random.Random(0)

    def tokens(most: int) -> int:
        return draw.randint(most // 4, most) if uneven else most

    samples = list[Sample]()
    for _ in range(groups):
        begun = np.full(tokens(prompt), len(samples))
        for _ in range(members):
            mask = np.repeat([False, True], [len(begun), tokens(completion)])
            samples.append(Sample(np.concatenate([begun, np.zeros(mask.sum())]), mask, np.zeros(len(mask))))
    return samples


def layer_of(size: str, dtype: torch.dtype) -> nn.Module:
    """The recurrent layer of `size` with random weights."""
    config = CONFIGS[size]
    made = Qwen3NextGatedDeltaNet if size == "qwen3-next" else GraniteMoeHybridMambaLayer
    holder = nn.ModuleList([made(config, 0)]).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in holder.parameters():
            # Weights of products; the others are what transformers begins with, some of which it leaves unset.
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(0.5)
    recur_within_runs(holder)
    return holder[0]


def again(rows: Rows) -> Rows:
    """Such rows of whole sequences as if no state were asked for."""
    return Rows([Group(group.index_SL) for group in rows.groups], rows.back_T)


def both(function: partial[Tensor], given: list[Tensor]) -> tuple[float, float]:
    """Seconds forward and backward, to the gradients of what is given first, and of weights."""
    output, ahead = timed(lambda: function(given[0]))
    _, back = timed(lambda: torch.autograd.grad(output.sum(), given))
    return ahead, back


def kept(function: partial[Tensor], x: Tensor) -> int:
    """Bytes that forward leaves, its output aside."""
    with Memory() as counted:
        output = function(x)
        return counted.now - output.untyped_storage().nbytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*CONFIGS], default="qwen3-next")
    parser.add_argument("--groups", type=int, default=4 if CUDA else 1)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512 if CUDA else 256)
    parser.add_argument("--completion", type=int, default=512 if CUDA else 256)
    parser.add_argument("--uneven", action="store_true", help="lengths are from a quarter of these to all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    config, dtype = CONFIGS[options.size], getattr(torch, options.dtype)
    layer = widths(config)
    assert layer is not None
    sizes = options.prompt, options.completion, options.groups, options.members
    samples = samples_of(*sizes, uneven=options.uneven)
    (batch,) = pack(samples, [1.0] * len(samples), 2**40, DEVICE)
    title = (
        f"{options.size}'s recurrent layer, {options.groups} prompts of {options.prompt} tokens, each with "
        f"{options.members} completions of {options.completion}{', or less' * options.uneven}, {options.dtype}"
    )
    print(f"{title}; {device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    model = layer_of(options.size, dtype)
    tokens = len(batch.input_ids_T)
    x = torch.randn(1, tokens, config.hidden_size, dtype=dtype, device=DEVICE).requires_grad_()
    layouts = {
        "each prompt once": rows_of(batch.runs, layer.before),
        "again for each completion": again(rows_of(batch.runs, 2**30)),
    }
    functions = {name: partial(model, rows=rows) for name, rows in layouts.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(TURNS + 1):
        for name, function in functions.items():
            taken = both(function, [x, *model.parameters()])
            # The first calls compile.
            if turn:
                seconds[name].append(taken)
    laid = {name: sum(group.index_SL.numel() for group in rows.groups) for name, rows in layouts.items()}
    totals = {name: median(map(sum, times)) for name, times in seconds.items()}
    whole = "again for each completion"
    for name, function in functions.items():
        ahead, back = (1e3 * median(each) for each in zip(*seconds[name], strict=True))
        report(
            name,
            f"{ahead:.1f} + {back:.1f} = {1e3 * totals[name]:.1f} ms, {totals[name] / totals[whole]:.2f} of the time; "
            f"{laid[name]} tokens in rows, {laid[name] / laid[whole]:.2f}, of {len(layouts[name].groups)} calls; "
            f"keeps {kept(function, x) / MIB:.1f} MiB",
        )
    with torch.no_grad():
        once, other = (function(x).float() for function in functions.values())
    report("outputs apart", f"{float((once - other).norm() / other.norm()):.1e} of their norm")
    if options.save:
        save(options.save, title)


if __name__ == "__main__":
    main()
