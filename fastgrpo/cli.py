"""The command line all programs share: `--config FILE`, `--section.key VALUE`, `--resume`, `--dry-run`, `--help`."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastgrpo.config import LOSS_PRESETS, Config
from fastgrpo.config_files import read_saved, read_toml
from fastgrpo.config_keys import KEYS, SECTIONS, Key, checked, choices_of, resolve
from fastgrpo.errors import UserError, expanded
from fastgrpo.run_folder import refuse_task_from_python

FLAGS = {
    "--config FILE": "read this TOML file first; without it and without --model, the demo's settings",
    "--model NAME": "short for --model.path",
    "--dataset NAME": "short for --data.dataset",
    "--reward FUNCTION": "short for --data.reward",
    "--environment NAME": "short for --data.environment",
    "--resume": "continue the run from its last checkpoint, with its own configuration",
    "--dry-run": "print the resolved plan and exit",
    "--help": "this text",
}
OF_RUN = "read this TOML file first; without it that of the run that wrote --model, without both the demo's settings"

SHORT = {
    "model": "model.path",
    "dataset": "data.dataset",
    "reward": "data.reward",
    "environment": "data.environment",
}
DEMO = Path(__file__).with_name("demo.toml")


class CommandLine(NamedTuple):
    """A parsed command line: the resolved configuration, flags, and the program's own positional arguments."""

    config: Config
    resume: bool
    dry_run: bool
    arguments: tuple[str, ...]
    flags: frozenset[str] = frozenset()


def parse(
    arguments: Sequence[str],
    *,
    program: str,
    positional: str = "",
    of_run: bool = False,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> CommandLine:
    """Read a command line: `--config FILE`, `--section.key VALUE`, flags; with `--resume` the run's own configuration.

    `positional` names what the program takes besides (shown by `--help`), empty = nothing; `flags` are the program's
    own without a value, each with its meaning. With `of_run` a model that a run wrote comes with that run's
    configuration, where no file is given, and nothing is resumed. Exits 0 after `--help`.
    Raises `UserError` for anything it does not know.
    """
    options, given, rest = _split(arguments, flags)
    if "--help" in given:
        print(usage(program, positional, flags, of_run=of_run), flush=True)
        raise SystemExit(0)
    if rest and not positional:
        raise UserError(f"unexpected argument {rest[0]!r}: keys are set as --section.key VALUE; --help lists them")
    if of_run and "--resume" in given:
        raise UserError(f"--resume goes on with a training: {program} begins none, leave it out")
    file = str(expanded(options.pop("config"))) if "config" in options else None
    overrides = checked(options, source="command line", strict=False)
    if file is None and of_run:
        file = configuration_of(overrides.get("model.path", ""))
        if file is not None and not {"data.reward", "data.environment"} & overrides.keys():
            refuse_task_from_python(Path(file).parent, "name it by --reward MODULE:FUNCTION and --dataset")
        if file is not None and not {"name", "runs"} & overrides.keys():
            # What is found out about a run that was moved or set aside belongs to it, not to one that has its name now.
            folder = Path(file).parent
            overrides |= checked({"name": folder.name, "runs": str(folder.parent)}, source=f"--name is {folder}'s")
    values = read_toml(Path(file)) if file is not None else {} if overrides.get("model.path") else read_toml(DEMO)
    config = resolve(layered(values, overrides))
    if "--resume" in given and file is None:
        config = resolve(layered(read_saved(config.folder), overrides))
    own = frozenset(given & flags.keys())
    return CommandLine(config, "--resume" in given, "--dry-run" in given, tuple(rest), own)


def layered(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`overrides` over `base`; a new `grpo.loss` also replaces what the base's one had set."""
    if "grpo.loss" in overrides:
        preset = {f"grpo.{key}" for key in LOSS_PRESETS[overrides["grpo.loss"]]}
        base = {name: value for name, value in base.items() if name not in preset}
    return base | overrides


def configuration_of(model: str) -> str | None:
    """The configuration of the run that wrote the folder `model`, whose problems, prompt and workers are meant."""
    # An adapter's folder is one level deeper than its checkpoint.
    for folder in expanded(model).resolve().parents[:3] if model else ():
        if (folder / "config.toml").is_file() and (folder / "metrics.jsonl").is_file():
            return str(folder / "config.toml")
    return None


def _split(arguments: Sequence[str], own: Container[str]) -> tuple[dict[str, str], set[str], list[str]]:
    """`--key VALUE` and `--key=VALUE`, flags without a value, and the rest."""
    options, flags, rest = {}, set(), []
    remaining = list(arguments)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("--resume", "--dry-run", "--help", "-h") or word in own:
            flags.add("--help" if word == "-h" else word)
        elif not word.startswith("--"):
            rest.append(word)
        elif equals or (remaining and not remaining[0].startswith("--")):
            key = SHORT.get(name, name).replace("-", "_")
            options[key] = value if equals else remaining.pop(0)
        else:
            instead = f", and {remaining[0]} is an option" if remaining else ""
            raise UserError(f"command line: {word} needs a value{instead}")
    return options, flags, rest


def usage(
    program: str, positional: str = "", own: Mapping[str, str] = MappingProxyType({}), *, of_run: bool = False
) -> str:
    """The `--help` text: flags, then every key with its choices, default and meaning."""
    flags = FLAGS | dict(own)
    if of_run:
        flags["--config FILE"] = OF_RUN
        del flags["--resume"]
    lines = [
        f"usage: python -m {program} {positional} [--config FILE] [--section.key VALUE ...]".replace("  ", " "),
        "",
    ]
    lines += [f"  {flag:<19} {text}" for flag, text in flags.items()]
    for _, title, keys in sections():
        lines += ["", f"{title}:"]
        for key in keys:
            choices = f" ({choices})" if (choices := choices_of(key)) else ""
            lines.append(f"  --{key.name:<31} {json.dumps(key.default):<15} {key.help}{choices}")
    return "\n".join(lines)


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """(name, title, keys) of each section, the first of them without a name."""
    titles = {"": "Run"} | {name: (type(getattr(Config(), name)).__doc__ or "").rstrip(".") for name in SECTIONS}
    for section, title in titles.items():
        yield section, title, [key for key in KEYS.values() if key.name.rpartition(".")[0] == section]
