"""The rows of a run's files, for the scripts that read one: a file that is none is told in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.errors import UserError, first_line
from fastgrpo.record.json_lines import read_lines


def grpo_samples(path: Path) -> list[dict[str, Any]]:
    """GRPO's rollouts with a reward in a samples.jsonl. Raises UserError where there are none."""
    rows = [row for row in _lines(path) if row.get("stage") == "grpo" and row.get("reward")]
    if not rows:
        raise UserError(f"{path} has no rollout of GRPO with a reward: name a run's samples.jsonl")
    return rows


def evaluated_rows(argument: str) -> Iterator[Mapping[str, Any]]:
    """The rows that a [NAME=]FILE[:STAGE] means, metrics beside the fields, under NAME where there is one.

    Raises UserError where FILE is no evaluation.json or baselines.jsonl, or has nothing of STAGE.
    """
    name, _, place = argument.rpartition("=")
    file, _, stage = place.partition(":")
    rows = [row for row in _evaluation(Path(file)) if not stage or row["stage"] == stage]
    if not rows:
        raise UserError(f"{file} has no rows{f' of the stage {stage!r}' if stage else ''}: give [NAME=]FILE[:STAGE]")
    for row in rows:
        yield row["metrics"] | row | ({"stage": name} if name else {})


def _evaluation(path: Path) -> list[dict[str, Any]]:
    try:
        rows = _lines(path) if path.suffix == ".jsonl" else msgspec.json.decode(path.read_bytes())
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; name a run's evaluation.json") from None
    if not isinstance(rows, list) or not all("metrics" in row and "stage" in row for row in rows):
        raise UserError(f"{path} has no rows of an evaluation: name an evaluation.json or a baselines.jsonl")
    return rows


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"there is no file {path}: name one of a run's folder")
    return read_lines(path)
