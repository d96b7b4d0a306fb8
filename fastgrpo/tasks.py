"""Which task a run trains: workflows, plain programs, reward functions over rows, environments of verifiers."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence, Sized
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from fastgrpo.config import Config, Data
from fastgrpo.config_files import flat
from fastgrpo.errors import UserError, expanded, shown
from fastgrpo.flow import task
from fastgrpo.flow.problems.files import HUMANEVAL
from fastgrpo.flow.problems.loading import load_problems
from fastgrpo.flow.programs import ProgramEnvironment
from fastgrpo.functions import find_function
from fastgrpo.ranks.collectives import refuse_differences
from fastgrpo.ranks.deadlines import within
from fastgrpo.record.log import RunLog
from fastgrpo.rollouts.dataset import (
    Example,
    as_list,
    hold_out,
    mixed,
    of_each,
    read_examples,
    set_names,
    used,
    with_all_columns,
)
from fastgrpo.rollouts.environment import Agent, Environment, is_message, lacking, misfit, name_of
from fastgrpo.rollouts.reward_functions import RewardFunctions, TrainerState
from fastgrpo.rollouts.verifiers_environment import VerifiersEnvironment, is_verifiers, load_verifiers
from fastgrpo.run_folder import file_digest

# A trial of all solutions of a large data set takes hours.
LOAD_S = 6 * 3600.0
BY_ITS_CODE = "an agent's own code says how often it asks, at most grpo.max_turns times"
# Keys, or whole sections, that only the tasks of `flow/` read. Where a task is given from Python, the caller's own code
# may read those of jails and workers.
OF_FLOW = ("reward", "sft", "data.instruction", "data.keep_unsolved", "data.deadline_factor", "task")
SERVICES = ("workers", "sandbox")
NAMED = ("data.reward", "data.environment", "data.environment_args")
OF_AGENTS, NOT_OF_AGENTS = "grpo.max_turns", "grpo.straggler_s"
Problems = tuple[list[Any], list[Any]]
Prompt = str | list[dict[str, str]]


class Task(NamedTuple):
    """What a run trains on: (training, held-out) problems, and the environment opened for the length of the run.

    `distilled`: stage 1 can teach the task to a policy that knows nothing, so that no model need be named. A dry run,
    which starts nothing, reads `list_problems`, where `load_problems` does more than read, and the `prompt` of each.
    `sets`: the data sets that are read, by their names, if they have some. `unread`: keys of the configuration, or
    sections, that do nothing here. `weighs_terms`: False where no reward has weights for `grpo.reward_scale` terms.
    """

    load_problems: Callable[[Config], Problems]
    open_environment: Callable[[Config, RunLog | None], AbstractAsyncContextManager[Any]]
    distilled: bool = False
    list_problems: Callable[[Config], Problems] | None = None
    prompt: Callable[[Config, Any], Prompt] | None = None
    sets: Callable[[Config], Sequence[Any]] = lambda _: ()
    unread: tuple[str, ...] = ()
    weighs_terms: bool = True


def problems_of(task: Task, config: Config, *, tried: bool = True) -> Problems:
    """(training, held-out) problems of the task, as lists; as a dry run reads them where none is to be `tried`.

    Raises UserError where its `load_problems` gives anything else, or other prompts on another rank, of which each
    draws its share; a hang ends the process. Collective.
    """
    load = task.load_problems if tried else task.list_problems or task.load_problems
    with within(LOAD_S, f"load_problems has not ended in {LOAD_S:g} s: its own code, or the trial of solutions, hangs"):
        found: Any = load(config)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise UserError(f"load_problems must return two lists, for training and held out, got {shown(found)}")
    problems, held_out = (as_list(part, "load_problems") for part in found)
    if without := [each for each in (*problems, *held_out) if not hasattr(each, "id")]:
        raise UserError(f"each problem of load_problems is an object with an id, got {shown(without[0])}")

    def prompts() -> dict[str, Any]:
        return {"the digest of all prompts": _digest([("", _prompt_of(each)) for each in (*problems, *held_out)])}

    refuse_differences(prompts, "give all ranks the same data in the same order")
    return problems, held_out


def digests_of(task: Task, config: Config, problems: Problems) -> dict[str, str]:
    """What `--resume` compares: a digest of each data set that is a file or a folder, by its name.

    Of others it is one of the training problems' ids and prompts in order, but where their trial says which they are.
    """
    sets = [_named(given) for given in task.sets(config)]
    names = [name for named in sets if named is not None for name in named]
    paths = {name: expanded(name) for name in names if name.lower() not in HUMANEVAL}
    digests = {name: file_digest(path) for name, path in paths.items() if path.is_file()}
    digests |= {name: _digest(_files(path)) for name, path in paths.items() if path.is_dir()}
    others = [name for name in names if name not in digests]
    if task.list_problems is None and (others or None in sets or not sets):
        given = " and ".join(others) or "what it was given to train on"
        digests[given] = _digest([(name_of(each), _prompt_of(each)) for each in problems[0]])
    return digests


def _files(folder: Path) -> list[tuple[str, str]]:
    """The name and digest of each file of a data set's folder, but for hidden ones, which the library does not read."""
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    read = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return [(str(path), file_digest(folder / path)) for path in read]


def _prompt_of(problem: Any) -> Any:
    """A problem's prompt as far as it is plain: what else an attribute of that name is may differ in each process."""
    prompt = getattr(problem, "prompt", None)
    if isinstance(prompt, list) and all(map(is_message, prompt)):
        return [(message["role"], message["content"]) for message in prompt]
    return prompt if isinstance(prompt, str) else None


def _digest(told: list[tuple[str, Any]]) -> str:
    return hashlib.blake2b(repr(told).encode(errors="replace"), digest_size=16).hexdigest()


def refuse_untrainable(config: Config, problems: Problems) -> None:
    """Raises UserError where of (training, held-out) problems the first is empty, or the second with `eval.every`."""
    train, held_out = problems
    if not train:
        raise UserError("the task has no problem to train on: lower data.held_out, or name more data")
    if config.eval.every and not held_out:
        raise UserError(
            f"eval.every = {config.eval.every} would evaluate nothing, as no problem is held out: raise data.held_out, "
            "name an evaluation's own data, or set eval.every to 0"
        )


def refuse_unfit(config: Config, task: Task, *, resume: bool = False) -> None:
    """Raises UserError where a training is asked for what its task does not have or, if begun anew, does not read."""
    if config.grpo.reward_scale == "terms" and not task.weighs_terms:
        raise UserError(
            "grpo.reward_scale terms divides reward functions by their own deviations: name them, or unset it"
        )
    if resume:  # an older version began runs with such keys
        return
    default = flat(Config())
    # What is 0, false or empty asks for nothing.
    asked = {name: value for name, value in flat(config, logins=False).items() if value and value != default.get(name)}
    unread = [name for name in asked for key in task.unread if name == key or name.startswith(f"{key}.")]
    if unread:
        others = f", nor {', '.join(unread[1:])}" if unread[1:] else ""
        instead = ", and pass what is held out as eval_dataset=" if "data.held_out" in unread else ""
        raise UserError(
            f"{unread[0]} = {shown(asked[unread[0]])} would not be read by what is trained on here{others}: leave "
            f"{'them' if others else 'it'} out{instead}"
        )


def refuse_none_held_out(problems: Problems) -> None:
    """Raises UserError where the second of (training, held-out) problems is empty."""
    if not problems[1]:
        raise UserError("no problem is held out to evaluate on: raise data.held_out, or name sets in data.eval_dataset")


def task_of(config: Config) -> Task:
    """The task that the configuration names.

    Raises UserError where a reward function or a judge cannot be found, or must be.
    """
    if config.data.environment and config.data.reward:
        raise UserError("data.environment has rewards of its own: leave data.reward out, or data.environment")
    if config.data.environment:
        return verifiers_task(config.data.environment, config.data.environment_args)
    if config.data.reward:
        functions = [find_function(name, "data.reward") for name in config.data.reward.split(",")]
        return reward_task(functions)._replace(unread=(*OF_FLOW, *SERVICES, OF_AGENTS))
    untried = partial(load_problems, tried=False)
    if config.task == "code":
        prompt = ProgramEnvironment.prompt
        unread = ("reward", "sft", "workers", "sandbox.workflows", "sandbox.workflow_s", "data.instruction", OF_AGENTS)
        opened = task.open_programs
        return Task(load_problems, opened, False, untried, lambda _, each: prompt(each), _sets_of, unread, False)
    task.require_judge(config)
    return Task(load_problems, task.open_environment, True, untried, task.prompt, _sets_of, (OF_AGENTS,), False)


def writes_workflows(config: Config) -> bool:
    """Whether the task that the configuration names is the workflows of `flow/`."""
    return config.task == "flow" and not (config.data.environment or config.data.reward)


def require_model(config: Config, task: Task) -> None:
    """Raise UserError where a task that stage 1 cannot teach has no model to begin with."""
    if not config.model.path and not task.distilled:
        raise UserError("this task needs a model: name one with --model PATH, or model= from Python")


def reward_task(
    functions: Sequence[Callable[..., Any]],
    weights: Sequence[float] | None = None,
    dataset: Any = None,
    eval_dataset: Any = None,
) -> Task:
    """Reward functions in TRL's form over the rows of `dataset`, None = those of `data.dataset`.

    Raises UserError where functions or weights are none.
    """
    rewards = partial(RewardFunctions, functions, weights)
    checked = rewards(deadline_s=1.0)  # what is wrong with them is told before anything is opened

    def load(config: Config) -> Problems:
        if dataset is None and config.data.dataset == Data().dataset:
            raise UserError("a reward function needs rows with a prompt: name them with --dataset, or pass dataset=")
        _refuse_rounds(config, "a reward function says nothing between two completions, as an environment does")
        sets = _used_sets(config.data.dataset if dataset is None else dataset, config)
        often = of_each(config.data.weights, sets, "data.weights")
        separate = config.data.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(separate, str) and not separate:
            held_out = of_each(config.data.held_out, sets, "data.held_out")
            parts = [hold_out(rows, count, config.data.seed) for rows, count in zip(sets, held_out, strict=True)]
            sets, held = [train for train, _ in parts], [row for _, rows in parts for row in rows]
        else:
            if _is_empty(separate):
                raise UserError("eval_dataset has no rows: leave it out, then data.held_out rows are evaluated")
            held = [row for rows in _used_sets(separate, config, "test") for row in rows]
        train = mixed(sets, often, config.data.seed)
        names = dict.fromkeys(name for row in (*train, *held) for name in row.columns)
        train, held = with_all_columns(train, names), with_all_columns(held, names)
        checked.refuse_misfit(train[0])
        return train, held

    @asynccontextmanager
    async def open_environment(config: Config, log: RunLog | None = None) -> AsyncIterator[Environment]:
        steps = config.grpo.steps
        yield rewards(deadline_s=config.grpo.execute_s, state=TrainerState(steps, steps))

    def sets(config: Config) -> list[Any]:
        given = zip((dataset, eval_dataset), _sets_of(config), strict=True)
        return [configured if each is None else each for each, configured in given]

    given = (("data.dataset", dataset), ("data.eval_dataset", eval_dataset))
    unread = (*OF_FLOW, *NAMED, OF_AGENTS, *(key for key, value in given if value is not None))
    return Task(load, open_environment, prompt=lambda _, example: example.prompt, sets=sets, unread=unread)


def verifiers_task(environment: str, arguments: str) -> Task:
    """The environment `verifiers:NAME` on its own tasks, of which `data.held_out` are held out.

    Raises UserError for another name; loading raises as `load_verifiers` does.
    """
    package, _, name = environment.partition(":")
    if package != "verifiers" or not name:
        raise UserError(f"data.environment must be verifiers:NAME, got {environment!r}")
    return _verifiers_task(partial(load_verifiers, name, arguments), ("data.reward", *SERVICES))


def _verifiers_task(made: Callable[[], VerifiersEnvironment], unread: Sequence[str]) -> Task:
    loaded, unread = cache(made), (*OF_FLOW, *unread, "data.weights", NOT_OF_AGENTS)

    def load(config: Config) -> Problems:
        _refuse_sets(config, "an environment of verifiers has its own rows, drawn by data.problems")
        _refuse_rounds(config, BY_ITS_CODE)
        rows = used(loaded().problems(config.data.problems), config.data.problems, config.data.seed)
        [count] = of_each(config.data.held_out, ["the environment"], "data.held_out")
        return hold_out(rows, count, config.data.seed)

    @asynccontextmanager
    async def open_environment(config: Config, log: RunLog | None = None) -> AsyncIterator[Agent]:
        async with loaded().serving():
            yield loaded()

    def prompt(config: Config, problem: Any) -> Prompt:
        return loaded().prompt(problem)

    return Task(load, open_environment, prompt=prompt, unread=unread, weighs_terms=False)


def environment_task(environment: Environment | Agent, problems: Iterable[Any], held_out: Iterable[Any] = ()) -> Task:
    """An environment or an agent of the caller's own on its own problems; one of verifiers, which has its own.

    Raises UserError for an object of neither.
    """
    if isinstance(environment, type):
        raise UserError(f"environment is the class {environment.__name__}: pass an object of it")
    if isinstance(environment, str):
        raise UserError(f"environment is an object: the name {shown(environment)} belongs in the key data.environment")
    if is_verifiers(environment):
        if not (_is_empty(problems) and _is_empty(held_out)):
            raise UserError("an environment of verifiers has its own rows: leave dataset and eval_dataset out")
        return _verifiers_task(partial(VerifiersEnvironment, environment), NAMED)
    if missing := lacking(environment):
        kind = type(environment).__name__
        raise UserError(f"environment {kind} has no {' and no '.join(missing)}: docs/own-task.md shows its methods")
    if wrong := misfit(environment):
        raise UserError(f"environment {type(environment).__name__}: {wrong}; docs/own-task.md shows its methods")

    @asynccontextmanager
    async def open_environment(config: Config, log: RunLog | None = None) -> AsyncIterator[Environment | Agent]:
        yield environment

    def load(config: Config) -> Problems:
        _refuse_sets(config, "an environment gets its problems by train's dataset= and eval_dataset=")
        if isinstance(environment, Agent):
            _refuse_rounds(config, BY_ITS_CODE)
        parts = []
        for name, given in (("dataset", problems), ("eval_dataset", held_out)):
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise UserError(f"{name} of an environment is a list of problems, got {shown(given)}")
            parts.append(as_list(given, name))
            if without := [each for each in parts[-1] if not hasattr(each, "id")]:
                raise UserError(
                    f"each problem of {name} is an object with an id, got {shown(without[0])}: of a row that is a dict "
                    "types.SimpleNamespace(**row) makes one"
                )
        if not parts[0]:
            raise UserError("an environment has nothing to train on: pass its problems as dataset=")
        return parts[0], parts[1]

    # Whoever divides the problems by `data.held_out` gives both parts.
    drawn = ("data.weights", "data.held_out") if _is_empty(held_out) else ("data.weights",)
    unread = (*OF_FLOW, *NAMED, *drawn, NOT_OF_AGENTS if isinstance(environment, Agent) else OF_AGENTS)
    return Task(load, open_environment, prompt=lambda _, problem: environment.prompt(problem), unread=unread)


def _is_empty(given: Any) -> bool:
    """Whether it is known to have no item; an array or a table has no truth of its own."""
    return isinstance(given, Sized) and len(given) == 0


def _sets_of(config: Config) -> list[Any]:
    return [config.data.dataset, config.data.eval_dataset]


def _refuse_sets(config: Config, instead: str) -> None:
    """Raises UserError where the configuration names data sets that nobody would read."""
    named = {key: getattr(config.data, key) for key in ("dataset", "eval_dataset")}
    if odd := [key for key, value in named.items() if value != getattr(Data(), key)]:
        raise UserError(f"data.{odd[0]} = {shown(named[odd[0]])} would not be read: {instead}; leave it out")


def _refuse_rounds(config: Config, why: str) -> None:
    """Raises UserError where rollouts of several rounds are wanted, and this task has none."""
    if config.grpo.rounds > 1:
        raise UserError(
            f"grpo.rounds = {config.grpo.rounds} would be one: {why}; set it to 1, for a run that is resumed in its "
            "config.toml"
        )


def _used_sets(dataset: Any, config: Config, split: str = "train") -> list[list[Example]]:
    return [used(rows, config.data.problems, config.data.seed) for rows in _sets(dataset, split)]


def _sets(dataset: Any, split: str) -> list[list[Example]]:
    """The rows of each data set that is named, or of the one that is given; of several, ids begin with the set's."""
    names = _named(dataset)
    if names is None:
        return [read_examples(dataset, split)]
    if not names:
        raise UserError("data.dataset names no data set: name a file of rows, or OWNER/NAME on the hub")
    sets = [read_examples(name, split) for name in names]
    if len(sets) == 1:
        return sets
    return [[replace(row, id=f"{name}/{row.id}") for row in rows] for name, rows in zip(names, sets, strict=True)]


def _named(dataset: Any) -> list[str] | None:
    """The names of data sets that `dataset` is, None where it is one itself."""
    if isinstance(dataset, Path):
        return [str(dataset)]
    several = isinstance(dataset, list | tuple) and dataset and all(isinstance(name, str | Path) for name in dataset)
    return [str(name) for name in set_names(dataset)] if isinstance(dataset, str) or several else None
