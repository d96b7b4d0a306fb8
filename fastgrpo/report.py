"""`report.html`: one self-contained page that shows what a run did: `python -m fastgrpo.report runs/NAME`."""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from fastgrpo.doctor import versions
from fastgrpo.errors import UserError, expanded, replace_file
from fastgrpo.flow.adaptivity import adaptivity_table
from fastgrpo.program import run_program
from fastgrpo.record import report_figures as figures
from fastgrpo.record.json_lines import read_lines
from fastgrpo.record.problem_statistics import by_problem, interval, thirds
from fastgrpo.types import EvalRow

Row = Mapping[str, Any]
SPEED = {
    "tokens_per_s": "{:,.0f} tokens/s generated",
    "train_tokens_per_s": "{:,.0f} trained",
    "mfu": "MFU {:.1%}",
    "gpu/utilisation": "GPU busy {:.0%}",
    "gpu/memory_gib": "memory {:.1f} GiB",
    "gpu/joules": "{:,.0f} J a step",
}
TAILS = {"tail_s": "the last completion", "tail_after_answers_s": "the last answer of a worker"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #212529; background: #f8f9fa; margin: 0 }}
main {{ max-width: 940px; margin: 0 auto; padding: 24px }}
h1 {{ margin: 0 }} h2 {{ font-size: 18px; margin: 0 0 4px }} p {{ margin: 4px 0 12px; color: #495057 }}
section {{ background: #fff; border: 1px solid #dee2e6; border-radius: 8px; padding: 16px 20px; margin: 16px 0 }}
svg {{ width: 100%; height: auto }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0 }}
.tile {{ flex: 1 1 150px; background: #fff; border: 1px solid #dee2e6; border-radius: 8px; padding: 10px 14px }}
.tile b {{ display: block; font-size: 24px; color: #0b7285 }} .tile span {{ color: #495057; font-size: 13px }}
pre {{ background: #f1f3f5; padding: 12px; border-radius: 6px; overflow-x: auto; font-size: 13px; line-height: 1.4 }}
table {{ border-collapse: collapse }} td, th {{ text-align: left; padding: 2px 18px 2px 0; vertical-align: top }}
</style></head><body><main>{body}</main></body></html>
"""


def read_evaluation(path: Path) -> list[dict[str, Any]]:
    """The rows of evaluation.json, their metrics beside the rest; none where it is missing, half written or another."""
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=list[msgspec.Raw]) if path.exists() else []
    except (OSError, UnicodeDecodeError, msgspec.DecodeError):
        return []
    found = []
    for row in rows:
        with suppress(UnicodeDecodeError, msgspec.DecodeError):
            found.append(msgspec.json.decode(row, type=EvalRow).plain())
    return found


def _numbers(row: Row) -> Row:
    """A line of metrics.jsonl, of which nothing is left but its stage and numbers."""
    number = float | int | None
    return {name: value for name, value in row.items() if isinstance(value, str if name == "stage" else number)}


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from the run's files, whatever of them is there yet; returns its path.

    Reads metrics.jsonl, samples.jsonl, evaluation.json (see `types.EvalRow`) and config.toml. Raises `UserError`
    where `folder` is no run or cannot be written.
    """
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} is not a run: it has no metrics.jsonl; name a folder such as runs/demo")
    rows = map(_numbers, read_lines(folder / "metrics.jsonl"))
    metrics = [row for row in rows if "stage" in row and row.get("step") is not None]
    evaluation = read_evaluation(folder / "evaluation.json")
    body = "\n".join(
        [
            f"<h1>fastgrpo: {escape(folder.resolve().name)}</h1>",
            _headline(metrics, evaluation),
            *_evaluation(evaluation),
            *_workflows(evaluation, folder),
            *_training(metrics),
            _provenance(folder),
        ]
    )
    path = folder / "report.html"
    page = PAGE.format(title=f"fastgrpo: {escape(folder.resolve().name)}", body=body)
    replace_file(path, page.encode(), "free space and run fastgrpo.report again")
    return path


def are_workflows(rows: Sequence[Row]) -> bool:
    """Whether the policy that was evaluated writes workflows: of valid ones the complexity is measured."""
    return any(row.get("complexity") is not None or row["status"] == "invalid" for row in rows)


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{v}</b><span>{k}</span></div>' for k, v in tiles)
        + "</div>"
    )


def _headline(metrics: Sequence[Row], evaluation: Sequence[Row]) -> str:
    """What GRPO changed on held-out problems, paired by problem, or how far the run is."""
    steps = Counter(row["stage"] for row in metrics)
    seconds = sum(row.get("seconds/step") or 0.0 for row in metrics)
    progress = ", ".join(f"{count} {stage} steps" for stage, count in steps.items()) or "no steps yet"
    tiles = [(f"{progress}", f"{seconds / 60:.1f} min")]
    for key, name, scale, unit in (
        ("pass_rate", "held-out pass rate", 100.0, " points"),
        ("reward", "held-out reward", 1.0, ""),
    ):
        before, after = (by_problem(evaluation, stage, key) for stage in ("sft", "grpo"))
        both = before.keys() & after.keys()
        if both:
            gain, low, high = interval([(after[p] - before[p]) * scale for p in sorted(both)])
            spread = f"{name}, after GRPO over before; 95% interval {low:+.2g} to {high:+.2g} over {len(both)} problems"
            tiles.append((spread, f"{gain:+.3g}{unit}"))
    final = [row for row in evaluation if row["stage"] == "grpo"]
    if final and are_workflows(evaluation):
        invalid = sum(row["status"] == "invalid" for row in final) / len(final)
        tiles.append((f"invalid workflows after GRPO, of {len(final)}", f"{invalid:.1%}"))
    return _tiles(tiles)


def _training(metrics: Sequence[Row]) -> Iterator[str]:
    rows = [row for row in metrics if row["stage"] == "grpo"]
    if not rows:
        return
    text = "Mean over the rollouts of each step; strong lines are trailing means of five steps."
    yield _section("Reward and its terms", text, figures.reward_figure(rows))
    text = "Parity is the mean difference between vLLM's and the trainer's logprobs of the same tokens."
    yield _section("Health of the training", text, figures.health_figure(rows))
    text = ", ".join(["Seconds of each step by phase", *_speed(rows), *_worst_tails(rows)])
    yield _section("Where the time goes", f"{text}.", figures.time_figure(rows))


def _speed(rows: Sequence[Row]) -> Iterator[str]:
    """Medians over the steps of what was measured of the hardware."""
    for name, text in SPEED.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            yield text.format(median(values))


def _worst_tails(rows: Sequence[Row]) -> Iterator[str]:
    """The longest waits of a step for what its rollouts still ran."""
    for name, text in TAILS.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            yield f"worst step {max(values):.1f} s after {text}"


def _evaluation(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    problems = len({row["problem_id"] for row in rows})
    text = f"{problems} problems that were never trained on. Error bars: 95% bootstrap over problems."
    if any("pass_rate" in row for row in rows):
        yield _section("Pass rate before and after", text, figures.pass_rate_figure(rows))
    if thirds(rows)[0]:
        yield from _spending(rows)
    adapts = adaptivity_table(rows)
    if len(adapts) > 1:
        text = "Cost in single calls; 95% bootstrap intervals over problems. 1 and 0 are one cost for every query."
        yield _section("How the workflows follow the query", text, _table(adapts))
    counts = Counter((row["stage"], row["status"]) for row in rows)
    stages, statuses = (sorted({key[i] for key in counts}, reverse=i == 0) for i in (0, 1))
    names = {stage: name for stage, (name, _) in figures.STAGES.items()}
    lines = ([names.get(stage, stage), *(counts[stage, status] for status in statuses)] for stage in stages)
    text = f"How the sampled {'workflows' if are_workflows(rows) else 'completions'} ended."
    yield _section("Outcomes", text, _table([["", *statuses], *lines]))


def _spending(rows: Sequence[Row]) -> Iterator[str]:
    """Does the policy spend more where the problem is harder?"""
    text = "A dot is a problem's mean."
    for key, title, label in (
        ("complexity", "Workflow complexity against problem difficulty", "complexity of the workflow"),
        ("worker_calls", "Executed cost against problem difficulty", "worker calls of the workflow"),
    ):
        if any(row.get(key) is not None for row in rows):
            yield _section(title, text, figures.difficulty_figure(rows, key, label))


def _workflows(evaluation: Sequence[Row], folder: Path) -> Iterator[str]:
    chosen = choose(evaluation) if evaluation else list(_from_samples(folder / "samples.jsonl"))
    kind = "completion" if evaluation and not are_workflows(evaluation) else "workflow"
    for why, row in chosen:
        numbers = [(name, row.get(name)) for name in ("pass_rate", "reward", "complexity")]
        shown = [(name, value) for name, value in numbers if isinstance(value, float | int)]
        words = [str(row[name]) for name in ("problem_id", "status") if name in row]
        text = ", ".join([*words, *(f"{name.replace('_', ' ')} {value:.2f}" for name, value in shown)])
        yield _section(f"A {kind} to read: {why}", text, f"<pre>{escape(str(row['workflow']))}</pre>")


def choose(evaluation: Sequence[Row]) -> list[tuple[str, Row]]:
    """Three workflows of the last stage: the best on the easiest and hardest third, and the worst valid one."""
    last = evaluation[-1]["stage"]
    rows = [row for row in evaluation if row["stage"] == last and row["reward"] is not None]
    if not rows:
        return []
    easiest, _, hardest = (set(part) for part in thirds(rows))
    chosen = []
    for why, problems in (("an easy problem", easiest), ("a hard problem", hardest)):
        found = [row for row in rows if row["problem_id"] in problems]
        if found:
            chosen.append((why, max(found, key=lambda row: row["reward"])))
    readable = [row for row in rows if row["status"] != "invalid"] or rows
    chosen.append(("where it fails", min(readable, key=lambda row: row["reward"])))
    return chosen


def _from_samples(path: Path) -> Iterator[tuple[str, Row]]:
    """The latest three samples with a workflow, of a run that was not evaluated yet."""
    rows = [row for row in read_lines(path) if isinstance(row.get("workflow"), str) and row["workflow"]]
    for row in rows[-3:]:
        reward = row["reward"] if isinstance(row.get("reward"), dict) else {}
        yield f"a sample of step {row.get('step')}", {**row, "reward": reward.get("total")}


def _provenance(folder: Path) -> str:
    config = folder / "config.toml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else "(no config.toml)"
    table = _table([[name, version] for name, version in versions().items()])
    return _section("Configuration and versions", "", f"{table}<pre>{escape(text)}</pre>")


def _table(rows: Sequence[Sequence[object]]) -> str:
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def main() -> None:
    """Write the report of the run's folder named on the command line."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print("usage: python -m fastgrpo.report runs/NAME\n\nwrites that run's report.html anew")
        return
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("name one run's folder: python -m fastgrpo.report runs/NAME")
    print(write_report(expanded(sys.argv[1])))


if __name__ == "__main__":
    run_program(main)
