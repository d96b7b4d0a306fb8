"""What a run will do and need, before it does anything: `--dry-run` prints it, training holds to it."""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

from fastgrpo.config import Config
from fastgrpo.config_files import to_toml
from fastgrpo.flow.problems.loading import load_problems
from fastgrpo.policy.demo_policy import policy_config
from fastgrpo.policy.model import load_config
from fastgrpo.training.workload import memory_plan


def print_plan(config: Config) -> None:
    """The resolved configuration, the sizes of both stages and the memory plan."""
    problems, held_out = load_problems(config)
    grpo = config.grpo
    rollouts = grpo.prompts_per_step * grpo.group_size
    print(to_toml(config))
    print(f"problems        {len(problems)} for training, {len(held_out)} held out")
    if config.model.path:
        print(f"policy          {config.model.path}")
        model = load_config(config.model.path)
    else:
        print(f"stage 1         {len(problems) * config.sft.teacher_samples} traces, {config.sft.epochs} epochs")
        model = policy_config()
    print(f"stage 2         {grpo.steps} steps of {rollouts} rollouts, {grpo.steps * rollouts} workflows in all")
    print(f"evaluation      {len(held_out) * config.eval.samples} workflows before and after")
    # Of the fewest ranks that can train it.
    print(memory_plan(config, model, ranks=config.engine.tensor_parallel).table())
