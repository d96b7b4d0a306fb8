"""TRL's GRPOTrainer with our jails: its reward function is the one line that changes. Needs `pip install trl`.

python examples/trl_with_our_jails.py MODEL [STEPS]

The columns beside `prompt` are the tests; MBPP's, HumanEval's, APPS' and open-r1's names are understood as they are.
"""

import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fastgrpo_sandbox.rewards import code_reward

PROBLEMS = [
    ("Write a Python function add(a, b) that returns the sum.", ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]),
    ("Write a Python function last(items) that returns the last item.", ["assert last([1, 2]) == 2"]),
]


def main(model: str, steps: int) -> None:
    """Train `model`, a folder or a name on the hub, for a few steps."""
    rows = Dataset.from_dict(
        {"prompt": [prompt for prompt, _ in PROBLEMS] * 8, "asserts": [asserts for _, asserts in PROBLEMS] * 8}
    )
    settings = GRPOConfig(
        output_dir="runs/trl",
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=64,
        logging_steps=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    GRPOTrainer(model, reward_funcs=[code_reward], args=settings, train_dataset=rows).train()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python examples/trl_with_our_jails.py MODEL [STEPS]")
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
