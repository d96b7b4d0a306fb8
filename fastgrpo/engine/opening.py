"""The engine that a configuration asks for."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastgrpo.config import Config
from fastgrpo.engine.choices import check_kv_cache, own_process
from fastgrpo.engine.engine import Engine
from fastgrpo.engine.engine_process import EngineProcess
from fastgrpo.errors import UserError, writing
from fastgrpo.policy.placement import policy_dtype
from fastgrpo.signals import interruptible

AnyEngine = Engine | EngineProcess
SHARED_MEMORY = "/dev/shm"
SCRATCH_BYTES = 2**14
# What vLLM says where its recurrent layers have fewer states than it may decode sequences together.
STATES = re.compile(r"available Mamba cache blocks \((\d+)\)")


@contextmanager
def open_engine(
    config: Config, model: Path, *, kv_cache_gib: float | None = None, routes: bool = False
) -> Iterator[AnyEngine]:
    """vLLM, in this process or its own, with `model`'s weights; `kv_cache_gib` as planned, None = the configuration's.

    `routes`: its completions tell the experts of their tokens.

    Raises UserError with vLLM's reason where it refuses model or settings, as a length that the model does not have,
    and where it has no place for files of its own.
    """
    check_kv_cache(config)
    require_scratch()
    try:
        with interruptible(), without_wildcards(model) as folder:
            engine = _open(config, folder, kv_cache_gib, routes)
    except (ValueError, NotImplementedError) as error:
        said = _reason(error, config)
        raise UserError(f"vLLM does not start with {model} and the [engine] settings: {said}") from error
    try:
        yield engine
    finally:
        engine.close()


def _reason(error: Exception, config: Config) -> str:
    """Why vLLM does not start, of its `error` the sentence that says so."""
    # pydantic's errors begin with a line of their own, and end with the input that they are of.
    said = str(error).rpartition("Value error, ")[2].strip() or type(error).__name__
    said = said.splitlines()[0].partition(" [type=")[0]
    if states := STATES.search(said):
        asked = config.engine.max_num_seqs
        return f"it has states for {states[1]} sequences at once: lower engine.max_num_seqs = {asked} to {states[1]}"
    if "cache blocks" in said or "KV cache is needed" in said:
        # It would have a share of the memory raised, by which nothing is given to it here.
        raised = "" if torch.cuda.is_available() else "raise engine.kv_cache_gib, or "
        length = config.engine.max_model_len
        return f"the KV cache has no room for a sequence of engine.max_model_len = {length} tokens: {raised}lower that"
    return said


def require_scratch() -> None:
    """Raise UserError where nothing can be written for a moment: there vLLM and torch fail without saying at what."""
    with writing("temporary files", "set TMPDIR to a folder with room, or free some in /tmp"):
        _try_in(tempfile.gettempdir())
    with writing(SHARED_MEMORY, "mount a tmpfs there, as docker's --shm-size=8g and --ipc=host do"):
        _try_in(SHARED_MEMORY)


def _try_in(folder: str) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * SCRATCH_BYTES)


def _open(config: Config, folder: str, kv_cache_gib: float | None, routes: bool) -> AnyEngine:
    options: dict[str, Any] = {
        "dtype": str(policy_dtype(config)).removeprefix("torch."),
        "max_model_len": config.engine.max_model_len,
        "max_num_seqs": config.engine.max_num_seqs,
        "kv_cache_gib": kv_cache_gib or (None if torch.cuda.is_available() else config.engine.kv_cache_gib),
        "kv_cache_dtype": config.engine.kv_cache_dtype,
        "enforce_eager": config.engine.enforce_eager,
        "seed": config.seed,
        "parity_threshold": config.engine.parity_threshold,
        "step_timeout_s": config.engine.step_timeout_s,
        "routes": routes,
    }
    if own_process(config):
        return EngineProcess(folder, **options)
    return Engine(folder, tensor_parallel=config.engine.tensor_parallel, **options)


@contextmanager
def without_wildcards(path: str | os.PathLike[str]) -> Iterator[str]:
    """`path`, or a link to it where vLLM, which finds a folder's files by `glob`, would read its name as a pattern."""
    plain = os.fspath(path)
    if glob.escape(plain) == plain:
        yield plain
        return
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "model")
        os.symlink(os.path.abspath(plain), link)
        yield link
