"""What a weighting of the reward asks for, by rows whose best workflow is plain."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "bench"


def rows() -> list[dict]:
    """Programs that drafts solve and one call does not, questions that neither gains on, two samples of each."""
    cost = {"one call": (1.0, 0.1), "drafts": (5.0, 0.3)}
    return [
        {
            "stage": stage,
            "problem_id": f"{dataset}/{number}",
            "dataset": dataset,
            "metrics": {
                "pass_rate": float(dataset == "programs" and stage == "drafts"),
                "solved": float(dataset == "programs" and stage == "drafts"),
                "spent": spent,
                "complexity": complexity,
                "worker_tokens": 100.0 * spent,
            },
        }
        for stage, (spent, complexity) in cost.items()
        for dataset in ("programs", "questions")
        for number in range(3)
        for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("efficiency", "best", "worth"),
    [
        # Drafts cost efficiency x 4 / (4 + 4) and complexity x 0.2 more, and gain 1 on half of the problems.
        ("0.2", "drafts | drafts | one call", 0.5 * (0.2 * 0.5 + 0.2 * 0.2)),
        ("3", "one call | one call | one call", 0.0),
    ],
)
def test_the_table_names_what_earns_most(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    efficiency: str,
    best: str,
    worth: float,
) -> None:
    file = tmp_path / "baselines.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["sweep", str(file), "--complexity", "0.2", "--efficiency", efficiency])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(FOLDER / "reward_sweep.py"), run_name="__main__")
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith(f"| 0.2 | {efficiency} | {best} |")
    assert f"| {worth:.3f} [" in line
