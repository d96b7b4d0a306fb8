"""Fixtures of more than one folder. They import on use: the jails' tests need no torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fastgrpo.engine.engine import Engine

# How long one example takes says nothing on a busy machine.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")
# Tensors are small here, and teams of threads beside others' would wait for one another: three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file that starts an engine, then three of jails, and so on; after them the rest.

    So one worker computes while the others' jails mostly wait, and none is left with a long file at the end.
    """
    engines, jails, rest = [], [], []
    for path, tests in groupby(items, key=lambda item: item.path):
        marks = {mark.name for item in tests for mark in item.iter_markers()}
        (engines if "engine" in marks else jails if "jail" in marks else rest).append(path)
    order: list[Path] = []
    for number, path in enumerate(engines):
        order += [path, *jails[3 * number : 3 * number + 3]]
    order += [*jails[3 * len(engines) :], *rest]
    places = {path: place for place, path in enumerate(order)}
    items.sort(key=lambda item: places[item.path])


@pytest.fixture(scope="session", autouse=True)
def signals_reach_programs() -> None:
    """Programs that tests start do not ignore what nohup, or a shell's background, has pytest ignore: an exec resets
    handlers alone."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Qwen2 of random weights, small enough for every test of the engine and the policy."""
    from tests.helpers.tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Engine]:
    """One vLLM engine for a module's tests: a process can have one at a time, and starting it is the slow part."""
    from fastgrpo.config import Config
    from fastgrpo.engine.engine import Engine
    from fastgrpo.policy.placement import policy_dtype

    dtype = str(policy_dtype(Config())).removeprefix("torch.")
    engine = Engine(tiny_folder, dtype=dtype, max_model_len=256, max_num_seqs=16, kv_cache_gib=0.1)
    yield engine
    engine.close()
