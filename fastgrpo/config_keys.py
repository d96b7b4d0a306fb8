"""The configuration from its keys by their dotted names: what each may be, and which exclude each other."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from fastgrpo.config import LOSS_PRESETS, Config, Grpo, Section, Workers
from fastgrpo.config_elsewhere import elsewhere
from fastgrpo.errors import UserError, expanded, shown


class Key(NamedTuple):
    """One key of the configuration: dotted name, value type, default and help line."""

    name: str
    type: Any
    default: Any
    help: str


def _keys(section: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    hints = typing.get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        if isinstance(field.default, Section):
            yield from _keys(type(field.default), f"{prefix}{field.name}.")
        elif meta := getattr(hint := hints[field.name], "__metadata__", ()):
            help_line = next(each.description for each in meta if isinstance(each, Meta) and each.description)
            yield Key(prefix + field.name, hint, field.default, help_line)


KEYS: dict[str, Key] = {key.name: key for key in _keys()}
# A table [workers.others.NAME] has the keys of [workers], less those that hold for all workers.
_OF_ANOTHER_WORKER = re.compile(r"workers\.others\.\w{1,64}\.(?!(kind|name|cache_dir|latency_scale)$)(?=\w+$)")
_ANOTHER_WORKERS_KEY = re.compile(r"workers\.others\.\w{1,64}\.\w+")
# What the patterns of two keys ask for, in words.
_SPELLED = {
    "name": "a text of letters, digits, '_', '.' and '-' that begins with a letter or digit",
    "workers.name": "a text of 1 to 64 letters, digits and '_'",
    "grpo.loss_function": "a text module:function, also of a file in the present folder",
    "data.reward": "a text module:function; a function itself is passed to fastgrpo.train as reward=",
}
_LEAVES = {known: known.rpartition(".")[2] for known in KEYS}
# A name as like a key as this is one with a slip of the pen; a word that stands in more keys than this means none.
SLIP, MOST_FULLER = 0.8, 3
MOST_ROLLOUTS = 2**20  # at once, each a coroutine
SECTIONS: tuple[str, ...] = tuple(dict.fromkeys(name.split(".")[0] for name in KEYS if "." in name))


def checked(values: dict[str, Any], *, source: str, strict: bool = True) -> dict[str, Any]:
    """Dotted `values` with types and bounds checked; `strict=False` also converts a command line's text.

    Raises `UserError` naming `source`, the key, what was expected and what was there.
    """
    result = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise UserError(f"{source}: keys are texts such as 'grpo.steps', got {shown(name)}")
        key = KEYS.get(_OF_ANOTHER_WORKER.sub("workers.", name))
        if key is None:
            raise UserError(f"{source}: {_unknown(name)}")
        listed = not strict and "," in str(value) and takes_several(key)
        given = [item.strip() for item in value.split(",")] if listed else value
        given = str(given) if isinstance(given, Path) else given
        try:
            result[name] = msgspec.convert(given, key.type, strict=strict)
        except msgspec.ValidationError as error:
            wanted = choices_of(key) or _SPELLED.get(name) or _wanted(key, str(error))
            if isinstance(value, dict) and "JSON" in key.help:
                wanted = "the text that json.dumps makes of it"
            raise UserError(f"{source}: {name} must be {wanted}, got {shown(value)} ({type(value).__name__})") from None
        if not all(map(_is_unicode, result[name] if isinstance(result[name], tuple) else (result[name],))):
            raise UserError(f"{source}: {name} must be Unicode text, which no file name in another encoding is")
        if isinstance(result[name], float) and not math.isfinite(result[name]):
            raise UserError(f"{source}: {name} must be a finite number, got {value!r}")
    return result


def _wanted(key: Key, said: str) -> str:
    """What a value of the key is, by what msgspec says of one that is none."""
    kind = said.removeprefix("Expected ").split(", got")[0].split(" - at")[0].split(" |")[0].replace("`", "")
    return f"{kind}, or a list of such" if takes_several(key) else kind


def _is_unicode(value: Any) -> bool:
    """False for a text that config.toml cannot hold, as Python makes one of a command line's other bytes."""
    return not isinstance(value, str) or value.encode(errors="ignore") == value.encode(errors="surrogatepass")


def choices_of(key: Key) -> str:
    """`a | b | c` for a key that takes one of a few words, else empty."""
    choices = key.type.__origin__
    return " | ".join(typing.get_args(choices)) if typing.get_origin(choices) is Literal else ""


def takes_several(key: Key) -> bool:
    """True for a key whose value may be a list, which a command line gives separated by commas."""
    return any(typing.get_origin(choice) is tuple for choice in typing.get_args(key.type.__origin__))


def _unknown(name: str) -> str:
    if name.startswith("workers.others") and not _ANOTHER_WORKERS_KEY.fullmatch(name):
        return f"unknown key {name!r}: a worker is a table [workers.others.NAME], its NAME letters, digits and '_'"
    if name in SECTIONS:
        return f"{name!r} is a section, not a key: set keys such as {next(k for k in KEYS if k.startswith(name))!r}"
    ours, instead = elsewhere(name)
    own = f"{name.partition('.')[0]}.{ours.rpartition('.')[2]}"
    ours = own if own in KEYS else ours
    if ours:  # its unit may be another one
        return f"unknown key {name!r}; here it is {ours!r}: {KEYS[ours].help}"
    if instead:
        return f"unknown key {name!r}; it has no key here: {instead}"
    if match := _alike(name):
        return f"unknown key {name!r}; did you mean {match!r}?"
    return f"unknown key {name!r}; --help lists all keys"


def _alike(name: str) -> str | None:
    """The key that a name is likely to mean; None where none is likely.

    A name in a section of ours, whose own name may have a slip, too, means a key of that section, where it is one with
    a slip or some of one's words; else the key of another section that ends alike, in [grpo] or of several words. A
    name in none means any key with a slip, or one of [grpo] by some of its words.
    """
    table, _, leaf = name.rpartition(".")
    section = next(iter(difflib.get_close_matches(table.partition(".")[0], SECTIONS, n=1, cutoff=0.7)), "")
    own = {known: last for known, last in _LEAVES.items() if known.startswith(f"{section or 'grpo'}.")}
    others = sorted(_LEAVES.items(), key=lambda item: not item[0].startswith("grpo."))
    slips = {known: _likeness(leaf, last) for known, last in (own.items() if section else others)}
    best = max(slips, key=lambda known: slips[known])
    if slips[best] >= SLIP:
        return best
    words = set(leaf.split("_"))
    fuller = [known for known, last in own.items() if words < set(last.split("_")) and 2 * len(words) > last.count("_")]
    same = [known for known, last in others if last == leaf and (known.startswith("grpo.") or "_" in leaf)]
    return next(iter([*(fuller if len(fuller) <= MOST_FULLER else ()), *same]), None)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.replace("_", ""), other.replace("_", "")).ratio()


def resolve(values: dict[str, Any]) -> Config:
    """The configuration with checked dotted `values` over `grpo.loss`'s preset over the defaults.

    Raises `UserError` where keys do not go together.
    """
    preset = LOSS_PRESETS[values.get("grpo.loss", Grpo().loss)]
    nested: dict[str, Any] = {}
    for name, value in ({f"grpo.{key}": value for key, value in preset.items()} | values).items():
        *tables, key = name.split(".")
        table = nested
        for part in tables:
            table = table.setdefault(part, {})
        table[key] = value
    config = msgspec.convert(nested, Config)
    if "model.lora_alpha" in values and "model.lora_rank" not in values:
        raise UserError(
            "model.lora_alpha scales the adapters of model.lora_rank, which is not set, and all weights would be "
            "trained: set the rank, as to 16, or 0 where that is meant"
        )
    _check_workers(config.workers)
    _check_task(config)
    _check_machines(config)
    _check_model(config)
    _check_grpo(config.grpo)
    return config


def _check_task(config: Config) -> None:
    if config.sft.teacher == "openai" and config.workers.kind != "openai":
        raise UserError("sft.teacher is openai: set workers.kind to openai and its endpoint too")
    flow = config.task == "flow" and not (config.data.reward or config.data.environment)
    if config.reward.judge and not flow:
        raise UserError("reward.judge goes with task flow and its own reward: leave it out, or empty")
    if config.data.environment_args and not config.data.environment:
        raise UserError("data.environment_args are those of data.environment: name it, or leave them out, or empty")
    if config.workers.cache_dir and config.reward.efficiency_by in ("dollars", "seconds"):
        by = config.reward.efficiency_by
        raise UserError(f"workers.cache_dir gives answers for no {by}, and reward.efficiency_by is {by}: leave one out")


def _check_machines(config: Config) -> None:
    for key, value in (
        ("grpo.max_lag", config.grpo.max_lag),
        ("model.lora_rank", config.model.lora_rank),
        ("model.offload_optimizer", config.model.offload_optimizer),
        ("engine.process own", config.engine.process == "own"),
    ):
        if config.engine.tensor_parallel > 1 and value:
            raise UserError(f"engine.tensor_parallel above 1 and {key} exclude each other: set one of them back")
    expanded(config.runs)  # raises where it is in a home that is not there
    servers = config.sandbox.servers
    if servers != ("ray",) and not all(server.startswith(("http://", "https://")) for server in servers):
        given = ", ".join(server.rpartition("@")[2] for server in servers)  # less a password
        raise UserError(f"sandbox.hosts must be ray, or addresses as http://HOST:PORT, got {given}")


def _check_model(config: Config) -> None:
    if config.grpo.max_new_tokens >= config.engine.max_model_len:
        raise UserError(
            f"grpo.max_new_tokens = {config.grpo.max_new_tokens} leaves no room for a prompt in engine.max_model_len = "
            f"{config.engine.max_model_len}: lower the one or raise the other"
        )
    for key in ("system_prompt", "chat_template_kwargs"):
        if not config.model.chat_template and getattr(config.model, key):
            raise UserError(
                f"model.{key} goes with a chat template, and model.chat_template is false: unset one of them"
            )
    try:
        msgspec.json.decode(config.model.chat_template_kwargs or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UserError(f"model.chat_template_kwargs must be a JSON object: {error}") from None


def _check_grpo(grpo: Grpo) -> None:
    rollouts = grpo.prompts_per_step * grpo.group_size
    if (under_way := rollouts * (1 + grpo.max_lag)) > MOST_ROLLOUTS:
        ahead = " x (1 + grpo.max_lag)" if grpo.max_lag else ""
        raise UserError(
            f"grpo.prompts_per_step x grpo.group_size{ahead} are {under_way:,} rollouts at once, more than "
            f"{MOST_ROLLOUTS:,}: lower one of them"
        )
    if grpo.mini_batches > rollouts:
        raise UserError(
            f"grpo.mini_batches = {grpo.mini_batches} are more parts than the {rollouts} rollouts of a step: lower it"
        )
    if grpo.max_lag and grpo.refill:
        raise UserError("grpo.max_lag and grpo.refill above 0 exclude each other: set one of them back")
    if grpo.in_flight and not grpo.max_lag:
        raise UserError("grpo.in_flight changes weights under rollouts that began early: set grpo.max_lag to 1 or more")
    if grpo.curriculum and not round(grpo.curriculum * grpo.prompts_per_step):
        raise UserError(
            f"grpo.curriculum = {grpo.curriculum:g} of grpo.prompts_per_step = {grpo.prompts_per_step} is no problem "
            "at all: raise one of them"
        )
    if grpo.advantage == "rloo" and grpo.reward_scale in ("group", "terms"):
        scale = grpo.reward_scale
        raise UserError(f"grpo.advantage rloo and grpo.reward_scale {scale} exclude each other: set one of them back")
    if grpo.truncates and _weighs_products(grpo):
        raise UserError(
            "grpo.importance_correction by sequence multiplies over an answer what top_p, top_k and min_p leave out at "
            "each token, so that long ones lose their weight: set it to token_truncate or token_mask"
        )
    if not grpo.decay_steps and (grpo.decay != "linear" or grpo.min_lr_ratio):
        raise UserError(
            "grpo.decay and grpo.min_lr_ratio say how lr falls over grpo.decay_steps, which are 0: set these, as to "
            "grpo.steps"
        )
    if 0 < grpo.clip_dual <= 1:
        raise UserError(
            f"grpo.clip_dual = {grpo.clip_dual:g} would clip a ratio of 1: set it above 1, as 3, or 0 for none"
        )
    if grpo.clip_dual and grpo.ratio == "cispo":
        raise UserError(
            "grpo.clip_dual bounds ratios that grpo.clip_high does not, and cispo's is bounded by it whatever the "
            "advantage: set clip_dual to 0"
        )
    if grpo.overlong_penalty_tokens > grpo.max_new_tokens:
        raise UserError("grpo.overlong_penalty_tokens is above grpo.max_new_tokens: lower it, or raise the limit")


def _weighs_products(grpo: Grpo) -> bool:
    """Whether an answer's importance weight is the product of its tokens'."""
    by_sequence = grpo.tis_cap > 0 and grpo.importance_correction.startswith("sequence")
    return by_sequence and grpo.ratio != "sequence" and not grpo.max_lag and not grpo.loss_function


def _check_workers(workers: Workers) -> None:
    if workers.kind == "simulated":
        if workers.others:
            raise UserError("workers.others name endpoints: set workers.kind to openai too")
        return
    if workers.name in workers.others:
        raise UserError(f"workers.name and workers.others.{workers.name} are one name: change one of them")
    for name, worker in workers.by_name().items():
        _check_endpoint(worker, "workers" if name == workers.name else f"workers.others.{name}")


def _check_endpoint(worker: Workers, section: str) -> None:
    if not (worker.base_url and worker.model):
        raise UserError(f"workers.kind is openai: set {section}.base_url and {section}.model too")
    if unknown := set(worker.dropped) - {"max_tokens", "temperature", "seed"}:
        raise UserError(f"{section}.drop names {min(unknown)!r}: only max_tokens, temperature and seed can be dropped")
    try:
        msgspec.json.decode(worker.extra_body or "{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise UserError(f'{section}.extra_body must be a JSON object such as {{"top_p": 0.9}}: {error}') from None
