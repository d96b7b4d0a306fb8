from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import save_tiny_model

from fastgrpo.engine import Engine


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Engine]:
    """One vLLM engine for a module's tests: a process can have one at a time, and starting it is the slow part."""
    engine = Engine(tiny_folder, max_model_len=256, max_num_seqs=16, kv_cache_gb=0.1)
    yield engine
    engine.close()
