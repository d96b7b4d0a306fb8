"""What `fastgrpo.train` is given from Python, checked: a configuration, a model and what to train on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fastgrpo.config import Config
from fastgrpo.config_keys import checked, resolve
from fastgrpo.errors import UserError, shown
from fastgrpo.rollouts.environment import Agent, Environment
from fastgrpo.tasks import Task, environment_task, reward_task


def configured(config: Config | Mapping[str, Any] | None, model: Any) -> Config:
    """`train`'s configuration with the model's path. Raises UserError."""
    if not isinstance(model, str):
        raise UserError(
            f"model is a folder, a name on the hub or a GGUF file, got {type(model).__name__}: write a model that is "
            "loaded to a folder by its save_pretrained, its tokenizer too"
        )
    if not isinstance(config, Config):
        if config is not None and not isinstance(config, Mapping):
            raise UserError(
                f"train(config) takes a dict of keys by their dotted names, or a Config, got {shown(config)}: a file "
                "is read by fastgrpo.config_files.read_toml"
            )
        keys = dict(config or {}) | ({"model.path": model} if model else {})
        return resolve(checked(keys, source="train(config)"))
    if model:
        return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, path=model))
    return config


def given_task(
    task: Task | None,
    environment: Environment | Agent | None,
    reward: Callable[..., Any] | Sequence[Callable[..., Any]],
    reward_weights: Sequence[float] | None,
    dataset: Any,
    eval_dataset: Any,
) -> Task | None:
    """What `train` was given to train on; None where the configuration is to say. Raises UserError."""
    sources = {"task": task, "environment": environment, "reward": reward or None}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) > 1:
        raise UserError(f"train takes one of task, environment and reward, got {' and '.join(given)}: leave one out")
    if not given and (dataset is not None or eval_dataset is not None):
        raise UserError("train's dataset needs a reward or an environment; the run's own task reads data.dataset")
    if reward_weights is not None and not reward:
        raise UserError("reward_weights goes with reward: pass the functions too, or leave it out")
    if task is not None:
        if not isinstance(task, Task):
            raise UserError(f"task must be a fastgrpo.tasks.Task, got {shown(task)}: docs/own-task.md has other ways")
        return task
    if environment is not None:
        given_sets = (() if each is None else each for each in (dataset, eval_dataset))
        return environment_task(environment, *given_sets)
    if reward:
        functions: list[Any] = list(reward) if isinstance(reward, list | tuple) else [reward]
        return reward_task(functions, reward_weights, dataset, eval_dataset)
    return None


def refuse_running_loop() -> None:
    """Raises UserError where an event loop runs in this thread, as in a notebook: training has one of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UserError("an event loop is running here: write `await asyncio.to_thread(fastgrpo.train, ...)`")
