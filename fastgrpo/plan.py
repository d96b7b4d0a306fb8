"""What a run will do and need, before it does anything: `--dry-run` prints it, training holds to it."""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

from collections.abc import Sequence
from typing import Any

from fastgrpo.config import Config
from fastgrpo.config_files import to_toml
from fastgrpo.policy.chat import load_chat
from fastgrpo.policy.demo_policy import policy_config
from fastgrpo.policy.hub import with_local_model
from fastgrpo.policy.model import load_config
from fastgrpo.rollouts.rollouts import prompts_fit
from fastgrpo.rollouts.sampling import Sampling
from fastgrpo.tasks import Task, require_model, task_of
from fastgrpo.training.workload import memory_plan


def print_plan(config: Config, task: Task | None = None) -> None:
    """The resolved configuration, the sizes of both stages and the memory plan; starts and writes nothing.

    `task` None is the one that the configuration names. Raises UserError where a run would before it starts.
    """
    task = task or task_of(config)
    require_model(config, task)
    config = with_local_model(config, weights=False)
    problems, held_out = (task.list_problems or task.load_problems)(config)
    grpo = config.grpo
    rollouts = grpo.prompts_per_step * grpo.group_size
    print(to_toml(config))
    untried = ", before their own solutions are tried" if task.list_problems else ""
    print(f"problems        {len(problems)} for training, {len(held_out)} held out{untried}")
    if config.model.path:
        print(f"policy          {config.model.path}")
        model = load_config(config.model.path)
        if left_out := _too_long(config, task, [*problems, *held_out]):
            print(f"too long        {left_out} of these problems, which are left out")
    else:
        print(f"stage 1         {len(problems) * config.sft.teacher_samples} traces, {config.sft.epochs} epochs")
        model = policy_config()
    print(f"stage 2         {grpo.steps} steps of {rollouts} rollouts, {grpo.steps * rollouts} in all")
    print(f"evaluation      {len(held_out) * config.eval.samples} rollouts before and after")
    # Of the fewest ranks that can train it.
    print(memory_plan(config, model, ranks=config.engine.tensor_parallel).table())


def _too_long(config: Config, task: Task, problems: Sequence[Any]) -> int:
    """How many of the `problems` have a prompt that leaves no room for a completion."""
    if task.prompt is None:
        return 0
    prompts = [task.prompt(config, problem) for problem in problems]
    return prompts_fit(prompts, load_chat(config.model.path, config.model), Sampling.of(config)).count(False)
