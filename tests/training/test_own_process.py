"""A run whose engine has a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import msgspec
import psutil
import pytest

from fastgrpo.config import Config
from fastgrpo.engine.engine_process import EngineProcess
from fastgrpo.engine.opening import open_engine
from fastgrpo.training import learner
from tests.helpers.marks import exact
from tests.test_train import metrics
from tests.training.test_lag import lags, model, settings, train

__all__ = ["model"]

pytestmark = pytest.mark.engine


def own(config: Config) -> Config:
    return msgspec.structs.replace(config, engine=msgspec.structs.replace(config.engine, process="own"))


@pytest.fixture(scope="module")
def process(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """The engine of both runs, one after the other: its start is the slow part."""
    config = own(settings(model, tmp_path_factory.mktemp("unused"), "own"))
    with open_engine(config, model) as engine:
        assert isinstance(engine, EngineProcess)
        pid = engine.pid
        yield engine
    assert not psutil.pid_exists(pid)


@pytest.fixture
def opened(process: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a run opens is this engine, and the next run's policy takes its weights over."""
    with monkeypatch.context() as patch:
        patch.setattr(learner, "open_engine", lambda *_, **__: nullcontext(process))
        yield


@exact
def test_its_numbers_are_those_of_a_run_in_one_process(model: Path, tmp_path: Path, request) -> None:
    shared = train(settings(model, tmp_path, "shared", steps=3, max_lag=1))
    request.getfixturevalue("opened")
    apart = train(own(settings(model, tmp_path, "own", steps=3, max_lag=1)))
    assert [row["step"] for row in metrics(apart)] == [1, 2, 3]
    for one, other in zip(metrics(shared), metrics(apart), strict=True):
        for name in ("loss", "reward/total", "grad_norm", "loss_tokens", "lag", "lag_max"):
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), (one["step"], name)
        assert other["parity"] < 1e-4


def test_weights_change_while_it_decodes(model: Path, tmp_path: Path, opened: None) -> None:
    folder = train(own(settings(model, tmp_path, "flight", steps=3, max_lag=2, in_flight=True, max_new_tokens=40)))
    found = lags(folder)
    assert len(found) == 3 * 8
    assert all(0 <= lag <= 2 for _, tokens in found for lag in tokens)
    assert all(tokens == sorted(tokens, reverse=True) for _, tokens in found)
