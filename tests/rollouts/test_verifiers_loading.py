"""Environments of verifiers: how they are named and loaded, with a stand-in of the package or none."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.tasks import environment_task, task_of


def installed(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    package, v1 = ModuleType("verifiers"), ModuleType("verifiers.v1")
    if load is not None:
        v1.resolve_env_config, v1.load_environment = dict, load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "verifiers", package)
    monkeypatch.setitem(sys.modules, "verifiers.v1", v1)


def refuse(config: dict[str, Any]) -> Any:
    raise ValueError(f"no key for {config['taskset']['id']}")


def lack(config: dict[str, Any]) -> Any:
    try:
        raise ModuleNotFoundError("No module named 'math_verify'")
    except ModuleNotFoundError as error:
        raise ValueError("install as `verifiers[all]`.\nOr not") from error


def of_v0(config: dict[str, Any]) -> Any:
    raise AttributeError("taskset module 'adding' defines no `__all__`")


@pytest.mark.parametrize(
    ("keys", "load", "sentence"),
    [
        ({"data.environment": "gym:adding"}, refuse, "data.environment must be verifiers:NAME, got 'gym:adding'"),
        ({}, refuse, "the environment verifiers:adding does not load: no key for adding"),
        ({}, lack, r"\[all\]`. Or not, from ModuleNotFoundError: No module named 'math_verify' \(test_ver"),
        ({}, of_v0, "no `__all__`; one of verifiers' v0, with load_environment, needs verifiers 0.2.0 and an agent"),
        (
            {"data.dataset": "rows.jsonl"},
            None,
            r"data\.dataset = 'rows.jsonl' would not be read: an environment of veri",
        ),
        ({"data.eval_dataset": ("a", "b")}, None, r"data\.eval_dataset = \('a', 'b'\) would not be read"),
        ({"data.reward": "a:b"}, refuse, "data.environment has rewards of its own"),
        ({}, None, r"is too old \(.*\): pip install 'fastgrpo\[verifiers\]'"),
        ({"data.environment_args": "{"}, refuse, "data.environment_args is no JSON"),
        ({"data.environment_args": "[]"}, refuse, "data.environment_args must be a JSON object"),
        ({"data.environment_args": '{"taskset": 3}'}, refuse, "must be a JSON object, its taskset too"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], load: Any, sentence: str
) -> None:
    installed(monkeypatch, load)
    config = resolve({"data.environment": "verifiers:adding"} | keys)
    with pytest.raises(UserError, match=sentence):
        task_of(config).load_problems(config)


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("verifiers", "verifiers.v1"):
        monkeypatch.setitem(sys.modules, name, None)
    config = resolve({"data.environment": "verifiers:adding"})
    with pytest.raises(UserError, match=r"verifiers:adding needs the package verifiers .*: pip install"):
        task_of(config).load_problems(config)


def test_a_name_belongs_in_its_key() -> None:
    with pytest.raises(UserError, match=r"the name 'verifiers:adding' belongs in the key data\.environment"):
        environment_task("verifiers:adding", ())  # type: ignore[arg-type]
