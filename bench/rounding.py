"""How far bf16 alone moves a shape's logprobs: about what parity beside vLLM is, with random weights.

    python bench/rounding.py [--size gpt-oss/4] [--tokens 96] [--vocabulary 16384] [--save FILE]

The trainer's own forward pass in bf16 and in fp32, of the same weights and random tokens; needs no GPU and no engine.
Of random experts many are chosen by a rounding, and one that is another changes all layers after it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from engine_setup import report, save
from model_shapes import CUDA, SHAPES, device_name, named, random_model
from torch import Tensor

from fastgrpo.policy.layer_kinds import is_recurrent
from fastgrpo.policy.model import Policy
from fastgrpo.policy.recurrent import recur_within_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b" if CUDA else "tiny")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--vocabulary", type=int, default=16384, help="in place of the shape's own")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    title = f"Logprobs of {options.tokens} tokens in bf16 and in fp32, {named(options.size)}"
    print(f"{title}; {device_name()}, torch {torch.__version__}")
    model = random_model(options.size, "cuda" if CUDA else "cpu", options.vocabulary).eval()
    if is_recurrent(model.config):
        recur_within_runs(model.base_model)
    policy = Policy(model, None)  # type: ignore[arg-type]
    policy.fuse_layers()
    tokens = torch.randint(options.vocabulary, (options.tokens,), generator=torch.Generator().manual_seed(1)).tolist()

    def logprobs() -> Tensor:
        return policy.logprobs([tokens])[0].double()

    rounded = logprobs()
    model.float()
    apart = (rounded - logprobs()).abs()
    report("apart, nats: mean; largest", f"{apart.mean():.4f}; {apart.max():.3f}")
    if options.save:
        save(options.save, title)


if __name__ == "__main__":
    main()
