"""The report's plots, each one function from plain rows to an inline SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastgrpo.record.problem_statistics import by_problem, interval, thirds

Row = Mapping[str, Any]
STAGES = {"sft": ("before GRPO", "#9aa5b1"), "grpo": ("after GRPO", "#0b7285")}
WIDTH = 9.0
THIRDS = ("easiest third", "middle third", "hardest third")
TERM_COLORS = ("#2b8a3e", "#e67700", "#5f3dc4", "#c92a2a", "#1864ab", "#5c940d")
HEALTH = (
    ("loss", "loss"),
    ("entropy", "entropy, nats"),
    ("grad_norm", "gradient norm"),
    ("parity", "parity, nats"),
)
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastgrpo",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecef",
    "legend.frameon": False,
}


def svg(height: float, draw: Callable[[Figure], object]) -> str:
    """The figure that `draw` fills, `WIDTH` x `height` inches, as an SVG element."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def curve(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, rows without it left out; JSON's null is NaN."""
    points = [(row["step"], np.nan if row[name] is None else row[name]) for row in rows if name in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray) -> np.ndarray:
    """Trailing mean over at most five values, NaN left out."""
    windows = (values[max(0, end - 5) : end] for end in range(1, len(values) + 1))
    return np.array([np.nanmean(window) if np.isfinite(window).any() else np.nan for window in windows])


def reward_figure(rows: Sequence[Row]) -> str:
    """The reward and its weighted terms over the steps: raw values pale, trailing means strong, held-out means dots."""
    terms = dict.fromkeys(name for row in rows for name in row if name.startswith("reward/") and name != "reward/total")
    colors = {"reward/total": STAGES["grpo"][1]} | dict(zip(terms, cycle(TERM_COLORS), strict=False))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for name, color in colors.items():
            steps, values = curve(rows, name)
            label, width = name.removeprefix("reward/"), 2.0 if name == "reward/total" else 1.5
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            axes.plot(steps, smooth(values), color=color, label=label, linewidth=width)
        steps, values = curve(rows, "held_out/reward")
        if len(steps):
            axes.plot(steps, values, "o", color=STAGES["grpo"][1], markersize=5, label="held out")
        axes.set(xlabel="GRPO step", ylabel="mean over the step's rollouts")
        axes.legend(ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return svg(3.6, draw)


def health_figure(rows: Sequence[Row]) -> str:
    """Loss, entropy, gradient norm and parity over the steps."""
    shown = [(name, label) for name, label in HEALTH if len(curve(rows, name)[0])]

    def draw(figure: Figure) -> None:
        for axes, (name, label) in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
            axes.plot(*curve(rows, name), color="#0b7285", linewidth=1.2)
            axes.set(xlabel="step")
            axes.set_title(label, fontsize=10)

    return svg(2.2, draw) if shown else ""


def time_figure(rows: Sequence[Row]) -> str:
    """Seconds of each step by phase, stacked, longest phase at the bottom."""
    names = {name for row in rows for name in row if name.startswith("seconds/")} - {"seconds/step"}
    totals = {name: sum(row.get(name) or 0.0 for row in rows) for name in names}
    ordered = sorted(names, key=lambda name: (-totals[name], name))
    whole = sum(totals.values()) or 1.0

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        seconds = [[row.get(name) or 0.0 for row in rows] for name in ordered]
        labels = [f"{name.removeprefix('seconds/')} {totals[name] / whole:.0%}" for name in ordered]
        axes.stackplot([row["step"] for row in rows], *seconds, labels=labels, alpha=0.85)
        axes.set(xlabel="GRPO step", ylabel="seconds")
        axes.legend(ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return svg(2.6, draw) if ordered else ""


def grouped_bars(axes: Axes, rows: Sequence[Row], key: str, parts: Mapping[str, Sequence[str]], scale: float) -> None:
    """A group of bars for each part of the problems, a bar for each stage, with 95% bootstrap intervals."""
    stages = [stage for stage in STAGES if by_problem(rows, stage, key)]
    for offset, stage in enumerate(stages):
        values, (label, color) = by_problem(rows, stage, key), STAGES[stage]
        for place, problems in enumerate(parts.values()):
            found = [values[problem] * scale for problem in problems if problem in values]
            if found:
                mean, low, high = interval(found)
                x = place + (offset - (len(stages) - 1) / 2) * 0.38
                errors = [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]
                axes.bar(x, mean, 0.36, color=color, label=label if place == 0 else None)
                axes.errorbar(x, mean, errors, color="#343a40", capsize=3, linewidth=1)
                axes.annotate(f"{mean:.3g}", (x, high), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(parts)), list(parts))
    axes.grid(visible=False, axis="x")
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.02))


def pass_rate_figure(rows: Sequence[Row]) -> str:
    """Hidden-test pass rate on held-out problems before and after GRPO: all of them, and by difficulty."""
    parts = dict(zip(THIRDS, thirds(rows), strict=True)) if thirds(rows)[0] else {}
    everything = {"all problems": sorted({row["problem_id"] for row in rows})} | parts

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        grouped_bars(axes, rows, "pass_rate", everything, scale=100)
        axes.set(ylabel="hidden tests passed, %", ylim=(0, 108))

    return svg(3.4, draw)


def difficulty_figure(rows: Sequence[Row], key: str, label: str) -> str:
    """The metric `key` against problem difficulty: each problem's mean, and the thirds' means.

    Problems without a difficulty are left out.
    """
    rows = [row for row in rows if row.get("difficulty") is not None]
    parts = dict(zip(THIRDS, thirds(rows), strict=True))
    difficulty = {row["problem_id"]: row["difficulty"] for row in rows}

    def draw(figure: Figure) -> None:
        points, bars = figure.subplots(1, 2, width_ratios=(1.2, 1))
        for stage, (name, color) in STAGES.items():
            values = by_problem(rows, stage, key)
            x = np.array([difficulty[problem] for problem in values])
            y = np.array(list(values.values()))
            points.scatter(x, y, s=16, color=color, alpha=0.7, label=name if len(x) else None)
            if len(set(x)) > 1:
                slope, level = np.polyfit(x, y, 1)
                ends = np.array([x.min(), x.max()])
                points.plot(ends, slope * ends + level, color=color, linewidth=2)
        points.set(xlabel="measured difficulty of the problem", ylabel=label)
        grouped_bars(bars, rows, key, parts, scale=1)

    return svg(3.6, draw)
