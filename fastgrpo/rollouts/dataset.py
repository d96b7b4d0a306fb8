"""Rows of a data set as examples: from Python, a file, a folder or the hub."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fastgrpo.errors import UserError
from fastgrpo.rollouts.reward_functions import Example

Row = TypeVar("Row")
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def read_examples(source: str | Path | Iterable[Mapping[str, Any]], split: str = "train") -> list[Example]:
    """The rows of `source` with a `prompt`: a list of dicts, a `datasets.Dataset`, a .jsonl file or a name on the hub.

    `prompt` is text or a list of messages with `role` and `content`; a row's `id`, where it has none, is its number.
    Raises UserError naming the row that has no usable prompt, or why there are no rows.
    """
    rows = list(_rows(str(source), split) if isinstance(source, str | Path) else source)
    if not rows:
        raise UserError(f"{source if isinstance(source, str | Path) else 'the data set'} has no rows")
    return [_example(number, row) for number, row in enumerate(rows)]


def hold_out(examples: list[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) examples; which `count` are held out follows `seed`. Raises UserError where none is left."""
    if count >= len(examples):
        raise UserError(f"data.held_out = {count} leaves nothing of {len(examples)} rows to train on: lower it")
    held = set(random.Random(f"{seed}/held-out").sample(range(len(examples)), count))
    return [e for n, e in enumerate(examples) if n not in held], [e for n, e in enumerate(examples) if n in held]


def _rows(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return _json_lines(path)
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{source} is no .jsonl file, and other data sets need: pip install 'fastgrpo[hub]'") from None
    try:
        if path.is_file() and path.suffix in FORMATS:
            return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
        return load_dataset(source, split=split)
    except Exception as error:
        # The library raises whatever its backends do.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the data set {source} does not load: {reason}") from error


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if line.strip():
            try:
                yield msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise UserError(f"{path}:{number} is no JSON object: {error}") from error


def _example(number: int, row: Mapping[str, Any]) -> Example:
    columns = dict(row)
    name, prompt = str(columns.pop("id", number)), columns.pop("prompt", None)
    messages = isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt)
    if not (isinstance(prompt, str) and prompt) and not messages:
        have = ", ".join(map(str, row)) or "nothing"
        raise UserError(
            f"row {name} of the data set needs a prompt, as text or as messages with role and content; it has {have}"
        )
    return Example(name, prompt, columns)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
