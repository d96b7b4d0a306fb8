"""How a program begins: its command line, on a machine that is ready; with `--dry-run` what it will do and need."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastgrpo.cli import CommandLine, parse
from fastgrpo.config import Config
from fastgrpo.config_files import flat, to_toml
from fastgrpo.doctor import require_ready, versions
from fastgrpo.errors import UserError
from fastgrpo.functions import find_function
from fastgrpo.policy.chat import load_chat
from fastgrpo.policy.demo_policy import policy_config
from fastgrpo.policy.folder import load_config
from fastgrpo.policy.hub import with_local_model
from fastgrpo.policy.lora import peft_module
from fastgrpo.program import run_async
from fastgrpo.ranks.collectives import joined_ranks, refuse_differences, telling_ranks, world_started
from fastgrpo.record.trackers import tracker_module
from fastgrpo.rollouts.prompts import prompts_fit
from fastgrpo.run_folder import model_digest, tokenizer_digests
from fastgrpo.signals import interruptible
from fastgrpo.tasks import Problems, Task, problems_of, refuse_unfit, require_model, task_of
from fastgrpo.training.memory import MemoryPlan
from fastgrpo.training.workload import check_sampled, memory_plan
from fastgrpo.types import Sampling

# What a program does, which `--dry-run` prints and checks; both stages send their curves to the run's tracker.
Part = Literal["stage 1", "stage 2", "evaluation"]
TRAINING: tuple[Part, ...] = ("stage 1", "stage 2", "evaluation")


def command_to_run(
    program: str,
    refuse: Callable[[CommandLine], object] = lambda _: None,
    refuse_problems: Callable[[Config, Problems], object] = lambda *_: None,
    parts: Sequence[Part] = TRAINING,
    **options: Any,
) -> CommandLine | None:
    """The program's command line, with the `options` of `cli.parse`; None where `--dry-run` had the plan printed.

    Raises UserError where the command line is wrong, `refuse` says that the program cannot do it, a dry run finds
    problems that `refuse_problems` says the program would not take, or this machine is not ready.
    """
    with telling_ranks():
        command = parse(sys.argv[1:], program=program, **options)
        refuse(command)
        if command.dry_run:
            # Under torchrun one rank prints what holds for all.
            if os.environ.get("RANK", "0") == "0":
                print_plan(command.config, refuse_problems=refuse_problems, parts=parts, resume=command.resume)
            return None
        require_ready()
        return command


def run_on_ranks(config: Config, main: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run the coroutine that `main` makes to its end, on each of the ranks that torchrun started.

    Raises UserError where they are not of one configuration and one environment, as where hosts were started by hand.
    """
    with joined_ranks(config.engine.tensor_parallel):

        def given() -> dict[str, Any]:
            packages = {name: version for name, version in versions().items() if name != "platform"}
            return flat(config, logins=False) | packages

        refuse_differences(given, "start all ranks with one command line and one environment")
        run_async(main)


def with_readable_model(config: Config, *, again: bool = False) -> Config:
    """`config` of `with_local_model`, whose configuration and tokenizer have been read once.

    What is wrong with them is told before the run's folder is opened, which sets an earlier run aside, and before
    solutions are tried, which takes minutes to hours.
    Raises UserError, also where ranks have different models: one would be mixed of them. Collective.
    """
    with interruptible():
        config = with_local_model(config, again=again)
        if config.model.path:
            load_config(config.model.path)
            load_chat(config.model.path, config.model)
    model = Path(config.model.path)

    def digests() -> dict[str, Any]:
        found = {"the model": model_digest(model), **tokenizer_digests(model)} if config.model.path else {}
        return {f"the digest of {name}": digest for name, digest in found.items()}

    refuse_differences(digests, f"copy the model {model} anew, or name one that all hosts share")
    return config


def trainable(config: Config) -> MemoryPlan:
    """The memory plan of the training on the ranks that torchrun started, else on the fewest that can hold it.

    Raises UserError for a loss function, a missing package, lengths or memory that would end the training once its
    folder is open, and for steps of a learning rate of 0.
    """
    grpo = config.grpo
    if 0 < grpo.decay_steps < grpo.steps and not grpo.min_lr_ratio:
        raise UserError(
            f"grpo.lr would be 0 from step {grpo.decay_steps + 1} of {grpo.steps} on, by grpo.decay_steps: set "
            f"grpo.steps to {grpo.decay_steps}, or in a new run grpo.decay_steps to {grpo.steps} or grpo.min_lr_ratio "
            "to 0.1"
        )
    require_adapters(config)
    if name := grpo.loss_function:
        function = find_function(name, "grpo.loss_function")
        try:
            inspect.signature(function).bind("tokens")
        except ValueError:  # nobody knows what it takes
            pass
        except TypeError as error:
            raise UserError(f"grpo.loss_function: {name} is called with the tokens alone: {error}") from None
    model = load_config(config.model.path) if config.model.path else policy_config()
    return memory_plan(config, model, ranks=max(world_started(), config.engine.tensor_parallel))


def require_adapters(config: Config) -> None:
    """Raises UserError where adapters are to be trained and peft is missing: before what takes hours, as a teacher."""
    if config.model.lora_rank:
        peft_module("model.lora_rank")


def print_plan(
    config: Config,
    task: Task | None = None,
    *,
    refuse_problems: Callable[[Config, Problems], object] = lambda *_: None,
    parts: Sequence[Part] = TRAINING,
    resume: bool = False,
) -> None:
    """The resolved configuration, the sizes of the program's `parts` and, of stage 2, the memory plan.

    Starts and writes nothing. `task` None is the one that the configuration names; `resume`: of a run that goes on.
    Raises UserError where a run would before it starts.
    """
    task = task or task_of(config)
    require_model(config, task)
    trains, reinforces = "stage 1" in parts, "stage 2" in parts
    if trains:
        tracker_module(config.record.tracker)
        require_adapters(config)
    if reinforces:
        refuse_unfit(config, task, resume=resume)
    config = with_local_model(config, weights=False)
    problems, held_out = found = problems_of(task, config, tried=False)
    refuse_problems(config, found)
    grpo = config.grpo
    rollouts = grpo.prompts_per_step * grpo.group_size
    memory = trainable(config) if reinforces else None
    if config.model.path and not trains:
        check_sampled(config, load_config(config.model.path))
    print(to_toml(config, logins=False))
    untried = ", before their own solutions are tried" if task.list_problems else ""
    print(f"problems        {len(problems)} for training, {len(held_out)} held out{untried}")
    if config.model.path:
        # As it was named: the folder that was made of it to plan by is gone at the exit.
        print(f"policy          {config.model.source or config.model.path}")
        if left_out := _too_long(config, task, [*problems, *held_out]):
            print(f"too long        {left_out} of these problems, which are left out")
    if trains and not (reinforces and config.model.path):
        print(f"stage 1         {len(problems) * config.sft.teacher_samples} traces, {config.sft.epochs} epochs")
    if reinforces:
        print(f"stage 2         {grpo.steps} steps of {rollouts} rollouts, {grpo.steps * rollouts} in all")
    if "evaluation" in parts:
        between = f", and after every {config.eval.every} steps" if config.eval.every else ""
        when = f" before and after{between}" if reinforces else ""
        print(f"evaluation      {len(held_out) * config.eval.samples} rollouts{when}")
    if memory is not None:
        print(memory.table())


def _too_long(config: Config, task: Task, problems: Sequence[Any]) -> int:
    """How many of the `problems` have a prompt that leaves no room for a completion."""
    if task.prompt is None:
        return 0
    chat = load_chat(config.model.path, config.model)
    return prompts_fit(problems, partial(task.prompt, config), chat, Sampling.of(config)).count(False)
