"""Several ways to answer the same problems side by side: Markdown tables, a plot and the rows, in one folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastgrpo.errors import replace_file
from fastgrpo.record.json_lines import lines_of
from fastgrpo.record.problem_statistics import by_problem, interval, stages_of, thirds
from fastgrpo.record.report_figures import THIRDS, svg

Row = Mapping[str, Any]
# Metric, heading, scale, decimals.
COLUMNS = (
    ("solved", "pass@1, %", 100.0, 1),
    ("pass_rate", "pass rate, %", 100.0, 1),
    ("worker_calls", "worker calls", 1.0, 2),
    ("worker_tokens", "worker tokens", 1.0, 0),
    ("worker_cost_usd", "US dollars for 1,000 queries", 1000.0, 3),
    ("latency_seconds", "latency, s", 1.0, 2),
    ("reward", "reward", 1.0, 3),
)


def write_comparison(folder: Path, name: str, rows: Sequence[Row], more: str) -> str:
    """`name`.jsonl, .md and .svg in `folder` from rows {stage, problem_id, dataset, solved, ...}.

    `name`-tests.svg has public against hidden pass rates. Returns the Markdown: a table of all problems, of each data
    set where there are several, then `more` and, where there are public tests, their pass rates against hidden ones.
    Raises UserError where they cannot be written.
    """
    public = any(row.get("public_pass_rate") is not None for row in rows)
    gap = f"## Public against hidden tests\n\n{gap_table(rows)}" if public else ""
    text = "\n".join([*_tables(rows), more, gap])
    figures = {f"{name}.svg": cost_figure(rows), f"{name}-tests.svg": gap_figure(rows)}
    write_texts(folder, {f"{name}.jsonl": lines_of(rows), f"{name}.md": text} | figures)
    return text


def write_texts(folder: Path, files: Mapping[str, str]) -> None:
    """Texts by their names in `folder`. Raises UserError where one cannot be written: its file is as it was."""
    for name, text in files.items():
        replace_file(folder / name, text.encode(), "free space or set --runs")


def _tables(rows: Sequence[Row]) -> Iterable[str]:
    """All problems together, each counting once, then each data set by itself."""
    sets = sorted({row["dataset"] for row in rows})
    yield comparison_table("all problems", rows)
    for name in sets if len(sets) > 1 else ():
        yield comparison_table(name, [row for row in rows if row["dataset"] == name])


def comparison_table(title: str, rows: Sequence[Row]) -> str:
    """A line for each stage: means and 95 % bootstrap intervals over problems."""
    shown = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    problems = len({row["problem_id"] for row in rows})
    head = ["", *(heading for _, heading, _, _ in shown)]
    body = [[stage, *(_cell(rows, stage, *column) for column in shown)] for stage in stages_of(rows)]
    return f"## {title}\n\n{problems} problems; [95 % bootstrap interval over problems].\n\n{markdown([head, *body])}"


def _cell(rows: Sequence[Row], stage: str, key: str, heading: str, scale: float, decimals: int) -> str:
    values = by_problem(rows, stage, key)
    return spread([value * scale for value in values.values()], decimals) if values else ""


def spread(values: Sequence[float], decimals: int) -> str:
    """`mean [low, high]` of one value for each problem."""
    mean, low, high = (f"{number:,.{decimals}f}" for number in interval(values))
    return f"{mean} [{low}, {high}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join(["---"] * len(rows[0])) + " |", *lines[1:]]) + "\n"


def gains(rows: Sequence[Row], reference: str) -> str:
    """What each stage gains in pass@1 and reward over `reference`, paired by problem, and what it costs: Markdown.

    Tokens are those of the problems that pass@1 is of: some may have neither tests nor an answer.
    """
    heads = (f"pass@1 over {reference}, points", "reward over it", "tokens, x")
    lines = [["", *heads, "points for each further 100 % of tokens"]]
    checked = [row for row in rows if row.get("solved") is not None]
    for stage in stages_of(rows):
        solved, tokens = (_pairs(checked, stage, reference, key) for key in ("solved", "worker_tokens"))
        if stage == reference or not solved or not tokens:
            continue
        points = [100 * (ours - theirs) for ours, theirs in solved]
        ours, theirs = (sum(column) for column in zip(*tokens, strict=True))
        further = (ours - theirs) / theirs if theirs else 0.0
        rate = f"{sum(points) / len(points) / further:.2f}" if further > 0 else ""
        rewards = [mine - other for mine, other in _pairs(rows, stage, reference, "reward")]
        ratio = f"{ours / theirs:.2f}" if theirs else ""
        lines.append([stage, spread(points, 1), spread(rewards, 3) if rewards else "", ratio, rate])
    return markdown(lines)


def _pairs(rows: Sequence[Row], stage: str, reference: str, key: str) -> list[tuple[float, float]]:
    ours, theirs = by_problem(rows, stage, key), by_problem(rows, reference, key)
    return [(ours[problem], theirs[problem]) for problem in sorted(ours.keys() & theirs.keys())]


def gap_table(rows: Sequence[Row]) -> str:
    """Pass rates of public and of hidden tests, and by how many points they differ, for each third of difficulty."""
    lines = [["", "problems", "public, %", "hidden, %", "public - hidden, points", "complexity", "texts"]]
    for stage in stages_of(rows):
        for part, problems in zip(THIRDS, thirds(rows), strict=True):
            some = [row for row in rows if row["stage"] == stage and row["problem_id"] in problems]
            pairs = _tested(some, stage)
            if pairs:
                public, hidden = ([100 * value for value in column] for column in zip(*pairs, strict=True))
                gap = spread([p - h for p, h in zip(public, hidden, strict=True)], 1)
                complexity = by_problem(some, stage, "complexity").values()
                weight = f"{np.mean(list(complexity)):.2f}" if complexity else ""
                texts = str(len({row["workflow"] for row in some}))
                lines.append([stage, part, f"{np.mean(public):.1f}", f"{np.mean(hidden):.1f}", gap, weight, texts])
    return markdown(lines)


def _tested(rows: Sequence[Row], stage: str) -> list[tuple[float, float]]:
    """(public, hidden) pass rate of each problem."""
    public, hidden = (by_problem(rows, stage, key) for key in ("public_pass_rate", "pass_rate"))
    return [(public[problem], hidden[problem]) for problem in sorted(public.keys() & hidden.keys())]


def gap_figure(rows: Sequence[Row]) -> str:
    """Public less hidden pass rate in points over the thirds of difficulty, a line for each stage: an SVG."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for stage in stages_of(rows):
            parts = [_tested([row for row in rows if row["problem_id"] in part], stage) for part in thirds(rows)]
            gaps = [100 * float(np.mean([p - h for p, h in pairs])) if pairs else np.nan for pairs in parts]
            axes.plot(THIRDS, gaps, marker="o", label=stage)
        axes.set(ylabel="public - hidden pass rate, points")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return svg(3.4, draw)


def cost_figure(rows: Sequence[Row]) -> str:
    """pass@1 against worker tokens, a dot for each stage, with 95 % bootstrap intervals over problems: an SVG."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, stage in enumerate(stages_of(rows)):
            solved, tokens = (list(by_problem(rows, stage, key).values()) for key in ("solved", "worker_tokens"))
            if solved and tokens:
                y, low, high = (100 * value for value in interval(solved))
                x, left, right = interval(tokens)
                errors: Any = {"xerr": [[x - left], [right - x]], "yerr": [[y - low], [high - y]]}
                axes.errorbar(x, y, **errors, fmt="os^Dv<>P*X"[number % 10], capsize=2, linewidth=0.8, label=stage)
        axes.set(xlabel="worker tokens for each query", ylabel="pass@1, %")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return svg(4.2, draw)
