"""What vLLM is kept from: folders whose names are patterns, and the terminal where a signal ends its start."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest

from fastgrpo.engine.process import output_kept_back, without_wildcards


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
