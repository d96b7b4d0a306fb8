"""The report: one page that loads nothing, from a whole run or from what is there so far; model output is escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fastgrpo import report
from fastgrpo.errors import UserError
from fastgrpo.record import report_figures
from fastgrpo.record.problem_statistics import interval, thirds
from fastgrpo.report import choose, write_report

HOSTILE = "# </pre><script>alert(1)</script>\n\"'&<img src=x onerror=alert(1)> {braces}"


def evaluation(stages: tuple[str, ...] = ("sft", "grpo"), problems: int = 9) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "problem_id": f"P/{number}",
            "difficulty": number / problems,
            "metrics": {
                "pass_rate": 0.9 if stage == "grpo" else 0.5,
                "complexity": number / 10 if stage == "grpo" else 0.3,
                "worker_calls": 1.0 + number,
                "spent": 1.0 + number // 3,
            },
            "reward": 0.8 - number / 100,
            "status": "ok",
            "workflow": f"{HOSTILE} {stage} {number}",
        }
        for stage in stages
        for number in range(problems)
    ]


def write_metrics(folder: Path, steps: int) -> None:
    rows = [
        {"stage": "grpo", "step": step, "reward/total": 0.1 * step, "loss": None, "seconds/step": 1, "seconds/train": 1}
        | {"train_tokens_per_s": 1000.0 * step, "mfu": None, "tail_after_answers_s": 0.5 * step}
        for step in range(1, steps + 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"stage": "gr')


class Page(HTMLParser):
    """Tags, attributes and text of the report."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_whole_run(tmp_path: Path) -> None:
    write_metrics(tmp_path, 7)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    (tmp_path / "config.toml").write_text("seed = 7 # <b>")
    page = Page(write_report(tmp_path))
    assert page.tags.count("svg") == 6
    assert "+40 points" in page.text
    assert "by phase, 4,000 trained, worst step 3.5 s after the last answer of a worker." in page.text
    assert f"{HOSTILE} grpo 0" in page.text
    assert f"{HOSTILE} sft 0" not in page.text
    assert "seed = 7 # <b>" in page.text
    assert "sft3.00 [" in page.text  # cost, hardest third over easiest
    assert "grpo3.00 [" in page.text
    for title in ("Reward and its terms", "Pass rate before and after", "Workflow complexity", "Outcomes", "torch"):
        assert title in page.text


def test_the_page_of_a_reward_function_speaks_of_completions(tmp_path: Path) -> None:
    """It told of 0.0 % invalid workflows, and of an SFT, where there was neither."""
    write_metrics(tmp_path, 3)
    rows = [row | {"metrics": {}, "difficulty": None} for row in evaluation()]
    (tmp_path / "evaluation.json").write_text(json.dumps(rows))
    text = Page(write_report(tmp_path)).text
    assert "SFT" not in text
    assert "invalid" not in text
    for part in ("reward, after GRPO over before", "How the sampled completions ended.", "A completion to read"):
        assert part in text


def test_a_policy_of_whose_workflows_none_is_valid_is_told_so(tmp_path: Path) -> None:
    write_metrics(tmp_path, 3)
    rows = [row | {"metrics": {}, "status": "invalid"} for row in evaluation()]
    (tmp_path / "evaluation.json").write_text(json.dumps(rows))
    text = Page(write_report(tmp_path)).text
    assert "100.0%" in text
    assert "invalid workflows after GRPO" in text


def test_page_runs_nothing_and_loads_nothing(tmp_path: Path) -> None:
    write_metrics(tmp_path, 3)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    path = write_report(tmp_path)
    page = Page(path)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    linked = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value is not None and value.startswith("#") for value in linked)
    for element in re.findall(r"<svg.*?</svg>", path.read_text(), re.S):
        ElementTree.fromstring(element)


@pytest.mark.parametrize(("steps", "stages"), [(0, ()), (0, ("sft",)), (1, ()), (2, ("sft",)), (1, ("sft", "grpo"))])
def test_partial_runs(tmp_path: Path, steps: int, stages: tuple[str, ...]) -> None:
    write_metrics(tmp_path, steps)
    if stages:
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(stages, problems=2)))
    sample = {"stage": "grpo", "step": 1, "workflow": HOSTILE, "complexity": 0.5, "reward": {"total": 0.25}}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    text = Page(write_report(tmp_path)).text
    assert HOSTILE in text
    assert ("reward 0.25, complexity 0.50" in text) == (not stages)
    assert ("Reward and its terms" in text) == (steps > 0)
    assert ("Pass rate before and after" in text) == bool(stages)


def test_problems_without_a_difficulty_are_in_no_plot_against_it(tmp_path: Path) -> None:
    """Some of a task's problems may have one, and others none."""
    write_metrics(tmp_path, 1)
    rows = [row | ({"difficulty": None} if row["problem_id"] == "P/4" else {}) for row in evaluation()]
    (tmp_path / "evaluation.json").write_text(json.dumps(rows))
    assert "Workflow complexity against problem difficulty" in Page(write_report(tmp_path)).text
    known = [row["metrics"] | row for row in rows if row["problem_id"] != "P/4"]
    everything = [row["metrics"] | row for row in rows]
    figures = [report_figures.difficulty_figure(part, "complexity", "c") for part in (everything, known)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("text", ['[{"stage": "sft"', '[{"stage": "sft"}]'])
def test_half_written_evaluation_is_left_out(tmp_path: Path, text: str) -> None:
    write_metrics(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\n{"another": "file"}\n')
    (tmp_path / "evaluation.json").write_text(text)
    assert "Pass rate" not in Page(write_report(tmp_path)).text


def test_not_a_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)


def test_chosen_workflows_are_an_easy_a_hard_and_a_failed_one_of_the_last_stage() -> None:
    invalid = {"problem_id": "P/3", "reward": -0.5, "status": "invalid"}
    rows = evaluation()
    chosen = choose([*rows, rows[-6] | invalid])
    assert [row["problem_id"] for _, row in chosen] == ["P/0", "P/6", "P/8"]
    assert {row["stage"] for _, row in chosen} == {"grpo"}


def test_thirds_split_problems_by_difficulty() -> None:
    parts = thirds(evaluation(problems=7))
    assert parts == [["P/0", "P/1", "P/2"], ["P/3", "P/4"], ["P/5", "P/6"]]


def test_interval_holds_the_mean_and_shrinks_with_more_problems() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.2, 400).tolist()
    mean, low, high = interval(values)
    assert low < mean < high
    assert mean == pytest.approx(float(np.mean(values)))
    _, low_few, high_few = interval(values[:20])
    assert high - low < high_few - low_few
    # 1.96 standard errors each side.
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values) / 20, rel=0.1)


def test_smooth_is_a_trailing_mean_without_nan() -> None:
    assert report_figures.smooth(np.array([1.0, 3.0, np.nan, 5.0, 7.0, 9.0])).tolist() == [1.0, 2.0, 2.0, 3.0, 4.0, 6.0]


def test_values_of_another_kind_are_left_out(tmp_path: Path) -> None:
    """As a disk or another program leaves them, in each field of each file."""
    odd: list[Any] = ["x", [], {"a": 1}, -1, None]
    metrics = {
        "stage": "grpo",
        "step": 1,
        "reward/total": 0.5,
        "seconds/step": 1.0,
        "tail_s": 1.0,
        "flop": 2.0,
        "mfu": 0.1,
    }
    sample = {"step": 1, "workflow": "code", "reward": {"total": 1.0}, "pass_rate": 0.5, "status": "ok"}
    row = evaluation(problems=1)[0]
    lines = [metrics | {name: value} for name in metrics for value in odd]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [metrics, *lines]))
    samples = [sample | {name: value} for name in sample for value in odd]
    rows = [row | {name: value} for name in row for value in odd]
    (tmp_path / "config.toml").write_bytes(b"\xff")
    for three in range(0, len(samples), 3):
        text = "".join(json.dumps(each) + "\n" for each in samples[three : three + 3])
        assert list(report._from_samples(write(tmp_path / "samples.jsonl", text))) is not None
    write(tmp_path / "evaluation.json", json.dumps([*evaluation(), *rows]))
    assert "+40 points" in Page(write_report(tmp_path)).text


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_held_out_rewards_are_dots_among_the_steps() -> None:
    rows = [{"stage": "grpo", "step": step, "reward/total": 0.1 * step} for step in range(1, 5)]
    assert "held out" not in report_figures.reward_figure(rows)
    rows[2]["held_out/reward"] = 0.5
    assert "held out" in report_figures.reward_figure(rows)
