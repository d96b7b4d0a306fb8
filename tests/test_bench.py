"""Every benchmark starts on this machine: its `--help` needs all that it imports."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "bench"
PROGRAMS = sorted(path for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PROGRAMS, ids=[path.stem for path in PROGRAMS])
def test_program_explains_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_picture_of_the_loss_head_is_of_the_whole_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    rows = runpy.run_path(str(FOLDER / "plot_loss_head.py"))["forward_and_backward"]
    names = [name for name, _ in rows((FOLDER / "results/loss_head.md").read_text(encoding="utf-8"))]
    assert (names[0], names[-1], len(names)) == ("three matrix products (floor)", "Liger fused GRPO", 7)
    assert "linear_grpo_loss, forward and backward" in names


def test_a_gpu_is_idle_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    milliseconds = runpy.run_path(str(FOLDER / "worker_watch.py"))["gpu_milliseconds"]
    device = torch.autograd.DeviceType

    def event(name: str, start: float, end: float, where: object = device.CUDA) -> SimpleNamespace:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=where)

    found = milliseconds(
        [
            event("product", 1000, 3000),
            event("copy", 2000, 2500),  # beside it
            event("product", 5000, 6000),
            event("launch", 0, 9000, device.CPU),
        ]
    )
    assert found == {
        "GPU in all": 5,
        "GPU busy": 3,
        "GPU idle": 2,
        "product": 3,
        "copy": 0.5,
        "idle before product": 2,
    }
    assert milliseconds([]) == {}


@pytest.mark.parametrize(
    "words",
    [
        ["bench_engine", "--parts", "step,stop"],
        ["bench_generation", "--variants", "stop"],
        ["bench_generation", "--tokens", "64"],
        ["bench_decoding", "--variants", "worker,stop"],
    ],
    ids=" ".join,
)
def test_what_a_program_does_not_have_is_said_at_once(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{words[0]}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "error: --" in capsys.readouterr().err


READERS = ("step_parts", "structure_advantages", "compare_evaluations", "reward_sweep")


@pytest.mark.parametrize("program", READERS)
@pytest.mark.parametrize("text", [None, "", "no JSON\n", '{"stage": "sft", "step": 1}\n'])
def test_a_file_that_is_no_run_s_is_one_sentence(
    program: str, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    file = tmp_path / "samples.jsonl"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(sys, "argv", [program, str(tmp_path if program == "step_parts" else file)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{program}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
