"""`sandbox.hosts`: solutions are tried and scored on servers, and a name that is none is one sentence."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from fastgrpo.config_keys import checked, resolve
from fastgrpo.errors import UserError
from fastgrpo.flow import task
from fastgrpo.flow.problems.scoring import solvable
from tests.flow.conftest import ADD, RIGHT, WRONG
from tests.sandbox.server import running_server

pytestmark = pytest.mark.jail


def settings(hosts: str) -> Any:
    return resolve(checked({"task": "code", "sandbox.hosts": hosts, "sandbox.cells": 1}, source="a test", strict=False))


def test_a_list_is_given_with_commas():
    assert settings("http://a:1, http://b:2").sandbox.servers == ("http://a:1", "http://b:2")
    assert (settings("ray").sandbox.servers, resolve({}).sandbox.servers) == (("ray",), ())


@pytest.mark.parametrize("hosts", ["localhost:8080", "ray, http://a:1", "Ray"])
def test_what_is_no_address_is_named(hosts):
    with pytest.raises(UserError, match=r"sandbox.hosts must be ray, or addresses as http://HOST:PORT, got"):
        settings(hosts)


def test_programs_run_on_the_servers(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FASTGRPO_SANDBOX_KEY", "key")

    async def rates(config: Any) -> list[float]:
        async with task.open_programs(config) as environment:
            return [(await environment.execute(ADD, text, 0)).pass_rate for text in (RIGHT, WRONG)]

    with running_server("--cells", "1", "--key-env", "K", K="key") as server:
        config = settings(server.url)
        problems = [ADD, replace(ADD, id="bad", solution="def add(a, b): return 0")]
        assert [problem.id for problem in solvable(problems, config.data, config.sandbox)] == ["add"]
        assert asyncio.run(rates(config)) == [1.0, 0.0]
        said = server.ask("/metrics", headers={"Authorization": "Bearer key"}).body
        assert 'path="/run"' in said


def test_no_server_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = settings("http://127.0.0.1:9")

    async def enter() -> None:
        async with task.open_programs(config):
            pass

    for call in (lambda: asyncio.run(enter()), lambda: solvable([ADD], config.data, config.sandbox)):
        with pytest.raises(UserError, match=r"no jail server works: http://127.0.0.1:9: Cannot connect"):
            call()
