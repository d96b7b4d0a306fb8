"""The loss head beside its peers as a picture: bench/results/loss_head.md to docs/loss_head.svg.

python bench/plot_loss_head.py
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROW = re.compile(r"^\| (?P<name>[^|]+?) \| \**(?P<ms>[\d.]+) ms\** \|")


def forward_and_backward(text: str) -> list[tuple[str, float]]:
    """(name, ms) of the first table that begins with the three products, up to its forward-only rows."""
    table = text[text.index("| three matrix products") :].partition("| logits product")[0]
    rows = filter(None, map(ROW.match, table.splitlines()))
    return [(re.sub(r"[*`]", "", row["name"]), float(row["ms"])) for row in rows]


def main() -> None:
    """Draw one bar a system, the floor and ours in colour."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = forward_and_backward((HERE / "results" / "loss_head.md").read_text())[::-1]
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    colours = [
        "#888888" if "floor" in name else "#1f77b4" if name.startswith("linear_grpo") else "#cccccc" for name, _ in rows
    ]
    bars = axes.barh([name.split(" (")[0] for name, _ in rows], [ms for _, ms in rows], color=colours)
    axes.bar_label(bars, fmt="%.1f ms", padding=3)
    axes.set_xscale("log")
    axes.set_xlim(30, 1000)
    axes.set_xticks([30, 100, 300, 1000], labels=["30 ms", "100", "300", "1000"])
    axes.minorticks_off()
    figure.suptitle("Loss head, forward and backward: N=8192, H=4096, V=151936, bf16, H100", fontsize=10)
    figure.savefig(HERE.parent / "docs" / "loss_head.svg")


if __name__ == "__main__":
    main()
