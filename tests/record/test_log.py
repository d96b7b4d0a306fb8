"""What is written survives crashes and full disks; a resumed run's files look as if it had never stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgrpo.config import Record
from fastgrpo.config_keys import resolve
from fastgrpo.errors import CannotWrite, UserError
from fastgrpo.record import log as log_module
from fastgrpo.record.display import Display, duration, sparkline
from fastgrpo.record.json_lines import PARTS, JsonLines, RotatingLines, encoded, read_lines
from fastgrpo.record.log import RunLog, open_log
from fastgrpo.record.phases import PhaseTimer
from tests.helpers.full_disk import full_disk


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def train(log: RunLog, start: int, stop: int) -> None:
    log.stage("grpo", total=stop, done=start)
    for step in range(start + 1, stop + 1):
        log.samples(step, [{"workflow": f"line\n{step}"}])
        log.step(step, {"reward/total": step / 10})


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_log_that_is_taken_away_ends_the_run_that_writes_it(tmp_path: Path, how: str) -> None:
    (tmp_path / "run").mkdir()
    with RunLog(tmp_path / "run") as log:
        log.stage("grpo", 2)
        log.step(1, {"loss": 1.0})
        (tmp_path / "run").rename(tmp_path / "run.1")
        if how == "replaced":
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "metrics.jsonl").touch()
        with pytest.raises(CannotWrite, match=r"run/metrics\.jsonl was moved or removed while the run goes on"):
            log.step(2, {"loss": 1.0})
    assert [row["step"] for row in rows(tmp_path / "run.1")] == [1]


def test_metrics_samples_and_events_of_two_stages(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.stage("sft", total=1)
        log.step(1, {"loss": 2.5})
        train(log, 0, 3)
    assert [(row["stage"], row["step"]) for row in rows(tmp_path)] == [
        ("sft", 1),
        ("grpo", 1),
        ("grpo", 2),
        ("grpo", 3),
    ]
    assert rows(tmp_path, "samples.jsonl")[2] == {"stage": "grpo", "step": 3, "workflow": "line\n3"}
    events = EventAccumulator(str(tmp_path / "tensorboard" / "grpo")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("reward/total")] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_resume_cuts_what_the_lost_steps_wrote(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.stage("sft", total=5)
        log.step(5, {"loss": 1.0})
        train(log, 0, 4)
        log.stage("evaluate", total=1)
        log.step(1, {"pass_rate": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage":"grpo","ste')
    with RunLog(tmp_path) as log:
        train(log, 2, 4)
    assert [(row["stage"], row["step"]) for row in rows(tmp_path)] == [("sft", 5), *(("grpo", s) for s in (1, 2, 3, 4))]
    assert [row["step"] for row in rows(tmp_path, "samples.jsonl")] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "grpo")).Reload()
    assert [event.step for event in events.Scalars("reward/total")] == [1, 2, 3, 4]


def test_a_clock_that_was_set_back_reorders_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(tmp_path) as log:
        train(log, 0, 2)
    now = time.time_ns()
    monkeypatch.setattr(log_module.time, "time_ns", lambda: now - 10**15)
    with RunLog(tmp_path) as log:
        train(log, 2, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "grpo")).Reload()
    assert [event.step for event in events.Scalars("reward/total")] == [1, 2, 3, 4]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_another_encoding_ends_no_run(encoding: str) -> None:
    code = (
        "from fastgrpo.record.display import Display; from fastgrpo.record.phases import PhaseTimer\n"
        "for live in (False, True):\n"
        "    display = Display('é', PhaseTimer(), live=live)\n"
        "    display.stage('grpo', 1, 0)\n"
        "    display.say('p→1')\n"
        "    display.step(1, {'reward/total': 1.0}, 'p→1')\n"
        "    display.close()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.count(b"p\\u21921" if encoding != "utf-8" else "p→1".encode()) >= 2


def test_full_disk_loses_only_the_line_being_written(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(2):
        file.append({"stage": "grpo", "step": step, "text": "x" * 10})
    with full_disk(100), pytest.raises(CannotWrite, match=r"cannot write .*metrics\.jsonl.*--resume") as caught:
        file.append({"stage": "grpo", "step": 2, "text": "x" * 10})
    assert "\n" not in str(caught.value)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]
    file.append({"stage": "grpo", "step": 2})
    file.close()
    assert len(rows(tmp_path)) == 3


def test_full_disk_under_the_events_is_a_user_error(tmp_path: Path) -> None:
    with full_disk(2000), pytest.raises(CannotWrite, match="cannot write"), RunLog(tmp_path) as log:
        train(log, 0, 100)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, len(rows(tmp_path)) + 1))


def test_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        RunLog(tmp_path / "missing")


@settings(deadline=None)
@given(
    lines=st.lists(st.tuples(st.sampled_from(["sft", "grpo"]), st.integers(1, 5))),
    step=st.integers(0, 5),
    torn=st.binary(),
)
def test_cut_keeps_exactly_the_lines_before(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, int]], step: int, torn: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.unlink(missing_ok=True)
    file = JsonLines(path)
    for stage, number in lines:
        file.append({"stage": stage, "step": number})
    path.write_bytes(path.read_bytes() + b"{" + torn.replace(b"\n", b" "))
    file.cut("grpo", step)
    file.close()
    first = next((i for i, (stage, number) in enumerate(lines) if stage == "grpo" and number > step), len(lines))
    assert [(row["stage"], row["step"]) for row in map(json.loads, path.read_text().splitlines())] == lines[:first]


@pytest.mark.parametrize("damage", [b"\x00" * 20, b"[]", b'{"stage":"grpo"}', b"\xff\xfe", b""])
@pytest.mark.parametrize("damaged", [0, 1, 3])
def test_a_line_that_a_disk_has_damaged_costs_itself_alone(tmp_path: Path, damaged: int, damage: bytes) -> None:
    path, lines = tmp_path / "metrics.jsonl", [b'{"stage":"grpo","step":%d}' % step for step in range(1, 5)]
    lines[damaged] = damage
    path.write_bytes(b"\n".join([*lines, b""]))
    file = JsonLines(path)
    assert file.cut("grpo", 3) is (damaged != 3)
    file.close()
    steps = [step for step in (1, 2, 3) if step != damaged + 1]
    assert [row["step"] for row in read_lines(path) if "step" in row] == steps
    assert path.read_bytes().endswith(lines[2] + b"\n")


def test_damage_at_the_end_of_an_older_part_costs_no_newer_one(tmp_path: Path) -> None:
    file = RotatingLines(tmp_path / "samples.jsonl", PARTS * 200)
    for number in range(1, 11):
        file.extend([encoded({"stage": "grpo", "step": number, "text": "x" * 20})])
    before = kept(tmp_path)
    with (tmp_path / "samples.1.jsonl").open("ab") as part:
        part.write(b"\x00" * 9)
    file.cut("grpo", 10)
    file.close()
    assert kept(tmp_path) == before


def kept(folder: Path) -> list[int]:
    """The steps of samples.jsonl and its older parts, the oldest first."""
    parts = [folder / f"samples.{number}.jsonl" for number in range(PARTS, 0, -1)]
    found = [path for path in [*parts, folder / "samples.jsonl"] if path.exists()]
    return [row["step"] for path in found for row in rows(folder, path.name)]


def test_samples_are_bounded_and_the_oldest_are_dropped(tmp_path: Path) -> None:
    with RunLog(tmp_path, record=Record(samples_mib=1)) as log:
        log.stage("grpo", total=60)
        for step in range(1, 61):
            log.samples(step, [{"text": "x" * 30_000}] if step != 50 else [{"text": "x" * 200_000}])
    files = list(tmp_path.glob("samples*.jsonl"))
    assert len(files) == PARTS
    assert sum(path.stat().st_size for path in files) <= 2**20 + 200_000
    steps = kept(tmp_path)
    assert steps == list(range(steps[0], 61))
    assert 1 < steps[0] < 40


def test_lines_that_come_at_once_lie_in_parts_as_one_after_another(tmp_path: Path) -> None:
    lines = [encoded({"stage": "grpo", "step": step, "text": "x" * (7 * step)}) for step in range(1, 25)]
    for name, groups in (("each", [[line] for line in lines]), ("all", [lines]), ("some", [lines[:5], [], lines[5:]])):
        (tmp_path / name).mkdir()
        file = RotatingLines(tmp_path / name / "samples.jsonl", PARTS * 300)
        for group in groups:
            file.extend(group)
        file.close()
    each, together, some = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("each", "all", "some")
    )
    assert each == together == some
    assert len(each) == PARTS


@pytest.mark.parametrize("step", [0, 3, 17, 25, 29, 30])
def test_a_cut_reaches_back_through_the_parts(tmp_path: Path, step: int) -> None:
    path = tmp_path / "samples.jsonl"
    # Three lines a part.
    file = RotatingLines(path, PARTS * 200)
    for number in range(1, 31):
        file.extend([encoded({"stage": "grpo", "step": number, "text": "x" * 20})])
    oldest = kept(tmp_path)[0]
    file.cut("grpo", step)
    assert kept(tmp_path) == list(range(oldest, step + 1))
    file.extend([encoded({"stage": "grpo", "step": step + 1})])
    file.close()
    assert kept(tmp_path) == [*range(oldest, step + 1), step + 1]


def test_a_full_disk_while_rotating_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RotatingLines(tmp_path / "samples.jsonl", PARTS * 64)
    file.extend([encoded({"stage": "grpo", "step": 1, "text": "x" * 40})])

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*samples\.jsonl: No space left on device; free space"):
        file.extend([encoded({"stage": "grpo", "step": 2, "text": "x" * 40})])


def test_samples_of_all_ranks_are_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "gather_first", lambda own, what: [own, 2 * [b'{"rank":1}\n'], []])
    with RunLog(tmp_path) as log:
        log.stage("grpo", total=1)
        log.samples(1, [{"rank": 0}])
    assert [row["rank"] for row in rows(tmp_path, "samples.jsonl")] == [0, 1, 1]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(None) as log:
        train(log, 0, 2)
        log.say("hello")
    assert capsys.readouterr().out == ""


def test_phases_are_exclusive_and_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timer = PhaseTimer()
    with timer.phase("train"):
        clock[0] += 2
        with timer.phase("sync"):
            clock[0] += 3
            assert timer.current == "sync"
        clock[0] += 4
    clock[0] += 1
    assert timer.take() == {"train": 6, "sync": 3, "other": 1}
    clock[0] += 5
    assert timer.take() == {"other": 5}


def test_phase_ends_with_an_exception() -> None:
    timer = PhaseTimer()
    with pytest.raises(ValueError, match="x"), timer.phase("train"):
        raise ValueError("x")
    assert timer.current == "other"


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path) as log:
        log.stage("grpo", total=2)
        with log.phase("generate"):
            time.sleep(0.01)
        log.step(1, {"reward/total": 0.25, "pass_rate": 0.5})
        log.say("a [bold] remark")
        log.step(2, {"reward/total": 0.75})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert re.search(
        r"^grpo 1/2 \| reward 0\.250 \| pass rate 50\.0% \|.* generate \d\.\ds \d+%.* \| left \w+$", out, re.M
    )
    assert "a [bold] remark\n" in out
    assert "grpo 2/2 | reward 0.750" in out


def test_panel_shows_metrics_phases_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = PhaseTimer()
    display = Display("demo [x]", timer, live=False)
    display.stage("grpo", 10, 0)
    display.step(1, {"reward/total": 0.1, "seconds/step": 2.0, "seconds/generate": 1.5, "seconds/train": 0.5})
    display.step(2, {"reward/total": 0.3, "seconds/step": 2.0, "seconds/generate": 1.5, "seconds/train": 0.5})
    display.status({"jails": 7, "tokens_per_s": 4000.0})
    console = Console(record=True, width=110, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(display._render())
    text = console.export_text()
    for piece in ("demo [x]", "step 2/10", "left", "▁█", "0.300", "jails in flight", "4,000", "1.50 s", "75%", "25%"):
        assert piece in text


@settings(deadline=None)
@given(st.lists(st.floats(), max_size=40))
def test_sparkline_has_one_mark_a_value(values: list[float]) -> None:
    curve = sparkline(tuple(values))
    assert len(curve) in (0, len(values))


def test_sparkline_and_duration() -> None:
    assert sparkline((0.0, 0.5, 1.0)) == "▁▅█"
    assert sparkline((2.0, 2.0)) == "▁▁"
    assert [duration(s) for s in (0.4, 45, 190, 7500)] == ["0s", "45s", "3m10s", "2h05m"]


def test_a_long_wait_is_in_the_step_line_with_what_of_it_came_after_the_last_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = Display("demo", PhaseTimer(), live=False)
    display.stage("grpo", total=2, done=0)
    display.step(1, {"tail_s": 12.0, "tail_after_answers_s": 0.5}, waited_for="rank 0: p3")
    assert "| waited 12s for rank 0: p3, 0.5s of it after the last answer" in capsys.readouterr().out
    display.step(2, {"tail_s": 12.0}, waited_for="rank 0: p3")
    assert "p3\n" in capsys.readouterr().out


def test_a_display_whose_reader_is_gone_says_so_and_the_run_goes_on() -> None:
    code = (
        "import sys; from fastgrpo.record.display import Display; from fastgrpo.record.phases import PhaseTimer\n"
        "sys.stdin.readline(); shown = Display('demo', PhaseTimer(), live=False)\n"
        "for step in (1, 2): shown.say('step'); shown.close()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate("go\n", timeout=240)
    assert process.returncode == 0
    assert said == "nothing more is shown here (Broken pipe): the run goes on, and its folder has all of it\n"


def test_failures_of_the_infrastructure_are_in_the_step_line_where_there_are_any(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = Display("demo", PhaseTimer(), live=False)
    display.stage("grpo", total=2, done=0)
    display.step(1, {"reward/total": 0.5, "infrastructure": 0.0})
    assert "infrastructure" not in capsys.readouterr().out
    display.step(2, {"reward/total": 0.5, "infrastructure": 3.0})
    assert "| failed for infrastructure 3" in capsys.readouterr().out


def test_any_record_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    lines = JsonLines(path)
    lines.append({"prompt": "a\ud800", "object": {1, 2}, "kind": object})
    lines.append({"step": 2})
    lines.close()
    first, second = read_lines(path)
    assert first["prompt"] == "a?"
    assert second == {"step": 2}


def test_a_name_that_is_not_there_to_resume_leaves_nothing(tmp_path: Path) -> None:
    config = resolve({"runs": str(tmp_path / "runs"), "name": "typo"})
    with pytest.raises(UserError, match=r"nothing to resume: .*typo/config.toml"), open_log(config, resume=True):
        pytest.fail("it was opened")
    assert list(tmp_path.iterdir()) == []
